"""Carried here from durable.py."""

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

OWNER = "owner.json"
# Whoever asks whether a lock is held, holds it for a moment.
PATIENCE_SECONDS = 0.2


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
