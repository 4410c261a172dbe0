"""Files: opened only if they are regular ones, written whole or not at all, and named in every error.

What is written durably is written under a temporary name, fsynced, renamed, and the folder fsynced.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from lowmem_aim.errors import DiskError, LowmemAimError, ModelError, UsageError
from lowmem_aim.system.faults import NoRegularFile, advice, cause, file_of, named

LONGEST_NAME = 200  # bytes; systems allow 255, and names of unfinished files are longer than their outputs'


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn an OSError of the block, which writes `path`, or files in the folder `path`, into a DiskError.

    The error names `path`, or the file in it that the system would not give; not one that could not be made.
    """
    try:
        yield
    except OSError as error:
        file = Path(file_of(error, path))
        what = file if path in file.parents and os.path.lexists(file) else path
        raise DiskError(f"{named(what)} cannot be written: {cause(error)}", advice(error)) from error


@contextlib.contextmanager
def input_errors(path: Path, kind: type[LowmemAimError] = ModelError) -> Iterator[None]:
    """Turn an OSError of the block, which reads `path`, or files in the folder `path`, into an error of a `kind`.

    The error names the file that the system would not give.
    """
    try:
        yield
    except OSError as error:
        raise unreadable(error, path, kind) from error


def unreadable(error: OSError, path: Path, kind: type[LowmemAimError] = ModelError) -> LowmemAimError:
    """An error of a `kind` that names the file which the system would not give, or `path` if it says none."""
    return kind(f"{named(file_of(error, path))} cannot be read: {cause(error)}", advice(error))


# --- opened -----------------------------------------------------------------------------------------------------------


def is_there(path: Path) -> bool:
    """Whether anything lies there, a link that leads nowhere too. Raises OSError if that cannot be found out.

    `os.path.lexists` answers no to any trouble: what is finished would count as lost.
    """
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: no system takes such a name
        return False
    return True


def is_file(path: Path) -> bool:
    """Whether there is a regular file, links followed. Raises OSError if that cannot be found out."""
    return stat.S_ISREG(_mode(path))


def is_folder(path: Path) -> bool:
    """Whether there is a folder, links followed. Raises OSError if that cannot be found out."""
    return stat.S_ISDIR(_mode(path))


def real(path: Path) -> Path:
    """The path with all links followed, as far as they lead anywhere; Path.resolve fails at links in a circle."""
    return Path(os.path.realpath(path))


def _mode(path: Path) -> int:
    """The mode of what lies there, links followed; 0 for nothing. Path's own questions answer no to any trouble."""
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: no system takes such a name
        return 0


def open_regular(path: Path, flags: int = os.O_RDONLY, *, follow: bool = True) -> int:
    """The descriptor of a regular file, new ones with mode 0666 less the umask; `follow`: also through a link.

    A pipe would block for ever, and a device may never end: both are refused at once. Raises OSError, NoRegularFile.
    """
    if not follow and not hasattr(os, "O_NOFOLLOW") and path.is_symlink():
        raise NoRegularFile(path)
    wanted = ("O_NONBLOCK", "O_BINARY", "O_CLOEXEC", *(() if follow else ("O_NOFOLLOW",)))
    for name in wanted:
        flags |= getattr(os, name, 0)
    descriptor = os.open(path, flags, 0o666)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise NoRegularFile(path)


def open_to_read(path: Path, *, follow: bool = True) -> IO[bytes]:
    """A regular file, opened for reading as bytes. Raises OSError as `open_regular`."""
    return os.fdopen(open_regular(path, follow=follow), "rb")


def read_file(path: Path, *, follow: bool = True) -> bytes:
    """All bytes of a regular file. Raises OSError as `open_regular`."""
    with open_to_read(path, follow=follow) as stream:
        return stream.read()


# --- written ----------------------------------------------------------------------------------------------------------


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` survive a power loss; on Windows, which cannot open folders, do nothing.

    Raises OSError.
    """
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, data: bytes) -> None:
    """Write `data` to `path` durably: the file then holds exactly `data`, or what it held before.

    The mode respects the umask. The temporary name starts with a dot and ends with `.partial`. Raises DiskError.
    """
    # A random name: two processes may write the same cached file, and each must write it whole.
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    with disk_errors(path):
        try:
            with partial.open("xb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/lowmem_aim, or ~/.cache/lowmem_aim: the only place outside the output that is written to.

    Where no home is known (a user without an entry in the system's list), it is a folder that cannot be made: whoever
    writes to the cache goes on without it.
    """
    root = os.environ.get("XDG_CACHE_HOME")
    with contextlib.suppress(RuntimeError):
        return (Path(root) if root else Path.home() / ".cache") / "lowmem_aim"
    return Path(os.devnull) / "lowmem_aim"


def name_temporary_folder() -> None:
    """Name a temporary folder even where none can be written: libraries ask for the name when they are imported."""
    try:
        tempfile.gettempdir()
    except OSError:
        tempfile.tempdir = os.environ.get("TMPDIR") or os.path.abspath(os.sep + "tmp")


def temporary_folder() -> tempfile.TemporaryDirectory[str]:
    """A new folder where the system keeps temporary ones; it is a context manager. Raises DiskError."""
    try:
        return tempfile.TemporaryDirectory(prefix="lowmem-aim-", ignore_cleanup_errors=True)
    except OSError as error:
        raise DiskError(
            f"no temporary folder can be made: {cause(error)}", "set TMPDIR to a folder that can be written"
        ) from error


def partial_folder(output: Path) -> Path:
    """The folder for the unfinished work on one output file. Raises UsageError if the name is too long."""
    if len(os.fsencode(output.name)) > LONGEST_NAME:
        raise UsageError(f"the output's name has more than {LONGEST_NAME} bytes", hint="choose a shorter name")
    return output.parent / f"{output.name}.partial"
