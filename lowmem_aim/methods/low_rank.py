"""Weights with a low-rank change added, W + s L R: some rows at a time, with the same bytes for any slices and threads.

Each element is computed by itself, in float64: the products L[i, k] R[k, j], which are exact, are added up in the order
of k; the sum is multiplied by s, and W[i, j] is added; if there are factors of rows or columns (DoRA), that is
multiplied by its factor; and the result is rounded to float32 once. (A float32 matrix product of one-row slices
differs from that of the whole matrix in half of its elements.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowmem_aim.methods import kernels
from lowmem_aim.methods.footprint import DOUBLE, FLOAT, Footprint
from lowmem_aim.system.on_demand import torch

if TYPE_CHECKING:
    from torch import Tensor


def with_low_rank(
    stored: Tensor,  # (rows, columns), of any float dtype
    left: Tensor,  # (rows, rank) float32
    right: Tensor,  # (rank, columns) float32
    scaling: float,
    factors: Tensor | None = None,  # (rows, 1) or (1, columns) float64
) -> Tensor:  # (rows, columns) float32
    """(stored + scaling * left right) * factors, rounded once."""
    if kernels.usable([stored]) and stored.dtype != torch.float64:
        return kernels.with_low_rank(stored, left, right, scaling, factors)
    total = torch.zeros(stored.shape, dtype=torch.float64, device=stored.device)
    for k in range(left.shape[1]):
        total += left[:, k : k + 1].to(torch.float64) * right[k].to(torch.float64)
    total = stored.to(torch.float64) + total * scaling
    return (total if factors is None else total * factors).to(torch.float32)


def add_column_squares(rows: Tensor, totals: Tensor) -> None:
    """Add the squares of (rows, columns) float32 to the (columns,) float64 totals, row by row in their order.

    The squares are exact, and the totals are the same for any slices, if these come in order.
    """
    if kernels.usable([rows]):
        kernels.add_column_squares(rows, totals)
        return
    for row in rows:
        totals += row.to(torch.float64).square()


def footprint_of_low_rank() -> Footprint:
    """The memory that `with_low_rank` takes besides its arguments and its result."""
    return Footprint(slice=kernels.BLOCK_BYTES) if kernels.available() else Footprint(element=4 * DOUBLE + FLOAT)
