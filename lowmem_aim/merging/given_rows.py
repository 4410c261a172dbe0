"""Rows of embeddings and heads that stand where a model has none: other models' rows, their means, zeros.

Which rows these are follows from the tokens: see `models.token_rows`. All work is on slices; of a whole embedding only
sums are taken, row after row, so that slices of any size give the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from lowmem_aim.system.on_demand import torch

if TYPE_CHECKING:
    from torch import Tensor

Piece = tuple[int, "Tensor"]  # (place among the rows that were asked for, rows as stored)
MEAN_ELEMENTS = 1 << 16  # of the rows that are read at a time to be summed up


class GivenRows:
    """The rows that models take where they have none of their own, put together from the models that have them."""

    def __init__(self, dtype: torch.dtype, columns: int) -> None:
        """Make rows of `dtype`: float32, unless each given row is one model's, and all models have the same dtype."""
        self.dtype = dtype
        self._columns = columns

    def assembled(self, parts: Sequence[Sequence[Piece]], count: int) -> Tensor:
        """The given rows, (count, columns): the mean of what each part has at a place, in the order of the parts."""
        rows = torch.zeros(count, self._columns, dtype=self.dtype)
        givers = torch.zeros(count, 1, dtype=torch.int64)
        for place, part in (piece for pieces in parts for piece in pieces):
            rows[place : place + len(part)] += part.to(self.dtype)
            givers[place : place + len(part)] += 1
        shared = givers.flatten() > 1
        if bool(shared.any()):
            rows[shared] /= givers[shared]
        return rows


def mean_row(read: Callable[[int, int], Tensor], count: int, columns: int) -> Tensor:
    """The mean of the first `count` rows that `read(start, stop)` gives. (columns,) float32.

    Rows are added one after another in float64, whatever the number that is read at a time.
    """
    total = torch.zeros(columns, dtype=torch.float64)
    step = max(1, MEAN_ELEMENTS // max(columns, 1))
    for start in range(0, count, step):
        for row in read(start, min(start + step, count)).to(torch.float64):
            total += row
    return (total / max(count, 1)).to(torch.float32)
