"""SCE (Select, Calculate, Erase): experts weighted by their share of the selected change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from lowmem_aim.methods.counting import Magnitudes, first_by_size, footprint_of_first
from lowmem_aim.methods.exact import UNITS, ExactSums, exact_sum, wide
from lowmem_aim.methods.footprint import Footprint
from lowmem_aim.methods.gram import vectors
from lowmem_aim.methods.method import Combine, Rows, Script, Subject, Within, merge_method
from lowmem_aim.methods.selection import ALL, NONE, Largest
from lowmem_aim.system.on_demand import torch

if TYPE_CHECKING:
    from torch import Tensor

LEAST = 1e-6  # smaller sums of weights count as 0


def _takes(tensor: Subject, parameters: Mapping[str, Any], loops: bool) -> Footprint:
    # The deltas in float32 and float64, their mean and variance; the bits of the variances, while they are counted.
    deltas = Footprint(element=max(12 * tensor.experts + 32, 72))
    if parameters["select_topk"] >= 1.0:
        return deltas
    return deltas | footprint_of_first(tensor.numel, 1, 1)


@merge_method("sce", source="arXiv 2408.07990", takes=_takes, rounds=(1, 6))
def sce(
    tensor: Subject,
    *,
    select_topk: Annotated[float, Within(0.0, 1.0)] = 1.0,
    int8_mask: bool = False,  # mergekit's memory saver; has no effect on the result
) -> Script:
    """W0 + sum wi Di / sum wi over the experts that have the elected sign, wi the mean of Di^2 as a share of all.

    Only those positions of each Di count at which the experts differ most: the int(select_topk times the number of
    positions at which they differ at all) largest variances over the experts. If there are none, the result is the
    base.
    """
    selection = ALL
    if select_topk < 1.0:
        (differing,) = yield ExactSums(lambda rows: [int((_variance(rows) > 0.0).sum()) * UNITS])
        k = int(select_topk * int(differing))
        # Variances of 0 are the smallest, so the k largest of those that differ are the k largest of all.
        (selection,) = yield from first_by_size(tensor.numel, [(0, k)], _Variance())
    if selection == NONE:
        return lambda rows: rows.base.clone()
    squares = yield ExactSums(lambda rows: _squares(rows, selection))
    return _merged(_shares(squares, tensor.numel), selection)


def _variance(rows: Rows) -> Tensor:  # float32
    """The biased variance over the experts of each element. In float64, equal deltas have one of exactly 0."""
    deltas = [wide(delta) for delta in vectors(rows, deltas=True)]
    mean = deltas[0].clone()
    for delta in deltas[1:]:
        mean += delta
    mean /= len(deltas)
    total = torch.zeros_like(mean)
    for delta in deltas:
        total += delta.sub_(mean).square_()
    return (total / len(deltas)).to(torch.float32)


class _Variance(Magnitudes):
    def bits(self, rows: Rows, which: int) -> Tensor:
        return _variance(rows).view(torch.int32).view(-1)


def _selected(rows: Rows, selection: Largest) -> list[Tensor]:
    """The deltas at the selected positions, 0 elsewhere."""
    deltas = vectors(rows, deltas=True)
    mask = None if selection == ALL else selection.mask(_variance(rows), rows.start)
    if mask is None:
        return deltas
    mask = mask.to(deltas[0].device)
    return [torch.where(mask, delta, 0.0) for delta in deltas]


def _squares(rows: Rows, selection: Largest) -> list[int]:
    return [exact_sum(wide(delta).square_()) for delta in _selected(rows, selection)]


def _shares(squares: Sequence[float], numel: int) -> list[float]:
    means = [total / numel for total in squares]
    total = sum(means)
    return [mean / total if total >= LEAST else 1.0 / len(means) for mean in means]


def _merged(shares: Sequence[float], selection: Largest) -> Combine:
    def combine(rows: Rows) -> Tensor:
        deltas = _selected(rows, selection)
        sign = deltas[0].clone()
        for delta in deltas[1:]:
            sign += delta
        positive = sign >= 0.0
        total, divisor = torch.zeros_like(sign), torch.zeros_like(sign)
        for delta, share in zip(deltas, shares, strict=True):
            agrees = torch.where(positive, delta > 0.0, delta < 0.0)  # a zero agrees with neither
            total += torch.where(agrees, delta * share, 0.0)
            divisor += agrees * share
        return (total / divisor.clamp_(min=LEAST)).add_(rows.base)

    return combine
