"""Requests to a run from another terminal: to pause, or to go on. Each is a file in the output's private folder.

    lowmem-aim pause OUT   ->   OUT/.lowmem_aim/request   ->   the run takes the file away and pauses

The file holds one word. No process number is read from a file, and no signal is sent. A request is for the run that
holds the folder's lock: whatever lies there when a run takes the lock, or gives it back, is removed unread.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from lowmem_aim.system.files import disk_errors, open_to_read

REQUEST = "request"
Word = Literal["pause", "resume"]
_WORDS: dict[bytes, Word] = {b"pause": "pause", b"resume": "resume"}
_LONGEST = 16  # bytes that are read: more than any word has


def leave(private: Path, word: Word) -> None:
    """Leave a request in a run's private folder, in the place of an earlier one. Raises DiskError."""
    partial = _other_name(private)
    with disk_errors(private):
        try:
            with partial.open("xb") as stream:  # not synced: a request means nothing to a later run
                stream.write(word.encode())
            os.replace(partial, private / REQUEST)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def take(private: Path) -> Word | None:
    """Take the request away and return it; None if there is none, or nothing that this tool wrote."""
    taken = _other_name(private)
    with contextlib.suppress(OSError):
        # Renamed before it is read: else a request that comes between reading and removing would be lost.
        os.replace(private / REQUEST, taken)
        try:
            with open_to_read(taken, follow=False) as stream:
                return _WORDS.get(stream.read(_LONGEST).strip())
        finally:
            taken.unlink()
    return None


def withdraw(private: Path) -> bool:
    """Remove a request that no run has taken; False if it has been taken. Raises DiskError."""
    with disk_errors(private):
        try:
            (private / REQUEST).unlink()
        except (FileNotFoundError, NotADirectoryError):
            return False
    return True


@contextlib.contextmanager
def only_new_requests(private: Path) -> Iterator[None]:
    """Remove the requests to earlier runs before the block, and those that this run has not taken after it.

    The caller holds the folder's lock. Raises DiskError if an old request cannot be removed.
    """
    withdraw(private)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            (private / REQUEST).unlink()


def _other_name(private: Path) -> Path:
    """A name beside the request, of the kind that runs clear away (see `system.files.write_file`)."""
    return private / f".{REQUEST}.{secrets.token_hex(4)}.partial"
