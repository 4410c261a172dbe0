"""Output shards: preallocated, written front to back under a temporary name, hashed as they are written.

Hashing, writing and syncing have threads of their own: `append` waits only when they are behind. Finished tensors are
committed in groups, each only after its bytes are durable (fdatasync); `close` returns once all bytes are. Nothing here
gives a file its final name. A full disk shows when the shard is begun (posix_fallocate), if the filesystem can reserve
space.
"""

from __future__ import annotations

import errno
import hashlib
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from lowmem_aim.errors import DiskError
from lowmem_aim.output.records import Group
from lowmem_aim.system.files import disk_errors, input_errors, is_there, open_regular, open_to_read, sync_folder

# Appended pieces that may wait to be written.
WAITING = 4
# A sync begins each time the shard has grown by this much; otherwise all of it would wait for the last one.
SYNC_BYTES = 64 << 20
# Tensors are committed together until they have this many bytes: a commit costs some 16 ms, on many disks more. While
# one group is made durable the next one is filled; a kill costs both.
GROUP_BYTES = 32_000_000
CHUNK = 8 << 20

Data = bytes | memoryview
Facts = Any  # about a tensor, for the journal


@dataclass(frozen=True)
class Prefix:
    """The finished front of a shard's file, as it was found."""

    tensors: int
    end: int  # bytes
    state: Any  # hashlib's, of those bytes


@dataclass(frozen=True)
class _Done:
    """An entry of the queue: a tensor has been appended whole."""

    facts: Facts


@dataclass(frozen=True)
class Commit:
    """Tensors that have become durable; `tensors`, `end` and `sha256` are those of the whole file so far."""

    tensors: int
    end: int
    sha256: str
    facts: tuple[Facts, ...]  # of the tensors since the last commit


