"""Whole tensors whose rows are computed as they are read: made some rows at a time, as float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from lowmem_aim.methods.footprint import FLOAT
from lowmem_aim.models.headers import TensorInfo
from lowmem_aim.system.on_demand import torch
from lowmem_aim.system.tensors import empty_apart

if TYPE_CHECKING:
    from torch import Tensor

STEP_ELEMENTS = 1 << 18  # computed at a time: 1 MB as float32, which stays in a processor's cache


def steps(info: TensorInfo) -> Iterator[tuple[int, int]]:
    """Yield (start, stop), in rows, of the parts in which a tensor is computed."""
    rows, columns = info.matrix
    step = max(1, STEP_ELEMENTS // max(columns, 1))
    yield from ((start, min(start + step, rows)) for start in range(0, rows, step))


def whole_tensor(info: TensorInfo, rows: Callable[[int, int], Tensor]) -> Tensor:
    """The tensor of which `rows` gives the rows start:stop, in its own shape."""
    whole = empty_apart(info.matrix, torch.float32)
    for start, stop in steps(info):
        whole[start:stop] = rows(start, stop)
    return whole.view(info.shape)


def step_bytes(columns: int, element: int) -> int:
    """Bytes that computing one part of a tensor takes, its rows among them; `element`: besides an element of a row."""
    return max(STEP_ELEMENTS, columns) * (element + FLOAT)


def whole_tensor_bytes(info: TensorInfo, element: int) -> int:
    """Bytes of RAM that `whole_tensor` takes, the result among them; `element` as in `step_bytes`."""
    return FLOAT * info.numel + step_bytes(info.matrix[1], element)
