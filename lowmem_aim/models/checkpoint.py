"""The only reader of model files: a folder with config.json and safetensors shards, never pickle, never code.

`Checkpoint.open` checks every header and name before a byte of tensor data is read, and lists all problems at once.
`rows` then gives any rows of any tensor, through a small sliding memory map or by positional reads: the memory in
use does not grow with the tensor. Inputs are opened for reading only.

Guarantee: bytes come from the file that `open` saw. A file whose size or mtime has changed since is an error
(ModelError), checked before each read, and by `check_unchanged` once the bytes have been used. Limits: a truncation
between a check and the use of a window is SIGBUS (see `system.interrupts`), and an in-place edit within the mtime's
granularity is not noticed.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

import xxhash

from lowmem_aim.errors import LowmemAimError, ModelError, noted, printable, raise_all
from lowmem_aim.models.config import config_of, refuse_lfs_pointer
from lowmem_aim.models.folder import check_links, tensors_in_folder
from lowmem_aim.models.headers import TensorInfo
from lowmem_aim.models.links import is_inside
from lowmem_aim.system.files import input_errors, is_folder, is_there, open_regular, open_to_read, real
from lowmem_aim.system.memory import is_allocation_failure
from lowmem_aim.system.on_demand import torch
from lowmem_aim.system.options import ReadMode
from lowmem_aim.system.tensors import digest, raw

if TYPE_CHECKING:
    from torch import Tensor

# What one mapping covers: large enough that its cost (a few microseconds) vanishes, small enough that the resident
# size stays small however large the tensor is.
WINDOW_BYTES = 32 << 20


@dataclass
class _File:
    """An open shard, and the part of it that is mapped."""

    descriptor: int
    identity: tuple[int, int]  # size, mtime_ns
    lock: threading.Lock = field(default_factory=threading.Lock)
    window: Tensor | None = None  # (bytes,) uint8
    window_start: int = 0


@dataclass(eq=False)  # compared and hashed by identity
class Checkpoint:
    """One model on disk. Make it with `open`; use it as a context manager, or `close` it.

    `label` names the model in messages, the card and mergekit_config.yml; it is never a local path.
    """

    folder: Path
    label: str
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    read: ReadMode = "mmap"
    oddities: tuple[str, ...] = ()  # of its files, for the user to know of
    _files: dict[Path, _File] = field(default_factory=dict, repr=False)
    _identities: dict[Path, tuple[int, int]] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, folder: Path, label: str | None = None, read: ReadMode = "mmap") -> Checkpoint:
        """Check all headers of the model in `folder`. Raises ModelError with every problem found."""
        with input_errors(folder):
            if not is_folder(folder):
                raise ModelError(f"there is no model folder `{printable(str(folder))}`", "check the path")
            resolved = real(folder)
            check_links(resolved)
            errors: list[LowmemAimError] = []
            with noted(errors):
                config = config_of(resolved)
            with noted(errors), input_errors(resolved):
                tensors, oddities = tensors_in_folder(resolved)
            raise_all(errors)
            checkpoint = cls(resolved, label or resolved.name, config, tensors, read, tuple(oddities))
            checkpoint._identities = {file: _identity(os.stat(file)) for file in checkpoint.files}
            return checkpoint

    @property
    def files(self) -> list[Path]:
        """The shards, in reading order."""
        return list(dict.fromkeys(info.file for info in self.tensors.values()))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    def fingerprint(self) -> str:
        """A cheap identity of the files as they are on disk: names, sizes, mtimes, headers, samples of their bytes.

        32 hex digits. The samples distinguish models whose files have equal times, as in unpacked archives.
        """
        parts = [(f.name, *self._identities[f]) for f in self.files]
        parts += [(t.name, t.dtype.name, t.shape, t.file.name, t.begin) for t in self.tensors.values()]  # type: ignore[misc]
        samples = [self._sample(info) for info in self.tensors.values()]
        return xxhash.xxh3_128_hexdigest(repr((parts, samples, sorted(self.config.items()))).encode())

    def _sample(self, info: TensorInfo) -> str:
        rows = info.matrix[0]
        middle = rows // 2
        return digest(self.rows(info.name, middle, min(middle + 1, rows)).contiguous())

    def tensor(self, name: str) -> Tensor:
        """A whole tensor in its own shape and dtype. Raises ModelError if its file has changed."""
        info = self.tensors[name]
        return self._read(info, info.begin, info.end).view(info.dtype.torch).reshape(info.shape)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start:stop of the tensor as a matrix (see `matrix_shape`), in its stored dtype: (stop - start, columns).

        The result may be a view of the file: do not write to it, and let go of it soon. Raises ModelError if the file
        has changed.
        """
        info = self.tensors[name]
        columns = info.matrix[1]
        row_bytes = columns * info.dtype.itemsize
        data = self._read(info, info.begin + start * row_bytes, info.begin + stop * row_bytes)
        return data.view(info.dtype.torch).reshape(stop - start, columns)

    def digest(self, name: str) -> str:
        """The digest of a whole tensor's bytes, as `system.tensors.digest`, read some rows at a time.

        Fewer rows are read at a time when memory runs short. Raises ModelError if the file has changed.
        """
        rows, columns = self.tensors[name].matrix
        # No dtype has more than 8 bytes, so a step of rows fits one window.
        step, start, state = max(1, WINDOW_BYTES // 8 // max(columns, 1)), 0, xxhash.xxh3_128()
        while start < rows:
            try:
                part = self.rows(name, start, min(start + step, rows))
            except Exception as error:
                if step == 1 or not is_allocation_failure(error):
                    raise
                step //= 2
            else:
                state.update(raw(part.contiguous()))
                start += step
        return str(state.hexdigest())

    def expect(self, names: Iterable[str]) -> None:
        """Announce tensors that are read soon, so that the system may fetch them meanwhile. Takes no memory of ours."""
        if hasattr(os, "posix_fadvise"):
            for info in (info for name in names if (info := self.tensors[name]).nbytes):  # 0 would mean: to the end
                with suppress(OSError):  # a filesystem that takes no advice
                    descriptor = self._file(info.file).descriptor
                    os.posix_fadvise(descriptor, info.begin, info.nbytes, os.POSIX_FADV_WILLNEED)

    def _read(self, info: TensorInfo, begin: int, end: int) -> Tensor:
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
        """Keep one window a model, not one a shard: thirty shards would be a gigabyte that `top` shows."""
        for other in list(self._files.values()):
            if other is not file and other.window is not None and other.lock.acquire(blocking=False):
                other.window = None
                other.lock.release()

    def _file(self, path: Path) -> _File:
        if path not in self._files:
            with input_errors(path):
                descriptor = open_regular(path)
            self._files[path] = _File(descriptor, self._identities[path])
        return self._files[path]

    def _check_unchanged(self, path: Path, file: _File) -> None:
        with input_errors(path):
            found = _identity(os.fstat(file.descriptor))
        if found != file.identity:
            self._changed(path)

    def stats(self) -> dict[str, os.stat_result]:
        """Shard's name -> size, times and inode as they are now. Raises ModelError."""
        with input_errors(self.folder):
            return {file.name: file.stat() for file in self.files}

    def check_unchanged(self) -> None:
        """Raise ModelError if a file has changed since `open`: what was read may mix the old and the new content."""
        for path, file in list(self._files.items()):
            self._check_unchanged(path, file)

    def _changed(self, path: Path) -> NoReturn:
        raise ModelError(
            f"`{printable(str(path))}` changed while it was being read",
            hint="wait until it no longer changes, then start again",
        )

    def small_file(self, name: str, limit_bytes: int) -> bytes | None:
        """The content of a file beside the weights, such as the tokenizer's; None if there is none.

        Raises ModelError for a file of more than `limit_bytes`, for a link out of the folder that may not be followed,
        and for a Git LFS pointer in its place.
        """
        file = self.folder / name
        with input_errors(file):
            if not is_there(file):
                return None
            if not is_inside(self.folder, file):
                raise ModelError(f"`{printable(str(file))}` is a link that leads out of its model folder")
            with open_to_read(file) as stream:
                if os.fstat(stream.fileno()).st_size > limit_bytes:
                    raise ModelError(f"`{printable(str(file))}` has more than {limit_bytes} bytes")
                content = stream.read()
        refuse_lfs_pointer(content, printable(str(file)))
        return content

    def close(self) -> None:
        """Close all files, and let go of their windows."""
        for file in self._files.values():
            file.window = None
            os.close(file.descriptor)
        self._files.clear()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> Iterator[TensorInfo]:
        return iter(self.tensors.values())


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
