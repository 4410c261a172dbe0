"""The lock of an output folder: one run at a time writes to it.

The system releases a lock when its process ends, whatever the reason. A file beside the lock says who holds it; that
file is for messages only.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from lowmem_aim.errors import DiskError, LockedError, printable
from lowmem_aim.system.faults import advice, cause, named
from lowmem_aim.system.files import read_file

OWNER = "owner.json"
# `is_held` holds the lock itself for a moment: wait that long before reporting that it is taken.
PATIENCE_SECONDS = 0.2


@dataclass(frozen=True)
class Owner:
    """The process that holds a lock, as it describes itself."""

    pid: int
    host: str
    since: str  # local time

    def __str__(self) -> str:
        return f"process {self.pid} on {printable(self.host)}, since {printable(self.since)}"


def is_held(lock: Path, patience_seconds: float = 0.0) -> bool:
    """Whether a living process holds the lock, and goes on holding it for `patience_seconds`.

    The lock itself is tried: clocks and process numbers in a file can be wrong.
    """
    if not os.path.isfile(lock) or lock.is_symlink():
        return False
    asked = FileLock(lock)
    try:
        asked.acquire(timeout=patience_seconds, poll_interval=PATIENCE_SECONDS / 10)
    except Timeout:
        return True
    except OSError:  # a folder that cannot be written to
        return False
    asked.release()
    return False


def owner_of(lock: Path) -> Owner | None:
    """The process that holds the lock, or held it last; None if there is no readable record of one."""
    try:
        found = json.loads(read_file(lock.with_name(OWNER), follow=False))
        return Owner(int(found["pid"]), str(found["host"]), str(found["since"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextlib.contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold `file` as a lock during the block. A dead process holds nothing.

    Raises LockedError if another process holds the lock, DiskError if `file` cannot be locked.
    """
    lock = FileLock(file)
    try:
        lock.acquire(timeout=PATIENCE_SECONDS, poll_interval=PATIENCE_SECONDS / 10)
    except Timeout:  # before OSError, which it is a subclass of
        raise locked_error(file, owner_of(file)) from None
    except OSError as error:
        raise DiskError(f"{named(file)} cannot be locked: {cause(error)}", advice(error)) from error
    try:
        _sign(file)
        yield
    finally:
        with contextlib.suppress(OSError):
            file.with_name(OWNER).unlink(missing_ok=True)
        lock.release()


@contextlib.contextmanager
def locked_if_free(file: Path, patience_seconds: float = 0.0) -> Iterator[bool]:
    """Hold `file` as a lock during the block unless another process goes on holding it; give whether it is held.

    A dead process holds nothing. Raises DiskError if `file` cannot be locked.
    """
    lock = FileLock(file)
    try:
        lock.acquire(timeout=patience_seconds, poll_interval=PATIENCE_SECONDS / 10)
    except Timeout:
        pass
    except OSError as error:
        raise DiskError(f"{named(file)} cannot be locked: {cause(error)}", advice(error)) from error
    try:
        yield lock.is_locked
    finally:
        lock.release()


def locked_error(lock: Path, owner: Owner | None) -> LockedError:
    """The error for an output folder that another run is writing to; `lock` is the path of its lock."""
    return LockedError(
        f"another run{f' ({owner})' if owner else ''} is writing to `{printable(str(lock.parent.parent))}`",
        hint="wait until it ends, or stop it",
    )


def _sign(lock: Path) -> None:
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    owner = Owner(os.getpid(), socket.gethostname(), since)
    file = lock.with_name(OWNER)
    with contextlib.suppress(OSError):  # the file is for messages only
        file.unlink(missing_ok=True)  # what a killed run has left, or a link that leads elsewhere
        with file.open("x", encoding="utf-8") as stream:
            stream.write(json.dumps(vars(owner)))
