"""MXFP4 experts as gpt-oss has them: four bits an element, and an exponent for each 32.

`NAME_blocks` is (experts, out, groups, 16) uint8, the lower half of a byte first; `NAME_scales` (experts, out, groups).
The weight NAME is their transpose, (experts, in, out): a slice of its rows is some columns of what is stored.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lowmem_aim.models.headers import TensorInfo
from lowmem_aim.models.packed import (
    CHUNK_BYTES,
    FLOAT,
    Packed,
    Settings,
    as_matrix,
    ceiling,
    columns_of,
    decoded,
    looked_up,
    require,
    table_of,
)
from lowmem_aim.models.tensor_files import TensorFiles
from lowmem_aim.system.on_demand import torch

if TYPE_CHECKING:
    from torch import Tensor

GROUP, HALF = 32, 16  # elements that share an exponent, and their bytes
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


@dataclass(frozen=True, eq=False)
class Mxfp4(Packed):
    """The weights of all experts of a layer."""

    blocks: TensorInfo
    scales: TensorInfo

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        """The packed numbers and their exponents."""
        return self.blocks, self.scales

    @property
    def element_bytes(self) -> int:
        """Bytes and indices of half an element each, and the rows before they are transposed."""
        return 3 + FLOAT

    @property
    def held_bytes(self) -> int:
        """A piece of the file where it is not mapped, up to two groups beside the wanted rows, and factors."""
        return CHUNK_BYTES + (2 * GROUP + 4) * self.info.shape[-1] * (self.element_bytes + FLOAT)

    def rows(self, stored: TensorFiles, start: int, stop: int) -> Tensor:
        """Rows start:stop of the experts, one below the other."""
        _, height, width = self.info.shape
        found = torch.empty(stop - start, width)
        row = start
        while row < stop:
            expert, first = divmod(row, height)
            last = min(height, first + stop - row)
            found[row - start : row - start + last - first] = self._of_expert(stored, expert, first, last).t()
            row += last - first
        return found

    def _of_expert(self, stored: TensorFiles, expert: int, first: int, last: int) -> Tensor:  # (out, last - first)
        """Some rows of one expert, not transposed; whole groups are decoded, and what is beside the rows cut off."""
        height, width = self.info.shape[1:]
        lines = expert * width, (expert + 1) * width
        begin, end = first // GROUP, ceiling(last, GROUP)
        packed = columns_of(stored, as_matrix(self.blocks, height // 2), lines, (begin * HALF, end * HALF))
        exponents = columns_of(stored, as_matrix(self.scales, height // GROUP), lines, (begin, end))
        values = looked_up(packed, table_of(torch.tensor(VALUES)))
        factors = torch.pow(2.0, exponents.to(torch.int32) - 127)
        values.view(width, end - begin, GROUP).mul_(factors.unsqueeze(2))
        return values[:, first - begin * GROUP : last - begin * GROUP]


def mxfp4(tensors: Mapping[str, TensorInfo], settings: Settings, stored: TensorFiles) -> Iterator[Packed]:
    """The experts of a gpt-oss. Raises ModelError if their parts do not fit together."""
    for name, blocks in tensors.items():
        stem = name.removesuffix("_blocks")
        scales = tensors.get(f"{stem}_scales")
        if stem == name or scales is None:
            continue
        shape = blocks.shape
        good = len(shape) == 4 and shape[3] == HALF and scales.shape == shape[:3]
        require(good and blocks.dtype.name == scales.dtype.name == "uint8", blocks, scales)
        experts, width, groups, _ = shape
        yield Mxfp4(decoded(stem, (experts, groups * GROUP, width), blocks), blocks, scales)
