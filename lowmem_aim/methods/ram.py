"""RAM, for experts trained by reinforcement learning (Behavior Knowledge Merge in Reinforced Agentic Models, 2026).

A delta that one expert alone has stays unchanged; deltas that several experts have are averaged over these.
`ramplus_tl` strengthens the deltas that an expert alone has, by how much it shares with others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from lowmem_aim.methods.exact import UNITS, ExactSums
from lowmem_aim.methods.footprint import Footprint
from lowmem_aim.methods.method import Combine, Rows, Script, Subject, Within, merge_method
from lowmem_aim.system.on_demand import torch

if TYPE_CHECKING:
    from torch import Tensor

Epsilon = Annotated[float, Within(0.0)]


def _takes(tensor: Subject, parameters: Mapping[str, Any], loops: bool) -> Footprint:
    return Footprint(element=4 * tensor.experts + 28)  # the experts as float32, the base, three sums, a delta, masks


@merge_method("ram", source="Reinforced Agent Merging, 2026", takes=_takes)
def ram(tensor: Subject, *, epsilon: Epsilon = 1e-5) -> Script:
    """W0 + the mean of those Di that change the element by more than epsilon."""
    return _mean_of_changes((1.0,) * tensor.experts, epsilon)
    yield  # no rounds


@merge_method("ramplus_tl", source="Reinforced Agent Merging, 2026", takes=_takes, rounds=(1, 1))
def ramplus_tl(
    tensor: Subject,
    *,
    epsilon: Epsilon = 1e-5,
    r: float = 0.1,
    alpha: Annotated[float, Within(0.0)] = 0.2,
) -> Script:
    """ram, but what expert i alone changes is multiplied by 1 + r min(shared/unique, alpha).

    shared and unique count the elements that the expert changes together with others, and alone.
    """
    counts = yield ExactSums(lambda rows: _counts(rows, epsilon))
    pairs = zip(counts[::2], counts[1::2], strict=True)
    # The factor of an expert that changes nothing alone is not used.
    return _mean_of_changes([1.0 + r * min(shared / max(lone, 1.0), alpha) for shared, lone in pairs], epsilon)


def _counts(rows: Rows, epsilon: float) -> list[int]:
    """The number of elements that each expert changes together with others, and alone; in the units of `exact`."""
    base = rows.base
    changed = [(expert - base).abs() > epsilon for expert in rows.experts]
    alone = _times(changed) == 1
    found = []
    for mask in changed:
        lone = int((mask & alone).sum())
        found += [(int(mask.sum()) - lone) * UNITS, lone * UNITS]
    return found


def _times(changed: Sequence[Tensor]) -> Tensor:
    """The number of experts that change each element."""
    total = changed[0].to(torch.int16)
    for mask in changed[1:]:
        total += mask
    return total


def _mean_of_changes(lone_factors: Sequence[float], epsilon: float) -> Combine:
    def combine(rows: Rows) -> Tensor:
        base = rows.base
        total, lone = torch.zeros_like(base), torch.zeros_like(base)
        count = torch.zeros_like(base)
        for expert, factor in zip(rows.experts, lone_factors, strict=True):
            delta = expert - base
            delta = torch.where(delta.abs() > epsilon, delta, 0.0)
            count += delta != 0.0
            total += delta
            lone += delta * factor  # the only summand, where it counts
        mean = total / count.clamp(min=1.0)
        return torch.where(count == 1.0, lone, mean).add_(base)

    return combine
