"""Weights that are stored as small floats or integers with a scale for each tensor, row, block or group of elements.

FP8 as transformers writes it (`fp8`, `fbgemm_fp8`), FP8 and INT8 of compressed-tensors, and INT8 of bitsandbytes. A
weight is the stored number times its scale. A block at an edge may be smaller than the others.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lowmem_aim.errors import ModelError, printable
from lowmem_aim.models.headers import TensorInfo
from lowmem_aim.models.packed import FLOAT, Packed, Settings, as_matrix, ceiling, decoded, require
from lowmem_aim.models.tensor_files import TensorFiles
from lowmem_aim.system.on_demand import torch

if TYPE_CHECKING:
    from torch import Tensor

_NUMBERS = frozenset({"float8_e4m3fn", "float8_e5m2", "int8"})
_SCALES = frozenset({"float32", "bfloat16", "float16", "float8_e8m0fnu", "uint8"})
# bitsandbytes keeps the largest magnitude of a row, which stands for 127; it multiplies by this, in float32.
_BY_127 = 7.874015718698502e-3
# Suffixes of a weight's scales, after its own name or in place of `weight`.
_OF_FP8 = ("_scale_inv", ".scale", ".qscale_weight")


@dataclass(frozen=True, eq=False)
class Scaled(Packed):
    """A weight of (experts, rows, columns), or (rows, columns), with a grid of scales over the last two dimensions."""

    numbers: TensorInfo
    scales: TensorInfo
    grid: tuple[int, int]  # scales of one matrix: (rows, columns)
    block: tuple[int, int]  # rows and columns of the weight for each scale
    factor: float = 1.0  # of all elements, after their scales

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        """The numbers and their scales."""
        return self.numbers, self.scales

    @property
    def element_bytes(self) -> int:
        """The scales of a row, picked for it: never more than one an element; and what is read where not mapped."""
        return 2 * FLOAT

    def rows(self, stored: TensorFiles, start: int, stop: int) -> Tensor:
        """Rows start:stop, times their scales."""
        height, columns = self.info.shape[-2], self.info.shape[-1]
        values = _widened(stored.rows(self.numbers, start, stop))
        if not values.numel():
            return values
        place = torch.arange(start, stop)
        place = place // height * self.grid[0] + place % height // self.block[0]
        first, last = int(place[0]), int(place[-1]) + 1
        scales = as_floats(stored.rows(as_matrix(self.scales, self.grid[1]), first, last))[place - first]
        whole = columns // self.block[1]  # blocks of a row that are not cut off
        edge = whole * self.block[1]
        values[:, :edge].view(len(values), whole, self.block[1]).mul_(scales[:, :whole, None])
        if edge < columns:
            values[:, edge:].mul_(scales[:, whole:])
        return values if self.factor == 1.0 else values.mul_(self.factor)


def _widened(numbers: Tensor) -> Tensor:
    """Numbers as float32. Those of FP8 are looked up two at a time: torch takes several times as long for each."""
    words = numbers.flatten()
    if words.dtype == torch.int8 or len(words) % 2 or words.storage_offset() % 2:
        return numbers.to(torch.float32)
    index = words.view(torch.int16).to(torch.int32).bitwise_and_(0xFFFF)
    return _pairs_of(words.dtype).index_select(0, index).view(torch.float32).view(numbers.shape)


@functools.cache
def _pairs_of(dtype: torch.dtype) -> Tensor:  # (65536,) int64
    """Both float32 numbers in each two bytes of a dtype, as one number of 8 bytes."""
    both = torch.arange(1 << 16)
    lower, upper = (part.to(torch.uint8).view(dtype).to(torch.float32) for part in (both & 255, both >> 8))
    if sys.byteorder == "big":
        lower, upper = upper, lower
    return torch.stack([lower, upper], dim=1).view(torch.int64).flatten()


def as_floats(scales: Tensor) -> Tensor:
    """Scales as float32; bytes are exponents of 2, as E8M0 has them."""
    if scales.dtype == torch.uint8:
        return (scales.to(torch.float32) - 127.0).exp2()
    return scales.to(torch.float32)


def fp8(tensors: Mapping[str, TensorInfo], settings: Settings, stored: TensorFiles) -> Iterator[Packed]:
    """The weights of `fp8`: blocks of `weight_block_size`, or one scale for all."""
    block = _pair(settings.get("weight_block_size", [128, 128]))
    for name, numbers in tensors.items():
        stem = name.removesuffix(".weight")
        names = [f"{name}{_OF_FP8[0]}", *(f"{stem}{suffix}" for suffix in _OF_FP8[1:])]
        scales = next((tensors[other] for other in names if other in tensors), None)
        if scales is not None and numbers.dtype.name.startswith("float8") and scales is not numbers:
            yield _scaled(name, numbers, scales, block)


def by_weight_scale(tensors: Mapping[str, TensorInfo], settings: Settings, stored: TensorFiles) -> Iterator[Packed]:
    """The weights of `fbgemm_fp8` and of compressed-tensors: `weight` and `weight_scale`. Raises ModelError.

    Refused are those of compressed-tensors that have zero points, or are packed several in a number.
    """
    block = _block_structure(settings)
    for name, scales in tensors.items():
        numbers = tensors.get(name.removesuffix("_scale")) if name.endswith("_scale") else None
        if numbers is None or numbers.dtype.name not in _NUMBERS:
            continue
        zero = f"{numbers.name}_zero_point"
        if zero in tensors:
            what = f"quantised weights with zero points (`{printable(zero)}`) are not read"
            raise ModelError(
                f"`{printable(str(numbers.file))}`: {what}",
                hint="use the unquantised model, or a version of it that is quantised symmetrically",
            )
        yield _scaled(numbers.name, numbers, scales, block)


def int8_of_bitsandbytes(
    tensors: Mapping[str, TensorInfo], settings: Settings, stored: TensorFiles
) -> Iterator[Packed]:
    """The INT8 weights of bitsandbytes: `weight` and `SCB`, the largest magnitude of each row."""
    for name, scales in tensors.items():
        numbers = tensors.get(f"{name.removesuffix('SCB')}weight") if name.endswith(".SCB") else None
        if numbers is not None and numbers.dtype.name == "int8":
            yield _scaled(numbers.name, numbers, scales, None, _BY_127)


def _scaled(
    name: str, numbers: TensorInfo, scales: TensorInfo, block: tuple[int, int] | None, factor: float = 1.0
) -> Scaled:
    """A weight with its scales, whose shapes say how they lie over it. Raises ModelError if they do not fit."""
    good = len(numbers.shape) in (2, 3) and numbers.dtype.name in _NUMBERS and scales.dtype.name in _SCALES
    require(good, numbers, scales)
    *experts, height, columns = numbers.shape
    count = experts[0] if experts else 1
    grid = _grid(scales, numbers)
    if block and grid == (ceiling(height, block[0]), ceiling(columns, block[1])):
        sizes = block
    else:  # one scale for all, for each row, or for each group of columns; blocks that the config does not tell
        require(not block or grid in ((1, 1), (height, 1)), numbers, scales)
        sizes = _size(height, grid[0]), _size(columns, grid[1])
    require(scales.numel == count * grid[0] * grid[1] and all(sizes), numbers, scales)
    return Scaled(decoded(name, numbers.shape, numbers), numbers, scales, grid, sizes, factor)


def _grid(scales: TensorInfo, numbers: TensorInfo) -> tuple[int, int]:
    """(rows, columns) of the scales over one matrix of the weight."""
    height = numbers.shape[-2]
    if len(scales.shape) >= len(numbers.shape):
        return scales.shape[-2], scales.shape[-1]
    own = scales.shape[len(numbers.shape) - 2 :]  # without the experts
    return (height, 1) if own == (height,) and height > 1 else (1, 1)


def _size(length: int, number: int) -> int:
    """Elements for each of `number` scales over `length` elements; 0 if they cannot be as many for each."""
    return max(length // number, 1) if number and length % number == 0 else 0


def _pair(value: object) -> tuple[int, int] | None:
    good = isinstance(value, list) and len(value) == 2 and all(type(n) is int and n > 0 for n in value)
    return (value[0], value[1]) if good and isinstance(value, list) else None


def _block_structure(settings: Settings) -> tuple[int, int] | None:
    """The size of blocks that compressed-tensors' groups of modules have, if they have one."""
    groups = settings.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict) and (block := _pair(weights.get("block_structure"))):
            return block
    return None
