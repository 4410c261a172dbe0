"""Weights that are stored as packed numbers and scales, decoded to float32 a few rows at a time.

Each format has a file of its own (`packed_*.py`): it finds its weights among the tensors of a model, and decodes rows.
The arithmetic is that of the libraries that made the format, in float32, so that rounding to bfloat16 gives their bits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lowmem_aim.errors import ModelError, printable
from lowmem_aim.models.headers import TensorInfo
from lowmem_aim.models.tensor_files import TensorFiles
from lowmem_aim.system.dtypes import DTYPES
from lowmem_aim.system.on_demand import torch

if TYPE_CHECKING:
    from torch import Tensor

CHUNK_BYTES = 4 << 20  # of whole stored rows, read at a time where only some of their columns are wanted
FLOAT = 4
Settings = Mapping[str, Any]  # a config's `quantization_config`


@dataclass(frozen=True, eq=False)  # compared and hashed by identity
class Packed(ABC):
    """A weight that is stored as other tensors, its `parts`."""

    info: TensorInfo  # as it is decoded: float32; the place is that of its largest part

    @property
    @abstractmethod
    def parts(self) -> tuple[TensorInfo, ...]:
        """The stored tensors that the weight is decoded from."""

    @property
    @abstractmethod
    def element_bytes(self) -> int:
        """Bytes of temporaries for each element of the rows that are decoded, without the rows themselves."""

    @property
    def held_bytes(self) -> int:
        """Bytes of temporaries however few rows are decoded."""
        return 1 << 16

    @abstractmethod
    def rows(self, stored: TensorFiles, start: int, stop: int) -> Tensor:  # (stop - start, columns) float32
        """Rows start:stop of the weight as a matrix. The result has memory of its own. Raises ModelError."""


# Finds the packed weights among a model's tensors; a format may have its shapes in tensors of text, which it reads.
Finder = Callable[[Mapping[str, TensorInfo], Settings, TensorFiles], Iterator[Packed]]


def decoded(name: str, shape: tuple[int, ...], stored: TensorInfo) -> TensorInfo:
    """A weight as it is decoded; `stored` is its largest part. An output keeps it as bfloat16."""
    return replace(stored, name=name, shape=shape, dtype=DTYPES["F32"], kept_as=DTYPES["BF16"])


def as_matrix(info: TensorInfo, columns: int) -> TensorInfo:
    """The same stored tensor seen as rows of so many elements."""
    return replace(info, shape=(info.numel // columns if columns else 0, columns))


def columns_of(
    stored: TensorFiles, info: TensorInfo, rows: tuple[int, int], columns: tuple[int, int]
) -> Tensor:  # (rows, columns) of the stored dtype
    """A part of a stored matrix: whole rows are read a few at a time, and only the wanted columns kept."""
    (first, last), (left, right) = rows, columns
    found = torch.empty(last - first, right - left, dtype=info.dtype.torch)
    step = max(1, CHUNK_BYTES // max(1, info.matrix[1] * info.dtype.itemsize))
    for start in range(first, last, step):
        stop = min(start + step, last)
        found[start - first : stop - first] = stored.rows(info, start, stop)[:, left:right]
    return found


def table_of(values: Tensor, upper_first: bool = False) -> Tensor:  # (256,) int64
    """Both float32 numbers in each byte, of 16 values: as one number of 8 bytes, which is looked up twice as fast."""
    byte = torch.arange(256)
    lower, upper = values.to(torch.float32)[byte & 15], values.to(torch.float32)[byte >> 4]
    both = (upper, lower) if upper_first else (lower, upper)
    return torch.stack(both, dim=1).view(torch.int64).flatten()


def looked_up(packed: Tensor, table: Tensor) -> Tensor:  # (rows, 2 * bytes) float32
    """The numbers in rows of bytes, two in each."""
    found = table.index_select(0, packed.flatten().to(torch.int32))
    return found.view(torch.float32).view(len(packed), 2 * packed.shape[1])


def require(good: bool, weight: TensorInfo, *others: TensorInfo) -> None:
    """Raise ModelError for parts of a weight whose shapes or dtypes do not fit together."""
    if not good:
        told = ", ".join(f"`{printable(t.name)}` {t.dtype.name} {list(t.shape)}" for t in (weight, *others))
        raise ModelError(
            f"`{printable(str(weight.file))}`: parts of a quantised weight do not fit together: {told}",
            hint="do the weights belong to this config.json? download the model again",
        )


def ceiling(count: int, size: int) -> int:
    """The number of groups of `size` that `count` elements make, the last one perhaps smaller."""
    return -(-count // size)
