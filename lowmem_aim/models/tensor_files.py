"""Tensors of safetensors files, read as they are stored: any rows, through a small sliding memory map or by reads.

The memory in use does not grow with the tensor. Files are opened for reading only.

Guarantee: bytes come from the file as it was when `note` saw it. A file whose size or mtime has changed since is an
error (ModelError), checked before each read, and by `check_unchanged` once the bytes have been used. Limits: a
truncation between a check and the use of a window is SIGBUS (see `system.interrupts`), and an in-place edit within the
mtime's granularity is not noticed.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from lowmem_aim.errors import ModelError, printable
from lowmem_aim.models.headers import TensorInfo
from lowmem_aim.system.files import input_errors, open_regular
from lowmem_aim.system.on_demand import torch
from lowmem_aim.system.options import ReadMode

if TYPE_CHECKING:
    from torch import Tensor

# What one mapping covers: large enough that its cost (a few microseconds) vanishes, small enough that the resident
# size stays small however large the tensor is.
WINDOW_BYTES = 32 << 20


@dataclass
class _File:
    """An open file, and the part of it that is mapped."""

    descriptor: int
    identity: tuple[int, int]  # size, mtime_ns
    lock: threading.Lock = field(default_factory=threading.Lock)
    window: Tensor | None = None  # (bytes,) uint8
    window_start: int = 0


class TensorFiles:
    """Files that hold tensors, opened as they are needed; `close` closes them."""

    def __init__(self, read: ReadMode) -> None:
        self.read = read
        self._opened: dict[Path, _File] = {}
        self._identities: dict[Path, tuple[int, int]] = {}

    def note(self, files: Iterable[Path]) -> None:
        """Take these files, as they are now, for those that will be read. Raises OSError."""
        self._identities |= {file: _identity(os.stat(file)) for file in files}

    def identity(self, file: Path) -> tuple[int, int]:
        """(size in bytes, mtime in ns) of a file when `note` saw it."""
        return self._identities[file]

    def elements(self, info: TensorInfo, start: int, stop: int) -> Tensor:  # (stop - start,)
        """The elements start:stop of a tensor, counted in the file's order, in the dtype that is stored.

        The result may be a view of the file: do not write to it, and let go of it soon. Raises ModelError if the file
        has changed.
        """
        size = info.dtype.itemsize
        return self._bytes(info, info.begin + start * size, info.begin + stop * size).view(info.dtype.torch)

    def rows(self, info: TensorInfo, start: int, stop: int) -> Tensor:  # (stop - start, columns)
        """Rows start:stop of the tensor as a matrix (see `headers.matrix_shape`), as `elements` gives them."""
        columns = info.matrix[1]
        return self.elements(info, start * columns, stop * columns).reshape(stop - start, columns)

    def expect(self, tensors: Iterable[TensorInfo]) -> None:
        """Announce tensors that are read soon, so that the system may fetch them meanwhile. Takes no memory of ours."""
        if hasattr(os, "posix_fadvise"):
            for info in (info for info in tensors if info.nbytes):  # 0 would mean: to the end
                with suppress(OSError):  # a filesystem that takes no advice
                    descriptor = self._file(info.file).descriptor
                    os.posix_fadvise(descriptor, info.begin, info.nbytes, os.POSIX_FADV_WILLNEED)

    def check_unchanged(self) -> None:
        """Raise ModelError if an opened file has changed: what was read may mix the old and the new content."""
        for path, file in list(self._opened.items()):
            self._check_unchanged(path, file)

    def close(self) -> None:
        """Close all files, and let go of their windows."""
        for file in self._opened.values():
            file.window = None
            os.close(file.descriptor)
        self._opened.clear()

    @property
    def mapped(self) -> list[Path]:
        """The files of which a part is mapped."""
        return [path for path, file in self._opened.items() if file.window is not None]

    def _bytes(self, info: TensorInfo, begin: int, end: int) -> Tensor:
        """Bytes [begin, end) of the tensor's file as a (bytes,) uint8 tensor that may be viewed as its dtype."""
        file = self._file(info.file)
        self._let_go_of_all_but(file)
        with file.lock:
            self._check_unchanged(info.file, file)
            if begin == end:
                return torch.empty(0, dtype=torch.uint8)
            if self.read == "mmap":
                with suppress(OSError):  # no mmap here (odd filesystem, no address space): read instead
                    data = _mapped(file, begin, end, info.end)
                    # A file's header may leave a tensor at an offset that its dtype cannot be viewed at.
                    return data if data.storage_offset() % info.dtype.itemsize == 0 else data.clone()
            return self._pread(info, file, begin, end)

    def _pread(self, info: TensorInfo, file: _File, begin: int, end: int) -> Tensor:
        data = torch.empty(end - begin, dtype=torch.uint8)
        view = data.numpy().data
        done = 0
        while done < len(view):
            with input_errors(info.file):
                count = _read_into(file.descriptor, view[done:], begin + done)
            if count == 0:
                self._changed(info.file)
            done += count
        return data

    def _let_go_of_all_but(self, file: _File) -> None:
        """Keep one window for all files, not one each: thirty shards would be a gigabyte that `top` shows."""
        for other in list(self._opened.values()):
            if other is not file and other.window is not None and other.lock.acquire(blocking=False):
                other.window = None
                other.lock.release()

    def _file(self, path: Path) -> _File:
        if path not in self._opened:
            with input_errors(path):
                descriptor = open_regular(path)
            self._opened[path] = _File(descriptor, self._identities[path])
        return self._opened[path]

    def _check_unchanged(self, path: Path, file: _File) -> None:
        with input_errors(path):
            found = _identity(os.fstat(file.descriptor))
        if found != file.identity:
            self._changed(path)

    def _changed(self, path: Path) -> NoReturn:
        raise ModelError(
            f"`{printable(str(path))}` changed while it was being read",
            hint="wait until it no longer changes, then start again",
        )


def _identity(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_size, stat.st_mtime_ns


def _mapped(file: _File, begin: int, end: int, tensor_end: int) -> Tensor:
    """Bytes [begin, end) from the file's window, which moves (never beyond this tensor) if they are not in it."""
    window = file.window
    if window is None or begin < file.window_start or end > file.window_start + window.numel():
        start = begin - begin % mmap.ALLOCATIONGRANULARITY
        stop = max(end, min(tensor_end, start + WINDOW_BYTES))
        file.window = None  # unmap before mapping: two windows at once would count twice
        # Private and writable only because torch warns of read-only buffers; nothing ever writes to it.
        mapping = mmap.mmap(file.descriptor, stop - start, access=mmap.ACCESS_COPY, offset=start)
        file.window = window = torch.frombuffer(mapping, dtype=torch.uint8)
        file.window_start = start
    return window[begin - file.window_start : end - file.window_start]


def _read_into(descriptor: int, view: memoryview, offset: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [view], offset)
    os.lseek(descriptor, offset, os.SEEK_SET)  # Windows; safe, because each read of a file holds its lock
    data = os.read(descriptor, len(view))
    view[: len(data)] = data
    return len(data)
