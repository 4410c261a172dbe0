"""The dtypes of tensors in files, known without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lowmem_aim.system.on_demand import torch


@dataclass(frozen=True)
class Dtype:
    """A dtype that can be merged, or copied."""

    name: str  # as recipes, configs and torch write it: `bfloat16`
    itemsize: int  # bytes of an element
    is_floating_point: bool = False

    @property
    def torch(self) -> torch.dtype:
        """The same as torch has it."""
        found: torch.dtype = getattr(torch, self.name)
        return found


# By the names that safetensors files have for them.
DTYPES: Mapping[str, Dtype] = {
    "F64": Dtype("float64", 8, True),
    "F32": Dtype("float32", 4, True),
    "F16": Dtype("float16", 2, True),
    "BF16": Dtype("bfloat16", 2, True),
    "I64": Dtype("int64", 8),
    "I32": Dtype("int32", 4),
    "I16": Dtype("int16", 2),
    "I8": Dtype("int8", 1),
    "U8": Dtype("uint8", 1),
    "BOOL": Dtype("bool", 1),
}
BY_NAME: Mapping[str, Dtype] = {dtype.name: dtype for dtype in DTYPES.values()}

# Those of quantised weights: they can be read, but not merged as they are.
PACKED_DTYPES: Mapping[str, Dtype] = {
    "F8_E4M3": Dtype("float8_e4m3fn", 1),
    "F8_E5M2": Dtype("float8_e5m2", 1),
    "F8_E8M0": Dtype("float8_e8m0fnu", 1),
}
