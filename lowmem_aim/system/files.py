"""Files that are whole or absent: written under a temporary name, fsynced, renamed, and the folder fsynced."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from lowmem_aim.errors import DiskError, UsageError, printable

LONGEST_NAME = 200  # bytes; systems allow 255, and names of unfinished files are longer than their outputs'


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into a DiskError that names `path`."""
    try:
        yield
    except OSError as error:
        raise DiskError(f"`{printable(str(path))}` cannot be written: {error.strerror or error}") from error


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


def partial_folder(output: Path) -> Path:
    """The folder for the unfinished work on one output file. Raises UsageError if the name is too long."""
    if len(os.fsencode(output.name)) > LONGEST_NAME:
        raise UsageError(f"the output's name has more than {LONGEST_NAME} bytes", hint="choose a shorter name")
    return output.parent / f"{output.name}.partial"
