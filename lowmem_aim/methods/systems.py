"""Linear systems of n_in unknowns whose matrix is a weighted sum of second moments: factorised, and solved for rows.

Everything is computed in tiles, in an order that follows from the size of the matrix alone (see `moments`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lowmem_aim.methods.moments import MatrixSpace, Moment, Place, Tiles
from lowmem_aim.system.on_demand import torch

if TYPE_CHECKING:
    from torch import Tensor


class NotPositive(Exception):
    """The matrix of a system is singular, or not finite."""


@dataclass(frozen=True)
class Term:
    """A symmetric matrix that is made of a moment M: scale M + diag(extra)."""

    moment: Moment
    scale: float
    extra: Tensor | None = None  # (size,) float32 on the device

    def tile(self, place: Place) -> Tensor | None:
        """A tile on or below the diagonal; None if it is zero."""
        tile = self.moment.get(place)
        if tile is None:
            return None
        tile = tile * self.scale
        if self.extra is not None and place[0] == place[1]:
            tile.diagonal().add_(self.extra[self.moment.span(place[0])])
        return tile

    def times(self, rows: Tensor, into: Tensor) -> None:
        """Add rows times this matrix to `into`; both (rows, size) float32 on the device."""
        if self.extra is not None:
            into += rows * self.extra
        self.moment.times(rows * self.scale, into)


class System:
    """The matrix A = sum of terms + ridge I as its Cholesky factor L: A = L L^T."""

    def __init__(self, terms: Sequence[Term], ridge: float, space: MatrixSpace) -> None:
        """Factorise. Raises NotPositive if the matrix is singular or not finite, DiskError."""
        self._lower = Tiles(terms[0].moment.size, space)
        self._terms, self._ridge, self._space = terms, ridge, space
        for column in range(self._lower.side):
            self._factorise((column, column))
            space.each(self._factorise, [(row, column) for row in range(column + 1, self._lower.side)])
        self._terms = ()

    def _factorise(self, place: Place) -> None:
        """Put a tile of the factor; all to its left, and that on the diagonal above it, are there."""
        row, column = place
        lower, tile = self._lower, self._tile(place)
        for before in range(column):
            tile.addmm_(_there(lower, (row, before)), _there(lower, (column, before)).T, alpha=-1.0)
        if row > column:
            above = _there(lower, (column, column))
            lower.put(place, torch.linalg.solve_triangular(above.T, tile, upper=True, left=False))
            return
        factor, failed = torch.linalg.cholesky_ex(tile)
        if int(failed) or not bool(factor.isfinite().all()):
            raise NotPositive
        lower.put(place, factor)

    def _tile(self, place: Place) -> Tensor:
        """A tile of A, which may be written to."""
        rows, columns = (self._lower.span(part) for part in place)
        whole = torch.zeros(rows.stop - rows.start, columns.stop - columns.start, device=self._space.device)
        for term in self._terms:
            tile = term.tile(place)
            if tile is not None:
                whole += tile
        if place[0] == place[1]:
            whole.diagonal().add_(self._ridge)
        return whole

    def solve(self, rows: Tensor) -> Tensor:
        """Turn `rows`, (rows, size) float32 on the device, which is overwritten, into rows A^-1. Raises DiskError."""
        lower = self._lower
        for place in range(lower.side):
            here = rows[:, lower.span(place)]
            for before in range(place):
                here.addmm_(rows[:, lower.span(before)], _there(lower, (place, before)).T, alpha=-1.0)
            here.copy_(torch.linalg.solve_triangular(_there(lower, (place, place)).T, here, upper=True, left=False))
        for place in reversed(range(lower.side)):
            here = rows[:, lower.span(place)]
            for after in range(place + 1, lower.side):
                here.addmm_(rows[:, lower.span(after)], _there(lower, (after, place)), alpha=-1.0)
            here.copy_(torch.linalg.solve_triangular(_there(lower, (place, place)), here, upper=False, left=False))
        return rows


def _there(tiles: Tiles, place: Place) -> Tensor:
    tile = tiles.get(place)
    assert tile is not None, "a factor has all tiles"
    return tile
