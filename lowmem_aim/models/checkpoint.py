"""One model on disk: a folder with config.json and safetensors shards, never pickle, never code.

`Checkpoint.open` checks every header and name before a byte of tensor data is read, and lists all problems at once.
`rows` then gives any rows of any tensor, from files that are still those that `open` saw (see `tensor_files`).

Whoever reads a model asks for `tensors`, `rows` and `expect`, and knows nothing of how a tensor is stored: a model with
an adapter (see `adapted`) is a Checkpoint too.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import xxhash

from lowmem_aim.errors import LowmemAimError, ModelError, noted, printable, raise_all
from lowmem_aim.events import Notice
from lowmem_aim.methods.footprint import Footprint
from lowmem_aim.models.adapter_config import refuse_as_model
from lowmem_aim.models.config import config_of, refuse_lfs_pointer
from lowmem_aim.models.folder import INDEX, SINGLE, check_is_model, check_links, tensors_in_folder
from lowmem_aim.models.headers import TensorInfo
from lowmem_aim.models.links import is_inside
from lowmem_aim.models.quantisation import refuse_quantised
from lowmem_aim.models.tensor_files import TensorFiles
from lowmem_aim.system.files import input_errors, is_folder, is_there, open_to_read, real
from lowmem_aim.system.memory import is_allocation_failure
from lowmem_aim.system.on_demand import torch
from lowmem_aim.system.options import ReadMode
from lowmem_aim.system.tensors import digest, raw

if TYPE_CHECKING:
    from torch import Tensor

# Classes of transformers, and of others that are named alike, that end in other heads or in none.
_HEADLESS = re.compile(
    r".*(ForSequenceClassification|ForTokenClassification|ForQuestionAnswering|RewardModel|(?<!Head)(?<!Heads)Model)"
)
DIGEST_ELEMENTS = 1 << 20  # read at a time for a digest


@dataclass(frozen=True)
class ModelFolder:
    """Contents of a model folder, as its config and its headers say: quantised weights as they are stored."""

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    oddities: tuple[Notice, ...]  # of its files, for the user to know of

    @property
    def files(self) -> list[Path]:
        """The shards, in reading order."""
        return files_of(self.tensors.values())


def model_in(folder: Path) -> ModelFolder:
    """Check all headers of the model in `folder`. Raises ModelError with every problem found."""
    with input_errors(folder):
        if not is_folder(folder):
            raise ModelError(f"there is no model folder `{printable(str(folder))}`", "check the path")
        resolved = real(folder)
        check_links(resolved)
        refuse_as_model(resolved, (SINGLE, INDEX))
        check_is_model(resolved)
        errors: list[LowmemAimError] = []
        with noted(errors):
            config = config_of(resolved)
        with noted(errors), input_errors(resolved):
            tensors, oddities = tensors_in_folder(resolved)
        raise_all(errors)
        return ModelFolder(resolved, config, tensors, tuple(Notice(text, "warning") for text in oddities))


def files_of(tensors: Iterable[TensorInfo]) -> list[Path]:
    """The files of some tensors, each once."""
    return list(dict.fromkeys(info.file for info in tensors))


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
    oddities: tuple[Notice, ...] = ()  # of its files, for the user to know of

    def __post_init__(self) -> None:
        self.stored = TensorFiles(self.read)

    @classmethod
    def open(cls, folder: Path, label: str | None = None, read: ReadMode = "mmap") -> Checkpoint:
        """Check all headers of the model in `folder`. Raises ModelError with every problem found.

        A quantised model is one; `quantised.open_model` reads it.
        """
        found = model_in(folder)
        refuse_quantised(found.folder, found.config, found.tensors)
        return cls.of(found, label, read)

    @classmethod
    def of(cls, found: ModelFolder, label: str | None = None, read: ReadMode = "mmap") -> Checkpoint:
        """The model of a folder whose headers were checked."""
        checkpoint = cls(found.folder, label or found.folder.name, found.config, found.tensors, read, found.oddities)
        with input_errors(found.folder):
            checkpoint.stored.note(checkpoint.files)
        return checkpoint

    @property
    def place(self) -> tuple[Path, ...]:
        """The folders that the model is read from: what tells it from other models."""
        return (self.folder,)

    @property
    def labels(self) -> tuple[str, ...]:
        """The label of each folder in `place`."""
        return (self.label,)

    @property
    def adapter(self) -> str:
        """The adapter in it, in a few words; "" if it has none."""
        return ""

    @property
    def files(self) -> list[Path]:
        """The shards, in reading order."""
        return files_of(self.tensors.values())

    @property
    def is_headless(self) -> bool:
        """Whether the config says that the model has no output head over tokens: a reward model, or a base model."""
        names = self.config.get("architectures") or []
        return bool(names) and all(isinstance(name, str) and _HEADLESS.fullmatch(name) for name in names)

    @property
    def numel(self) -> int:
        """The number of elements of all tensors."""
        return sum(info.numel for info in self.tensors.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def footprint(self) -> Footprint:
        """Bytes that reading takes besides the rows that it gives: `element` of a slice, and `tensor` in any case."""
        return Footprint()

    def whole_bytes(self, name: str) -> int:
        """Bytes of RAM that reading a whole tensor takes, the result among them: none if it is a view of a mapping."""
        return 0 if self.read == "mmap" else self.tensors[name].nbytes

    def warm_up(self) -> None:
        """Load and compile whatever reading needs, so that its memory is in use before a budget is divided."""

    def fingerprint(self) -> str:
        """A cheap identity of the files as they are on disk: names, sizes, mtimes, headers, samples of their bytes.

        32 hex digits. The samples distinguish models whose files have equal times, as in unpacked archives.
        """
        parts = [(f.name, *self.stored.identity(f)) for f in self.files]
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
        return self.stored.elements(info, 0, info.numel).reshape(info.shape)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start:stop of the tensor as a matrix (see `matrix_shape`), in its dtype: (stop - start, columns).

        The result may be a view of the file: do not write to it, and let go of it soon. Raises ModelError if the file
        has changed.
        """
        return self.stored.rows(self.tensors[name], start, stop)

    def digest(self, name: str) -> str:
        """The digest of a whole tensor's bytes, as `system.tensors.digest`, read some rows at a time.

        Fewer rows are read at a time when memory runs short. Raises ModelError if the file has changed.
        """
        rows, columns = self.tensors[name].matrix
        step, start, state = max(1, DIGEST_ELEMENTS // max(columns, 1)), 0, xxhash.xxh3_128()
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

    def repeats(self, head: str, embedding: str) -> bool:
        """Whether a stored head that is tied to its embedding is the embedding once more, in whatever dtype.

        Raises ModelError.
        """
        ours, theirs = self.tensors[head], self.tensors[embedding]
        if ours.shape != theirs.shape:
            return False
        if ours.dtype == theirs.dtype:
            return self.digest(head) == self.digest(embedding)
        rows, columns = ours.matrix
        step = max(1, DIGEST_ELEMENTS // max(columns, 1))
        return all(
            torch.equal(
                *(self.rows(name, start, min(start + step, rows)).to(torch.float64) for name in (head, embedding))
            )
            for start in range(0, rows, step)
        )

    def expect(self, names: Iterable[str]) -> None:
        """Announce tensors that are read soon, so that the system may fetch them meanwhile. Takes no memory of ours."""
        self.stored.expect([self.tensors[name] for name in names])

    def stats(self) -> dict[str, os.stat_result]:
        """Shard's name -> size, times and inode as they are now. Raises ModelError."""
        with input_errors(self.folder):
            return {file.name: file.stat() for file in self.files}

    def check_unchanged(self) -> None:
        """Raise ModelError if a file has changed since `open`: what was read may mix the old and the new content."""
        self.stored.check_unchanged()

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
        self.stored.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> Iterator[TensorInfo]:
        return iter(self.tensors.values())
