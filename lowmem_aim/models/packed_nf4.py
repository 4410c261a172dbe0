"""Four-bit weights of bitsandbytes (NF4, FP4): a table of 16 values, and a largest magnitude for each block.

Elements lie in the order of the weight, two in a byte, the upper half first; blocks follow that order and know no rows.
With double quantisation the magnitudes are themselves numbers of a table of 256 values, with scales and an offset.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lowmem_aim.errors import ModelError, printable
from lowmem_aim.models.headers import TensorInfo
from lowmem_aim.models.packed import FLOAT, Packed, Settings, ceiling, decoded, looked_up, require, table_of
from lowmem_aim.models.tensor_files import TensorFiles
from lowmem_aim.system.dtypes import DTYPES
from lowmem_aim.system.on_demand import torch

if TYPE_CHECKING:
    from torch import Tensor

STATES = (".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4")
MOST_STATE_BYTES = 10_000


@dataclass(frozen=True, eq=False)
class FourBit(Packed):
    """A weight of four bits an element."""

    packed: TensorInfo  # as bytes
    magnitudes: TensorInfo  # of each block
    table: TensorInfo
    block: int  # elements
    nested: tuple[TensorInfo, TensorInfo] | None  # scales of the magnitudes, and the table of those
    nested_block: int
    offset: float
    others: tuple[TensorInfo, ...]  # the state, which was read when the model was opened

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        """The packed numbers, the tables and the magnitudes."""
        return self.packed, self.magnitudes, self.table, *(self.nested or ()), *self.others

    @property
    def element_bytes(self) -> int:
        """Indices of half an element each; magnitudes are few."""
        return FLOAT

    @property
    def held_bytes(self) -> int:
        """Up to two blocks beside the wanted elements, and the tables."""
        return 2 * self.block * 3 * FLOAT + (1 << 16)

    def rows(self, stored: TensorFiles, start: int, stop: int) -> Tensor:
        """Rows start:stop, decoded from the blocks that they touch."""
        columns = self.info.matrix[1]
        begin, end = start * columns, stop * columns
        first, last = begin // self.block, ceiling(end, self.block)
        until = min(last * self.block, self.info.numel)
        start_byte, end_byte = first * self.block // 2, ceiling(until, 2)
        packed = stored.elements(self.packed, start_byte, end_byte)
        table = table_of(stored.elements(self.table, 0, 16), upper_first=True)
        values = looked_up(packed.unsqueeze(0), table).flatten()[: until - first * self.block]
        magnitudes = self._magnitudes(stored, first, last)
        whole = len(values) // self.block
        values[: whole * self.block].view(whole, self.block).mul_(magnitudes[:whole, None])
        values[whole * self.block :].mul_(magnitudes[whole:])
        return values[begin - first * self.block : end - first * self.block].view(stop - start, columns)

    def _magnitudes(self, stored: TensorFiles, first: int, last: int) -> Tensor:  # (last - first,) float32
        found = stored.elements(self.magnitudes, first, last)
        if self.nested is None:
            return found.to(torch.float32)
        scales, table = self.nested
        values = stored.elements(table, 0, 256).to(torch.float32)[found.to(torch.int32)]
        own = torch.arange(first, last) // self.nested_block
        begin = first // self.nested_block
        scaled = stored.elements(scales, begin, ceiling(last, self.nested_block)).to(torch.float32)[own - begin]
        return values.mul_(scaled).add_(self.offset)


def four_bit(tensors: Mapping[str, TensorInfo], settings: Settings, stored: TensorFiles) -> Iterator[Packed]:
    """The four-bit weights of a model, whose shapes stand in tensors of text that are read here. Raises ModelError."""
    for name, state in tensors.items():
        for suffix in (suffix for suffix in STATES if name.endswith(suffix)):
            weight = name.removesuffix(suffix)
            try:
                yield _four_bit(weight, tensors, state, _state(stored, state))
            except (KeyError, TypeError, ValueError) as error:
                what = f"`{printable(name)}` does not say how `{printable(weight)}` is stored"
                raise ModelError(
                    f"`{printable(str(state.file))}`: {what}",
                    hint="download the model whole: its headers alone do not say that; else download it again",
                ) from error


def _state(stored: TensorFiles, info: TensorInfo) -> dict[str, Any]:
    if info.dtype.name != "uint8" or info.numel > MOST_STATE_BYTES:
        raise ValueError
    state = json.loads(bytes(stored.elements(info, 0, info.numel).tolist()))
    if not isinstance(state, dict):
        raise ValueError
    return state


def _four_bit(name: str, tensors: Mapping[str, TensorInfo], info: TensorInfo, state: Mapping[str, Any]) -> FourBit:
    shape, block = tuple(state["shape"]), state["blocksize"]
    weight, magnitudes, table = tensors[name], tensors[f"{name}.absmax"], tensors[f"{name}.quant_map"]
    numbers = [*shape, block, state.get("nested_blocksize", 1)]
    if not (shape and all(type(number) is int and 0 < number < 1 << 40 for number in numbers)) or block % 2:
        raise ValueError
    nested = None
    if "nested_blocksize" in state:
        nested = tensors[f"{name}.nested_absmax"], tensors[f"{name}.nested_quant_map"]
    packed = replace(weight, dtype=DTYPES["U8"], shape=(weight.nbytes,))  # whatever dtype the bytes are stored as
    found = FourBit(
        decoded(name, shape, weight),
        packed,
        magnitudes,
        table,
        block,
        nested,
        state.get("nested_blocksize", 1),
        float(state.get("nested_offset", 0.0)),
        (info,),
    )
    blocks = ceiling(found.info.numel, block)
    good = packed.nbytes == ceiling(found.info.numel, 2) and magnitudes.numel == blocks and table.numel == 16
    good = good and (magnitudes.dtype.name == "uint8") == (nested is not None) and table.dtype.is_floating_point
    if nested:
        scales = ceiling(blocks, found.nested_block)
        good = good and nested[0].numel == scales and nested[1].numel == 256
    require(good, weight, magnitudes, table, *(nested or ()))
    return found
