"""Dot products of columns, whose elements lie in many slices: independent of order, with 64 bits a column.

A first round finds the largest magnitude of each column. These give a power of two for each product, so that the terms,
rounded to multiples of it, add up as integers without overflow in any order: the largest possible term is 2^50 such
multiples (fewer in columns of more than 2^11 elements), which is nearly float64's own accuracy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lowmem_aim.methods import kernels
from lowmem_aim.methods.exact import dot
from lowmem_aim.methods.footprint import Footprint
from lowmem_aim.methods.method import Fold, Rows
from lowmem_aim.system.on_demand import numpy as np
from lowmem_aim.system.on_demand import torch

if TYPE_CHECKING:
    from torch import Tensor

TERM_BITS = 50  # 1.5 * 2^52 units hold a term of 2^51 units with its sign
_SUM_BITS = 62


@dataclass(frozen=True)
class Panel:
    """A part of a slice: `width` columns, of which the first is column `place` of all that are summed."""

    place: int
    first: Tensor  # (rows, width)
    others: tuple[Tensor, ...]  # K of the same shape


@dataclass(frozen=True)
class Columns:
    """Sums over each column, float64, of the products of the first vector a and the others d."""

    aa: Tensor  # (columns,)
    dd: Tensor  # (K, columns)
    ad: Tensor  # (K, columns)


def footprint_of_columns(columns: int, others: int, loops: bool) -> Footprint:
    """The memory that `column_dots` takes: tops, exponents, cutters, totals; in torch vectors and terms."""
    tops, totals = 1 + others, 1 + 2 * others
    return Footprint(
        element=0 if loops else 4 * others + 32,
        slice=(4 * tops + 3 * 8 * totals) * columns,
        part=8 * totals * columns,
        tensor=(12 * tops + 6 * 8 * totals) * columns,
    )


def column_dots(
    panels: Callable[[Rows], Iterator[Panel]],
    columns: int,
    height: int,  # elements of a column
    others: int,  # K
    *,
    deltas: bool,  # d are not the others themselves but what they differ from the first by
) -> Generator[Fold, Any, Columns]:
    """The sums of a a, d d and a d over each column, in two rounds."""
    tops = yield _Tops(panels, columns, others, deltas)
    exponents = torch.frexp(tops).exponent.to(torch.int64)  # each magnitude is below 2^exponent
    pairs = [exponents[0] * 2]
    for other in exponents[1:]:
        pairs += [other * 2, exponents[0] + other]
    bits = min(TERM_BITS, _SUM_BITS - max(height - 1, 1).bit_length())
    units = torch.stack(pairs) - bits
    totals = yield _Totals(panels, _ldexp(torch.full(units.shape, 1.5), units + 52), deltas)
    sums = _ldexp(totals, units)
    return Columns(sums[0], sums[1::2], sums[2::2])


def _ldexp(values: Tensor, exponents: Tensor) -> Tensor:
    """values * 2^exponents in float64; torch's own function goes through float32 powers."""
    return torch.from_numpy(np.ldexp(values.to(torch.float64).numpy(), exponents.numpy()))


class _ByPlace:
    """A fold that joins values for every column from the panels of the slices."""

    def __init__(self, whole: Tensor) -> None:
        self._whole = whole

    def join(self, before: Tensor, part: Tensor) -> Tensor:
        raise NotImplementedError

    def add(self, parts: Sequence[tuple[int, Tensor]]) -> None:
        for place, part in parts:
            here = self._whole[:, place : place + part.shape[1]]
            here.copy_(self.join(here, part))

    def finish(self) -> Tensor:
        return self._whole


class _Tops(_ByPlace):
    """A fold of the largest magnitudes, (1 + K, columns) float32."""

    def __init__(self, panels: Callable[[Rows], Iterator[Panel]], columns: int, others: int, deltas: bool) -> None:
        super().__init__(torch.zeros(1 + others, columns))
        self._panels, self._deltas = panels, deltas

    def part(self, rows: Rows) -> list[tuple[int, Tensor]]:
        return [(panel.place, self._tops(panel)) for panel in self._panels(rows)]

    def _tops(self, panel: Panel) -> Tensor:
        if kernels.usable([panel.first]):
            return kernels.column_tops(panel.first, panel.others, self._deltas)
        return torch.stack([vector.abs().amax(dim=0) for vector in _vectors(panel, self._deltas)]).cpu()

    def join(self, before: Tensor, part: Tensor) -> Tensor:
        return torch.maximum(before, part)


class _Totals(_ByPlace):
    """A fold of the sums in units, (1 + 2K, columns) int64: of a a, and for each other of d d and a d."""

    def __init__(self, panels: Callable[[Rows], Iterator[Panel]], cutters: Tensor, deltas: bool) -> None:
        """Sum up the terms that `cutters`, 1.5 * 2^52 units each, round to units."""
        super().__init__(torch.zeros(cutters.shape, dtype=torch.int64))
        self._panels, self._cutters, self._deltas = panels, cutters, deltas

    def part(self, rows: Rows) -> list[tuple[int, Tensor]]:
        return [(panel.place, self._totals(panel)) for panel in self._panels(rows)]

    def _totals(self, panel: Panel) -> Tensor:
        cutters = self._cutters[:, panel.place : panel.place + panel.first.shape[1]].contiguous()
        if kernels.usable([panel.first]):
            return kernels.column_dots(panel.first, panel.others, self._deltas, cutters)
        a, *others = _vectors(panel, self._deltas)
        pairs = [(a, a)]
        for other in others:
            pairs += [(other, other), (other, a)]
        return torch.stack([_in_units(dot(*pair), cutter) for pair, cutter in zip(pairs, cutters, strict=True)])

    def join(self, before: Tensor, part: Tensor) -> Tensor:
        return before + part


def _in_units(terms: Tensor, cutter: Tensor) -> Tensor:  # (columns,) int64
    cutter = cutter.to(terms.device)
    units = cutter / (1.5 * math.ldexp(1.0, 52))
    return ((terms + cutter).sub_(cutter) / units).to(torch.int64).sum(dim=0).cpu()


def _vectors(panel: Panel, deltas: bool) -> list[Tensor]:
    first = panel.first.to(torch.float32)
    others = [other.to(torch.float32) for other in panel.others]
    return [first, *((other - first if deltas else other) for other in others)]
