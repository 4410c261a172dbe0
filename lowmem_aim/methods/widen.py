"""WIDEN: each expert's delta scaled column by column, by how much its magnitude and its direction stand out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lowmem_aim.methods import kernels
from lowmem_aim.methods.columns import Columns, Panel, column_dots, footprint_of_columns
from lowmem_aim.methods.footprint import Footprint
from lowmem_aim.methods.gram import row_dots
from lowmem_aim.methods.method import Combine, Rows, Script, Subject, merge_method
from lowmem_aim.system.on_demand import numpy as np
from lowmem_aim.system.on_demand import torch

if TYPE_CHECKING:
    from torch import Tensor


def _takes(tensor: Subject, parameters: Mapping[str, Any], loops: bool) -> Footprint:
    experts, numel = tensor.experts, max(tensor.numel, 1)
    combine = Footprint(element=4 if loops else 20)
    if len(tensor.shape) < 2:
        return combine | Footprint(element=12 * experts + 16, part=0, tensor=88 * experts * numel)
    # Float64 numbers of each expert for each channel: ten while changes are ranked and scored, besides the sums.
    sums = 8 * (1 + 2 * experts)
    if _by_row(tensor):
        rows = numel // max(tensor.shape[-1], 1)
        own = Footprint(element=24 + 3 * sums // max(tensor.shape[-1], 1), tensor=(sums + 88 * experts) * rows)
        return combine | own
    columns = numel // max(tensor.shape[-2], 1)
    found = footprint_of_columns(columns, experts, loops)
    return combine | found | Footprint(tensor=(sums + 88 * experts) * columns)


@merge_method("widen", source="arXiv 2408.03092", compiled=True, takes=_takes, rounds=(1, 2))
def widen(tensor: Subject, *, above_average_value_ratio: float = 1.0, score_calibration_value: float = 1.0) -> Script:
    """W0 + sum si,j Di,j over the columns j, one for each input channel: si,j is the mean of two scores, of the change
    of the column's norm and of its direction. A score is the softmax over the experts of the change's rank among the
    columns, in [0, 1); where that is more than `above_average_value_ratio` times the mean rank, it is
    `score_calibration_value`. 1-D tensors: the same of abs(Di), element by element, without ranks.

    Embeddings have a column for each token. In a stack of experts each matrix is taken by itself.
    """
    by_row = _by_row(tensor)

    def scores(values: Tensor, means: Any) -> Tensor:
        return _scores(values.numpy(), above_average_value_ratio * means, score_calibration_value)

    if len(tensor.shape) < 2:
        changes = yield _Rows(_magnitudes, tensor.experts, tensor.numel)
        means = np.array([[math.fsum(row) / len(row)] for row in changes.tolist()])
        return _combine(scores(changes, means), by_row, tensor)
    if by_row:
        sums = yield _Rows(_row_products, 1 + 2 * tensor.experts, tensor.numel // max(tensor.shape[-1], 1))
        found = Columns(sums[0], sums[1 : 1 + tensor.experts], sums[1 + tensor.experts :])
        length = tensor.shape[-2]
    else:
        length = tensor.shape[-1]
        found = yield from column_dots(
            lambda rows: _panels(tensor, rows),
            tensor.numel // tensor.shape[-2],
            tensor.shape[-2],
            tensor.experts,
            deltas=True,
        )
    # The mean rank is known; a sum's rounding would decide whether the column in the middle is above it.
    both = [scores(_ranks(changes, length), (length - 1) / 2 / length) for changes in _changes(found)]
    return _combine((both[0] + both[1]) / 2, by_row, tensor)


def _by_row(tensor: Subject) -> bool:
    """Whether each row has a scale, and not each column."""
    return tensor.input_dim == -2 or len(tensor.shape) < 2


# --- what is measured -------------------------------------------------------------------------------------------------


class _Rows:
    """A fold of what a function measures for each row of the slices: (numbers, rows) float64."""

    def __init__(self, measure: Callable[[Rows], Tensor], numbers: int, rows: int) -> None:
        self.part = measure
        # Of all rows from the start: many small parts would leave holes in the heap.
        self._whole = torch.empty(numbers, rows, dtype=torch.float64)
        self._done = 0

    def add(self, part: Tensor) -> None:
        first, self._done = self._done, self._done + part.shape[1]
        self._whole[:, first : self._done] = part

    def finish(self) -> Tensor:
        return self._whole


def _magnitudes(rows: Rows) -> Tensor:  # (K, rows) float64
    base = rows.base
    return torch.stack([(expert - base).abs().flatten().cpu() for expert in rows.experts]).to(torch.float64)


def _row_products(rows: Rows) -> Tensor:  # (1 + 2K, rows) float64: a a, all d d, all a d
    base = rows.base
    squares, across = [row_dots(base, base)], []
    for stored in rows.stored_experts:
        delta = stored.to(torch.float32) - base
        squares.append(row_dots(delta, delta))
        across.append(row_dots(delta, base))
    return torch.stack([*squares, *across]).cpu()


def _panels(tensor: Subject, rows: Rows) -> Iterator[Panel]:
    """The panels of a slice; each matrix of a stack has columns of its own."""
    for matrix, start, stop in _matrices(tensor, rows):
        experts = tuple(expert[start:stop] for expert in rows.stored_experts)
        yield Panel(matrix * tensor.shape[-1], rows.stored_base[start:stop], experts)


def _matrices(tensor: Subject, rows: Rows) -> Iterator[tuple[int, int, int]]:
    """(number of the matrix, start, stop) of the parts of a slice that lie in different matrices."""
    height = tensor.shape[-2]
    first, start = rows.start // max(tensor.shape[-1], 1), 0
    while start < rows.count:
        matrix, place = divmod(first + start, height)
        stop = min(rows.count, start + height - place)
        yield matrix, start, stop
        start = stop


# --- what follows from it, on the host in float64 ---------------------------------------------------------------------
# In bfloat16 most changes would tie, and their ranks would be the order of the columns.


def _changes(sums: Columns) -> tuple[Tensor, Tensor]:  # (K, columns) each
    """The change that each expert makes to the norm of a column, and 1 - cosine between the two columns.

    From a and d, not from a and a + d, whose nearly equal norms would leave few digits of their difference.
    """
    own = sums.aa.sqrt()
    theirs = (sums.aa + 2.0 * sums.ad + sums.dd).clamp(min=0.0).sqrt()
    both = own + theirs
    of_norm = (2.0 * sums.ad + sums.dd).abs() / torch.where(both > 0.0, both, 1.0)
    product, inner = own * theirs, sums.aa + sums.ad
    sharp = (sums.aa * sums.dd - sums.ad**2).clamp(min=0.0) / torch.where(product > 0.0, product, 1.0)
    sharp = sharp / torch.where(product > 0.0, product + inner.clamp(min=0.0), 1.0)
    of_direction = torch.where(inner >= 0.0, sharp, 1.0 - inner / torch.where(product > 0.0, product, 1.0))
    return of_norm, torch.where(product > 0.0, of_direction, 0.0)


def _ranks(changes: Tensor, length: int) -> Tensor:
    """The ranks among the `length` columns of a matrix and model, as shares in [0, 1); equal changes in order."""
    each = changes.reshape(len(changes), -1, length)
    order = each.argsort(dim=-1, stable=True)
    ranks = torch.empty_like(each)
    shares = torch.arange(length, dtype=torch.float64) / length
    return ranks.scatter_(-1, order, shares.expand(each.shape)).reshape(changes.shape)


def _scores(values: Any, tops: Any, calibrated: float) -> Tensor:  # (K, n) float64
    """The softmax over the K rows; `calibrated` where a value is above its row's top."""
    powers = np.exp(values - values.max(axis=0, keepdims=True))
    shares = powers / sum(powers)
    return torch.from_numpy(np.where(values > tops, calibrated, shares))


def _combine(scores: Tensor, by_row: bool, tensor: Subject) -> Combine:
    scores = scores.to(torch.float32)

    def combine(rows: Rows) -> Tensor:
        width = rows.stored_base.shape[1]
        if by_row:
            first = rows.start // width
            return _scaled(rows.stored_base, rows.stored_experts, scores[:, first : first + rows.count], by_row=True)
        parts = [
            _scaled(panel.first, panel.others, scores[:, panel.place : panel.place + width], by_row=False)
            for panel in _panels(tensor, rows)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    return combine


def _scaled(base: Tensor, experts: Sequence[Tensor], scales: Tensor, *, by_row: bool) -> Tensor:
    """W0 + sum si Di."""
    if kernels.usable([base]):
        return kernels.scaled_deltas(base, experts, scales, by_row)
    wide = base.to(torch.float32)
    scales = scales.to(base.device)
    scales = scales[:, :, None] if by_row else scales[:, None, :]
    total = (experts[0].to(torch.float32) - wide) * scales[0]
    for expert, scale in zip(experts[1:], scales[1:], strict=True):
        total += (expert.to(torch.float32) - wide) * scale
    return total.add_(wide)
