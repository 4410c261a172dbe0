"""The common tail of the task-vector family.

Deltas (task vectors) Di = Wi - W0, sparsified -> Vi = wi Di -> if signs are elected, per element only the Vi of the
elected sign stay -> sum -> if `normalize`, divided by the weights that took part -> times lambda -> + W0.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lowmem_aim.methods import kernels
from lowmem_aim.methods.exact import ExactSums, exact_sum, wide
from lowmem_aim.methods.footprint import Footprint
from lowmem_aim.methods.gram import footprint_of_gram
from lowmem_aim.methods.linear import ZERO_WEIGHT, weighted_sum
from lowmem_aim.methods.method import Combine, Fold, Rescale, Rows, Subject
from lowmem_aim.methods.selection import Everything, Selection
from lowmem_aim.system.on_demand import torch

if TYPE_CHECKING:
    from torch import Tensor


def takes_deltas(tensor: Subject, parameters: Mapping[str, Any], loops: bool) -> Footprint:
    """The memory of `rescale_factors` and `combine_deltas`: in torch a float32 copy and a part of each expert."""
    if loops:
        return Footprint(element=4, slice=2 * kernels.BINS_BYTES)
    return Footprint(element=max(8 * tensor.experts + 16, 4 * tensor.experts + 28, 34))


def takes_span(tensor: Subject, parameters: Mapping[str, Any], loops: bool) -> Footprint:
    """The memory of a round of dot products among the models or deltas, and of `span`."""
    return footprint_of_gram(tensor.experts, loops) | takes_deltas(tensor, parameters, loops)


def rescale_factors(
    selections: Sequence[Selection], density: Sequence[float], rescale: Rescale
) -> Generator[Fold, Any, tuple[float, ...]]:
    """The factor of each sparsified delta: |D|_1 / |kept|_1 (one round), 1 / density, or 1."""
    if rescale is False or all(d >= 1.0 for d in density):
        return (1.0,) * len(density)
    if rescale == "density":
        return tuple(1.0 / d if d > 0.0 else 1.0 for d in density)

    def sums(rows: Rows) -> list[int]:
        return [total for i, chosen in enumerate(selections) for total in _absolute_sums(rows, i, chosen)]

    found = yield ExactSums(sums)
    pairs = zip(found[::2], found[1::2], strict=True)
    return tuple(whole / kept if kept > 0.0 else 1.0 for whole, kept in pairs)


def _absolute_sums(rows: Rows, expert: int, selection: Selection) -> tuple[int, int]:
    """Exact |D|_1 and |kept|_1 of one expert's slice."""
    stored = rows.stored_experts[expert]
    kept = selection.kept(rows.start, stored.numel())
    if kept and kernels.usable(rows.stored_experts):
        return kernels.absolute_sums(rows.stored_base, stored, kept)
    delta = stored.to(torch.float32) - rows.base
    stays = _masked(delta, selection.mask(delta, rows.start))
    return exact_sum(wide(delta.abs())), exact_sum(wide(stays.abs()))


def combine_deltas(
    selections: Sequence[Selection],
    weight: Sequence[float],
    factor: Sequence[float],  # from `rescale_factors`; not part of the divisor
    *,
    normalize: bool,
    lambda_: float,
    elect: bool,
) -> Combine:
    """The combine of the whole family: W0 + lambda times the sum of the sparsified, weighted deltas."""
    scales = [w * f for w, f in zip(weight, factor, strict=True)]
    # With an election each element has its own divisor; without one the divisor is a single number.
    share = 1.0 / _safe(sum(weight)) if normalize and not elect else 1.0

    def compiled(rows: Rows) -> Tensor | None:
        kept = [selection.kept(rows.start, rows.stored_base.numel()) for selection in selections]
        whole = [numbers for numbers in kept if numbers]
        if len(whole) < len(kept) or not kernels.usable(rows.stored_experts):
            return None
        return kernels.combine_deltas(
            rows.stored_base,
            rows.stored_experts,
            whole,
            scales,
            weight,
            elect=elect,
            per_element=elect and normalize,
            factor=share,
            lambda_=lambda_,
            zero_weight=ZERO_WEIGHT,
        )

    def combine(rows: Rows) -> Tensor:
        result = compiled(rows)
        if result is not None:
            return result
        base = rows.base
        parts = [_part(e - base, s, scale, rows) for e, s, scale in zip(rows.experts, selections, scales, strict=True)]
        merged = _sum(parts)
        if elect:
            merged, divisor = _elected(parts, merged, weight)
            if normalize:
                merged /= divisor.masked_fill_(divisor.abs() < ZERO_WEIGHT, 1.0)
        return merged.mul_(share).mul_(lambda_).add_(base)

    return combine


def span(shares: Sequence[float], based: bool) -> Combine:
    """The combine of the geometric methods: W0 + sum si Di, or without a base sum si Wi."""
    if based:
        everything, ones = (Everything(),) * len(shares), (1.0,) * len(shares)
        return combine_deltas(everything, shares, ones, normalize=False, lambda_=1.0, elect=False)
    return lambda rows: weighted_sum(rows.stored_experts, tuple(shares))


def _part(delta: Tensor, selection: Selection, scale: float, rows: Rows) -> Tensor:
    """An expert's part of the sum: the elements of its delta (overwritten) that stay, scaled; zero elsewhere."""
    mask = selection.mask(delta, rows.start)
    return _masked(delta.mul_(scale), mask)


def _masked(delta: Tensor, mask: Tensor | None) -> Tensor:
    return delta if mask is None else torch.where(mask, delta, 0.0)


def _sum(parts: Sequence[Tensor]) -> Tensor:
    """V1 + V2 + ..., in model order; a new tensor."""
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total


def _elected(parts: Sequence[Tensor], total: Tensor, weight: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Per element, the sum of the Vi with the elected sign, and the sum of their weights.

    The elected sign is that of `total`, + where that is 0.
    """
    positive = total >= 0.0
    elected = torch.zeros_like(total)
    divisor = torch.zeros_like(total)
    for part, w in zip(parts, weight, strict=True):
        agrees = torch.where(positive, part > 0.0, part < 0.0)  # a zero agrees with neither
        elected += torch.where(agrees, part, 0.0)
        divisor += agrees * w
    return elected, divisor


def _safe(divisor: float) -> float:
    return divisor if abs(divisor) >= ZERO_WEIGHT else 1.0