class ShardWriter:
    """One file of a known size. A context manager: leaving it without `close` closes the descriptor, nothing more."""

    def __init__(
        self,
        path: Path,
        size: int,
        commit: Callable[[Commit], None] = lambda done: None,
        prefix: Prefix | None = None,
        worked: Callable[[int, float], None] = lambda nbytes, seconds: None,
    ) -> None:
        """Create `path` with `size` bytes (it must not exist), or go on after its finished `prefix`. Raises DiskError.

        Two functions are called in other threads: `commit` with what has become durable, `worked` with a number of
        bytes written and the seconds that writing them took.
        """
        self._path, self._size, self._commit, self._worked = path, size, commit, worked
        self._tensors, self._written, self._hash = 0, 0, hashlib.sha256()
        if prefix:
            self._tensors, self._written, self._hash = prefix.tensors, prefix.end, prefix.state
        self._committed = self._synced = self._written
        self._facts: list[Facts] = []  # of the tensors that are not committed yet
        self._error: BaseException | None = None
        with disk_errors(path):
            mode = 0 if prefix else os.O_CREAT | os.O_EXCL
            self._descriptor: int | None = open_regular(path, os.O_RDWR | mode, follow=False)
            try:
                os.lseek(self._descriptor, self._written, os.SEEK_SET)
                _reserve(self._descriptor, size)
                if not prefix:
                    sync_folder(path.parent)  # else a power loss could keep the rows and lose the file
            except BaseException:
                self._drop()
                raise
        self._waiting: queue.Queue[Data | _Done | threading.Event | None] = queue.Queue(WAITING)
        self._to_sync: queue.Queue[Commit | bool] = queue.Queue()  # True: only sync; False: the end
        self._threads = [
            threading.Thread(target=body, daemon=True, name=name)
            for body, name in ((self._write_all, "write"), (self._sync_all, "sync"))
        ]
        for thread in self._threads:
            thread.start()

    def append(self, data: Data) -> None:
        """Write the next bytes of the file; `data` must not change from now on.

        Raises DiskError, perhaps for bytes given earlier.
        """
        self._put(data)

    def tensor_done(self, facts: Facts = None) -> None:
        """Mark what was appended since the last call, or since the header, as a whole tensor.

        Raises DiskError, perhaps for bytes given earlier.
        """
        self._put(_Done(facts))

    def settle(self) -> None:
        """Wait until all tensors that are done are durable and committed. Raises DiskError."""
        settled = threading.Event()
        self._put(settled)
        settled.wait()
        if self._error:
            raise self._error

    def close(self) -> str:
        """Make the file durable, close it, and return its sha256 in hex. Raises DiskError."""
        self._stop()
        if self._error:
            raise self._error
        if self._written != self._size:
            raise AssertionError(f"{self._path.name}: {self._written} bytes written of {self._size}")
        assert self._descriptor is not None, "the shard is closed"
        with disk_errors(self._path):
            os.fsync(self._descriptor)
        self._drop()
        return str(self._hash.hexdigest())

    def _put(self, item: Data | _Done | threading.Event) -> None:
        assert self._threads, "the shard is closed"
        if self._error:
            raise self._error
        self._waiting.put(item)

    # -- the threads

    def _write_all(self) -> None:
        while (item := self._waiting.get()) is not None:
            try:
                if not self._error:  # else take the rest, so that nobody waits for this thread
                    self._take(item)
            except BaseException as error:
                self._error = error
            finally:
                if isinstance(item, threading.Event):
                    item.set()

    def _take(self, item: Data | _Done | threading.Event) -> None:
        if isinstance(item, threading.Event):
            if self._facts:
                self._begin_commit()
            self._to_sync.join()
        elif isinstance(item, _Done):
            self._tensors += 1
            self._facts.append(item.facts)
            if self._written - self._committed >= GROUP_BYTES or self._written == self._size:
                self._begin_commit()
        else:
            self._write(memoryview(item).cast("B"))

    def _write(self, view: memoryview) -> None:
        assert self._descriptor is not None
        begun, nbytes = time.perf_counter(), len(view)
        self._hash.update(view)
        with disk_errors(self._path):
            while view:
                count = os.write(self._descriptor, view)
                view = view[count:]
                self._written += count
        self._worked(nbytes, time.perf_counter() - begun)
        if self._written - self._synced >= SYNC_BYTES:
            self._synced = self._written
            self._to_sync.put(True)

    def _begin_commit(self) -> None:
        self._to_sync.join()  # no more than one group is ever on its way
        self._to_sync.put(Commit(self._tensors, self._written, self._hash.hexdigest(), tuple(self._facts)))
        self._committed = self._synced = self._written
        self._facts.clear()

    def _sync_all(self) -> None:
        while (item := self._to_sync.get()) is not False:
            try:
                if not self._error:
                    self._make_durable(item)
            except BaseException as error:
                self._error = self._error or error
            finally:
                self._to_sync.task_done()

    def _make_durable(self, item: Commit | bool) -> None:
        assert self._descriptor is not None
        with disk_errors(self._path):
            getattr(os, "fdatasync", os.fsync)(self._descriptor)
        if isinstance(item, Commit):
            self._commit(item)

    def _stop(self) -> None:
        threads, self._threads = self._threads, []
        if threads:  # the writing thread first: it may still have commits for the other
            self._waiting.put(None)
            threads[0].join()
            self._to_sync.put(False)
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


def finished_prefix(path: Path, groups: Sequence[Group]) -> tuple[Prefix | None, list[Group]]:
    """The front of a shard's file that is what the journal says, found by reading it, and the groups in it.

    `groups` are in file order; whatever comes after the first that differs does not count. Raises DiskError.
    """
    state, good, position = hashlib.sha256(), [], 0
    prefix = None
    with input_errors(path, DiskError):
        if not groups or not is_there(path):
            return None, []
    with input_errors(path, DiskError), open_to_read(path, follow=False) as stream:
        for group in groups:
            while position < group.end and (data := stream.read(min(CHUNK, group.end - position))):
                state.update(data)
                position += len(data)
            begun = prefix.tensors if prefix else 0  # what a lost row said of its tensors is lost with it
            if group.start != begun or position < group.end or state.hexdigest() != group.sha256:
                break
            good.append(group)
            prefix = Prefix(group.tensors, group.end, state.copy())
    return prefix, good


def _reserve(descriptor: int, size: int) -> None:
    if os.fstat(descriptor).st_size > size:
        os.ftruncate(descriptor, size)
    if hasattr(os, "posix_fallocate") and size:
        try:
            os.posix_fallocate(descriptor, 0, size)
            return
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
    os.ftruncate(descriptor, size)  # reserves nothing: a full disk shows later
