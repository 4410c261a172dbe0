"""The only reader of model files: a folder with config.json and safetensors shards, never pickle, never code.

`Checkpoint.open` checks every header and name before a byte of tensor data is read and lists all problems at once.
`rows` then gives any rows of any tensor, through a small sliding memory map or by positional reads: the memory in
use does not grow with the tensor. Inputs are opened for reading only.

Guarantee: bytes come from the file that `open` saw. A file whose size or mtime changed since is an error
(ModelError), checked before each read, and by `check_unchanged` when what was read has been used. A truncation between
a check and the use of a window is SIGBUS (see `interrupts`). An in-place edit within the mtime's granularity is not
noticed.
"""

from __future__ import annotations

import mmap
import os
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NoReturn

import torch
import xxhash
from torch import Tensor

from lowmem_aim.config import config_of, load_json
from lowmem_aim.errors import LowmemAimError, ModelError, noted, printable, raise_all
from lowmem_aim.headers import MAX_HEADER_BYTES, TensorInfo, read_header
from lowmem_aim.memory import is_allocation_failure

ReadMode = Literal["mmap", "pread"]

# What one mapping covers: large enough that its cost (a few microseconds) vanishes, small enough that the resident
# size stays small however large the tensor is.
WINDOW_BYTES = 32 << 20
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CHAT_TEMPLATES = "additional_chat_templates"  # the one folder in a model's that transformers looks into
# What GPTQ and AWQ, bitsandbytes, FP8, compressed-tensors and MXFP4 store beside or in place of a weight.
QUANTISED = re.compile(
    r"\.(qweight|qzeros|g_idx|absmax|quant_map|SCB|weight_scale|weight_scale_inv|weight_packed)$"
    r"|\.quant_state\.|_proj_(blocks|scales)$"
)
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def digest(data: Tensor) -> str:
    """xxh3-128 of a contiguous CPU tensor's bytes, in hex: an identity check, no protection against forgery."""
    return xxhash.xxh3_128_hexdigest(raw(data))


