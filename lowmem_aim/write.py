"""Output shards: preallocated, written front to back under a temporary name, hashed as they are written.

Hashing, writing and syncing have threads of their own: who appends waits only when they are behind. Guarantee: `close`
returns after the file's bytes are durable (fsync). Nothing here gives a file its final name. A full disk shows when
the shard is begun (posix_fallocate), where the filesystem can reserve space.
"""

from __future__ import annotations

import errno
import hashlib
import os
import queue
import threading
from pathlib import Path
from types import TracebackType

from lowmem_aim.durable import disk_errors
from lowmem_aim.errors import DiskError

# Appended pieces that may wait to be written.
WAITING = 4
# The disk is told to write so much at a time while the shard still grows; else all of it would wait for the fsync.
SYNC_BYTES = 64 << 20

Data = bytes | memoryview


class ShardWriter:
    """One file of a known size. A context manager: leaving it without `close` drops the descriptor, nothing more."""

    def __init__(self, path: Path, size: int) -> None:
        """Create `path` (it must not exist) with `size` bytes. Raises DiskError."""
        self._path = path
        self._size = size
        self._written = 0
        self._hash = hashlib.sha256()
        self._error: BaseException | None = None
        with disk_errors(path):
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
            self._descriptor: int | None = os.open(path, flags, 0o666)  # less the umask, as for any file
            try:
                _reserve(self._descriptor, size)
            except BaseException:
                self._drop()
                raise
        self._waiting: queue.Queue[Data | None] = queue.Queue(WAITING)
        self._grown = threading.Semaphore(0)  # one release for each SYNC_BYTES, and one for the end
        self._threads = [
            threading.Thread(target=body, daemon=True, name=name)
            for body, name in ((self._write_all, "write"), (self._sync_all, "sync"))
        ]
        for thread in self._threads:
            thread.start()

    def append(self, data: Data) -> None:
        """The next bytes of the file; they must not change from now on. Raises DiskError, perhaps of earlier ones."""
        assert self._threads, "the shard is closed"
        if self._error:
            raise self._error
        self._waiting.put(data)

    def close(self) -> str:
        """Make the file durable; its sha256 in hex. Raises DiskError."""
        self._stop()
        if self._error:
            raise self._error
        if self._written != self._size:
            raise AssertionError(f"{self._path.name}: {self._written} bytes written of {self._size}")
        assert self._descriptor is not None, "the shard is closed"
        with disk_errors(self._path):
            os.fsync(self._descriptor)
        self._drop()
        return self._hash.hexdigest()

    # -- the threads

    def _write_all(self) -> None:
        while (data := self._waiting.get()) is not None:
            if self._error:
                continue  # take the rest, so that nobody waits for this thread
            try:
                self._write(memoryview(data).cast("B"))
            except BaseException as error:
                self._error = error

    def _write(self, view: memoryview) -> None:
        assert self._descriptor is not None
        self._hash.update(view)
        with disk_errors(self._path):
            while view:
                count = os.write(self._descriptor, view)
                view = view[count:]
                before, self._written = self._written, self._written + count
                if before // SYNC_BYTES != self._written // SYNC_BYTES:
                    self._grown.release()

    def _sync_all(self) -> None:
        while self._grown.acquire() and self._threads:
            assert self._descriptor is not None
            try:
                with disk_errors(self._path):
                    getattr(os, "fdatasync", os.fsync)(self._descriptor)
            except DiskError as error:
                self._error = self._error or error
                return

    def _stop(self) -> None:
        threads, self._threads = self._threads, []
        if threads:
            self._waiting.put(None)
            threads[0].join()
            self._grown.release()
            threads[1].join()

    def _drop(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._error = self._error or error  # what still waits need not be written
        self._stop()
        self._drop()


def _reserve(descriptor: int, size: int) -> None:
    if hasattr(os, "posix_fallocate") and size:
        try:
            os.posix_fallocate(descriptor, 0, size)
            return
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
    os.ftruncate(descriptor, size)
