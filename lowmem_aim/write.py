"""Output shards: preallocated, written front to back under a temporary name, hashed as they are written.

Guarantee: `close` returns after the file's bytes are durable (fsync). Nothing here gives a file its final name.
A full disk shows when the shard is begun (posix_fallocate), where the filesystem can reserve space.
"""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path
from types import TracebackType

from lowmem_aim.durable import disk_errors


class ShardWriter:
    """One file of a known size. A context manager: leaving it without `close` drops the descriptor, nothing more."""

    def __init__(self, path: Path, size: int) -> None:
        """Create `path` (it must not exist) with `size` bytes. Raises DiskError."""
        self._path = path
        self._size = size
        self._written = 0
        self._hash = hashlib.sha256()
        with disk_errors(path):
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
            self._descriptor: int | None = os.open(path, flags, 0o666)  # less the umask, as for any file
            _reserve(self._descriptor, size)

    def append(self, data: bytes | memoryview) -> None:
        """Write the next bytes. Raises DiskError."""
        assert self._descriptor is not None, "the shard is closed"
        view = memoryview(data).cast("B")
        self._hash.update(view)
        with disk_errors(self._path):
            while view:
                count = os.write(self._descriptor, view)
                view = view[count:]
                self._written += count

    def close(self) -> str:
        """Make the file durable; its sha256 in hex. Raises DiskError."""
        assert self._descriptor is not None, "the shard is closed"
        if self._written != self._size:
            raise AssertionError(f"{self._path.name}: {self._written} bytes written of {self._size}")
        with disk_errors(self._path):
            os.fsync(self._descriptor)
        self._drop()
        return self._hash.hexdigest()

    def _drop(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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