def raw(data: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    return data.detach().reshape(-1).view(torch.uint8).numpy().data


def _inside(folder: Path, file: Path) -> bool:
    """Whether `file`, links followed, lies in `folder` or in the blob store of the Hub cache that `folder` is in."""
    try:
        target = file.resolve()
    except (OSError, RuntimeError):  # a link that leads to itself
        return False
    if folder in target.parents:
        return True
    in_hub_cache = folder.parent.name == "snapshots"
    return in_hub_cache and target.parent == folder.parent.parent / "blobs"


def _check_links(folder: Path) -> None:
    """Refuse links out of the folder for every file that we or transformers may open; all of them at once."""
    readable = (".json", ".safetensors", ".model", ".txt", ".jinja")
    files = [*sorted(folder.iterdir()), *sorted((folder / CHAT_TEMPLATES).glob("*"))]
    links = [f for f in files if f.is_symlink() and (f.suffix in readable or f.name == CHAT_TEMPLATES)]
    outside = [file for file in links if not _inside(folder, file)]
    if outside:
        raise ModelError([f"`{printable(str(file))}` is a link that leads out of its model folder" for file in outside])


def is_plain(name: Any) -> bool:
    """Whether `name` is a file's that can only lie in the model's folder itself, on every system."""
    return isinstance(name, str) and len(name) <= 255 and not set(name) & {"/", "\\", "\0", ":"}


def _is_shard_name(name: Any) -> bool:
    # The ending too: it is what `_check_links` goes by.
    return is_plain(name) and name.endswith(".safetensors")


def shard_names(folder: Path) -> set[str]:
    """The files that hold the model's tensors, there or not; `open` refuses names that are not plain.

    Raises ModelError for an index that cannot be read.
    """
    weight_map = _weight_map(folder)
    return {SINGLE} if weight_map is None else {name for name in weight_map.values() if _is_shard_name(name)}


def _shard(folder: Path, name: Any) -> Path:
    """The path of a shard that an index names, or a ModelError if the name could lead out of the folder."""
    shown = printable(repr(name))
    if not _is_shard_name(name):
        what = "not a plain file name that ends in .safetensors"
        raise ModelError(f"`{printable(str(folder / INDEX))}` names the shard {shown}: {what}")
    file = folder / str(name)
    if not file.is_file():
        raise ModelError(f"`{printable(str(folder / INDEX))}` names the shard {shown}, which is missing")
    return file


def _weight_map(folder: Path) -> dict[str, Any] | None:
    """Tensor name -> shard name, from the index; None if the folder has a single file."""
    if (folder / SINGLE).is_file() or not (folder / INDEX).is_file():
        return None
    index = load_json(folder / INDEX, MAX_HEADER_BYTES)
    table = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(table, dict) or not table:
        raise ModelError(f"`{printable(str(folder / INDEX))}` has no `weight_map`")
    return table


def _tensors_in(folder: Path) -> dict[str, TensorInfo]:
    """All tensors of the model in file order; every problem of every shard at once."""
    weight_map = _weight_map(folder)
    if weight_map is None:
        return _usable(folder, read_header(_single_file(folder)))
    problems: list[str] = []
    tensors: dict[str, TensorInfo] = {}
    shards: dict[str, list[str]] = {}  # its name as it stands there -> tensors
    for name, shard_name in weight_map.items():
        shards.setdefault(repr(shard_name), []).append(name)
    for shard_name, names in shards.items():
        try:
            shard = read_header(_shard(folder, weight_map[names[0]]))
        except ModelError as error:
            problems += error.problems
            continue
        missing = [name for name in names if name not in shard]
        problems += [
            f"shard {printable(shard_name)} of `{printable(str(folder))}` lacks `{printable(n)}`" for n in missing
        ]
        tensors |= {name: shard[name] for name in names if name in shard}
    if problems:
        raise ModelError(problems, hint="download the model again, or repair its index")
    return _usable(folder, tensors)


def _usable(folder: Path, tensors: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    """In file order. Raises ModelError for tensors of which no weight can be made without dequantising."""
    quantised = [name for name in tensors if QUANTISED.search(name)]
    if quantised:
        raise ModelError(
            f"`{printable(str(folder))}` is quantised (it holds `{printable(quantised[0])}`)",
            hint="merge the unquantised models, then quantise the result",
        )
    return _in_file_order(tensors)


def _in_file_order(tensors: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Reading in this order is reading forward."""
    return {t.name: t for t in sorted(tensors.values(), key=lambda t: (t.file.name, t.begin, t.name))}


def _single_file(folder: Path) -> Path:
    single = folder / SINGLE
    if single.is_file():
        return single
    pickles = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
    if pickles:
        raise ModelError(
            f"`{printable(str(folder))}` has no safetensors, only pickle (`{printable(pickles[0])}`)",
            hint="pickle can run code and is never loaded; convert it once, where you trust it: "
            "`AutoModelForCausalLM.from_pretrained(folder)"
            ".save_pretrained(new_folder)` in Python, or look for a safetensors revision on the Hub",
        )
    raise ModelError(f"`{printable(str(folder))}` has neither {SINGLE} nor {INDEX}")


@dataclass
class _File:
    """An open shard, and the window of it that is mapped."""

    descriptor: int
    identity: tuple[int, int]  # size, mtime_ns
    lock: threading.Lock = field(default_factory=threading.Lock)
    window: Tensor | None = None  # (bytes,) uint8
    window_start: int = 0


@dataclass(eq=False)  # two are the same only if they are one
class Checkpoint:
    """One model on disk. Make it with `open`; use it as a context manager, or `close` it.

    `label` is how messages, the card and mergekit_config.yml call the model (never a local path).
    """

    folder: Path
    label: str
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    read: ReadMode = "mmap"
    _files: dict[Path, _File] = field(default_factory=dict, repr=False)
    _identities: dict[Path, tuple[int, int]] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, folder: Path, label: str | None = None, read: ReadMode = "mmap") -> Checkpoint:
        """Check all headers of the model in `folder`; raises ModelError with every problem found."""
        if not folder.is_dir():
            raise ModelError(f"there is no model folder `{printable(str(folder))}`")
        resolved = folder.resolve()
        _check_links(resolved)
        errors: list[LowmemAimError] = []
        with noted(errors):
            config = config_of(resolved)
        with noted(errors):
            tensors = _tensors_in(resolved)
        raise_all(errors)
        checkpoint = cls(resolved, label or resolved.name, config, tensors, read)
        checkpoint._identities = {file: _identity(os.stat(file)) for file in checkpoint.files}
        return checkpoint

    @property
    def files(self) -> list[Path]:
        """The shards, in reading order."""
        return list(dict.fromkeys(info.file for info in self.tensors.values()))

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.tensors.values())

    def fingerprint(self) -> str:
        """A cheap identity of the files as they lie here: names, sizes, mtimes, headers, samples of their bytes.

        32 hex digits. The samples tell apart models whose files have equal times, as in unpacked archives.
        """
        parts = [(f.name, *self._identities[f]) for f in self.files]
        parts += [(t.name, str(t.dtype), t.shape, t.file.name, t.begin) for t in self.tensors.values()]  # type: ignore[misc]
        samples = [self._sample(info) for info in self.tensors.values()]
        return xxhash.xxh3_128_hexdigest(repr((parts, samples, sorted(self.config.items()))).encode())

    def _sample(self, info: TensorInfo) -> str:
        rows = info.matrix[0]
        middle = rows // 2
        return digest(self.rows(info.name, middle, min(middle + 1, rows)).contiguous())

    def tensor(self, name: str) -> Tensor:
        """A whole tensor in its own shape and dtype."""
        info = self.tensors[name]
        return self._read(info, info.begin, info.end).view(info.dtype).reshape(info.shape)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start:stop of `matrix_shape`, in the storage dtype, (stop - start, columns).

        The result may be a view of the file: do not write to it, and let go of it soon.
        """
        info = self.tensors[name]
        columns = info.matrix[1]
        row_bytes = columns * info.dtype.itemsize
        data = self._read(info, info.begin + start * row_bytes, info.begin + stop * row_bytes)
        return data.view(info.dtype).reshape(stop - start, columns)

    def digest(self, name: str) -> str:
        """As `digest`, of a whole tensor's bytes, some of its rows at a time; fewer where memory runs short."""
        rows, columns = self.tensors[name].matrix
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
        """Tensors that are read soon: the system may fetch them from the disk meanwhile. Takes no memory of ours."""
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
            count = _read_into(file.descriptor, view[done:], begin + done)
            if count == 0:
                self._changed(info.file)
            done += count
        return data

    def _let_go_of_all_but(self, file: _File) -> None:
        """One window a model, not one a shard: thirty shards would be a gigabyte that `top` shows."""
        for other in list(self._files.values()):
            if other is not file and other.window is not None and other.lock.acquire(blocking=False):
                other.window = None
                other.lock.release()

    def _file(self, path: Path) -> _File:
        if path not in self._files:
            try:
                descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
            except OSError as error:
                raise ModelError(f"`{printable(str(path))}` cannot be read: {error.strerror}") from error
            self._files[path] = _File(descriptor, self._identities[path])
        return self._files[path]

    def _check_unchanged(self, path: Path, file: _File) -> None:
        if _identity(os.fstat(file.descriptor)) != file.identity:
            self._changed(path)

    def check_unchanged(self) -> None:
        """Raises ModelError if a file changed since `open`: what was read of it may be of before and after."""
        for path, file in list(self._files.items()):
            self._check_unchanged(path, file)

    def _changed(self, path: Path) -> NoReturn:
        raise ModelError(
            f"`{printable(str(path))}` changed while it was being read",
            hint="let it settle, then start again",
        )

    def small_file(self, name: str, limit_bytes: int) -> bytes | None:
        """The content of a file beside the weights, such as the tokenizer's; None if there is none.

        Raises ModelError for one that leads out of the folder or has more than `limit_bytes`.
        """
        file = self.folder / name
        if not file.is_file():
            return None
        if file.stat().st_size > limit_bytes:
            raise ModelError(f"`{printable(str(file))}` has more than {limit_bytes} bytes")
        return file.read_bytes()

    def close(self) -> None:
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
    """Bytes [begin, end) out of the file's window, which moves (never beyond this tensor) when they are not in it."""
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
    os.lseek(descriptor, offset, os.SEEK_SET)  # Windows: safe, each file's reads hold its lock
    data = os.read(descriptor, len(view))
    view[: len(data)] = data
    return len(data)
