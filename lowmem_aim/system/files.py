"""Files that are whole or absent: write beside, fsync, rename, fsync the folder; and the lock of an output folder."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from lowmem_aim.errors import DiskError, UsageError, printable

LONGEST_NAME = 200  # bytes, of 255: names for what is not whole yet are longer


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """OSError -> DiskError with the file's name."""
    try:
        yield
    except OSError as error:
        raise DiskError(f"`{printable(str(path))}` cannot be written: {error.strerror or error}") from error


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` survive a power loss. Windows cannot open folders; there it does nothing."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, data: bytes) -> None:
    """`path` holds exactly `data`, durably, or what it held before. The mode respects the umask.

    Raises DiskError. The temporary name starts with a dot and ends with `.partial`.
    """
    # A name of its own: two processes may write the same cached file, each whole.
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
    """$XDG_CACHE_HOME/lowmem_aim, or ~/.cache/lowmem_aim: the only place outside the output that is written to."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "lowmem_aim"


def partial_folder(output: Path) -> Path:
    """The folder that work on one file lies in until it is whole. Raises UsageError for a name that is too long."""
    if len(os.fsencode(output.name)) > LONGEST_NAME:
        raise UsageError(f"the output's name has more than {LONGEST_NAME} bytes", hint="name it shorter")
    return output.parent / f"{output.name}.partial"
