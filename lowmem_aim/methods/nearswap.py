"""nearswap: the expert where it is near the base, and the less of it the further away it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from lowmem_aim.methods.footprint import Footprint
from lowmem_aim.methods.method import Rows, Script, Subject, Within, merge_method
from lowmem_aim.system.on_demand import torch

if TYPE_CHECKING:
    from torch import Tensor

SMALLEST_DISTANCE = 1e-6  # a smaller distance counts as this one


def _takes(tensor: Subject, parameters: Mapping[str, Any], loops: bool) -> Footprint:
    return Footprint(element=26)  # six float32, two masks


@merge_method("nearswap", most=1, source="mergekit", takes=_takes)
def nearswap(tensor: Subject, *, t: Annotated[float, Within(0.0)]) -> Script:
    """w W1 + (1-w) W0, w = t / max(|W0 - W1|, 1e-6), at most 1."""

    def combine(rows: Rows) -> Tensor:
        base, expert = rows.base, rows.experts[0]
        share = (t / (base - expert).abs().clamp_(min=SMALLEST_DISTANCE)).clamp_(max=1.0)
        return torch.where(share == 1.0, expert, share * expert + (1.0 - share) * base)

    return combine
    yield  # no rounds
