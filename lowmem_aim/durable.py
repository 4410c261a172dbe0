"""Files that are whole or absent: write beside, fsync, rename, fsync the folder; and the lock of an output folder."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from lowmem_aim.errors import DiskError, LockedError, UsageError, printable

OWNER = "owner.json"
LONGEST_NAME = 200  # bytes, of 255: names for what is not whole yet are longer
# Whoever asks whether a lock is held, holds it for a moment.
PATIENCE_SECONDS = 0.2


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


@dataclass(frozen=True)
class Owner:
    """Who holds a lock, as it said itself."""

    pid: int
    host: str
    since: str  # local time

    def __str__(self) -> str:
        return f"process {self.pid} on {printable(self.host)}, since {printable(self.since)}"


def is_held(lock: Path) -> bool:
    """Whether a living process holds the lock, which is asked of the lock itself: clocks and process numbers lie."""
    if not lock.is_file():
        return False
    asked = FileLock(lock)
    try:
        asked.acquire(timeout=0)
    except Timeout:
        return True
    except OSError:  # a folder that cannot be written to
        return False
    asked.release()
    return False


def owner_of(lock: Path) -> Owner | None:
    """Who holds the lock, or held it last."""
    try:
        found = json.loads(lock.with_name(OWNER).read_text(encoding="utf-8"))
        return Owner(int(found["pid"]), str(found["host"]), str(found["since"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextlib.contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold `file` as a lock; LockedError if another process does. A dead process holds nothing."""
    lock = FileLock(file)
    try:
        lock.acquire(timeout=PATIENCE_SECONDS, poll_interval=PATIENCE_SECONDS / 10)
    except Timeout:  # an OSError too
        raise locked_error(file, owner_of(file)) from None
    except OSError as error:
        raise DiskError(f"`{printable(str(file))}` cannot be locked: {error.strerror or error}") from error
    try:
        _sign(file)
        yield
    finally:
        with contextlib.suppress(OSError):
            file.with_name(OWNER).unlink(missing_ok=True)
        lock.release()


def locked_error(lock: Path, owner: Owner | None) -> LockedError:
    """That another run is at work in the output folder that `lock` is for."""
    return LockedError(
        f"another run{f' ({owner})' if owner else ''} is writing to `{printable(str(lock.parent.parent))}`",
        hint="wait for it, or stop it",
    )


def _sign(lock: Path) -> None:
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    owner = Owner(os.getpid(), socket.gethostname(), since)
    with contextlib.suppress(OSError):  # only to tell others
        lock.with_name(OWNER).write_text(json.dumps(vars(owner)), encoding="utf-8")
