"""Coefficients of task arithmetic that are solved in the space of outputs: K numbers for each tensor.

With the second moments Gi of expert i's inputs, the inner product of two deltas, as expert i's texts see them, is
<Dj, Dk>_i = tr(Dj Gi Dk^T). From these K^3 numbers the coefficients follow by K equations.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from lowmem_aim.methods.linears import Gathered, Linears, deltas_of
from lowmem_aim.methods.method import Fold, Rows, Subject
from lowmem_aim.methods.solved import Moments, shares_of
from lowmem_aim.system.on_demand import torch

if TYPE_CHECKING:
    from torch import Tensor

RIDGE = 1e-4  # of the mean of the diagonal


def solved_coefficients(tensor: Subject) -> Generator[Fold, Any, tuple[float, ...]]:
    """The coefficients a that minimise sum_i |(sum_j aj Dj - Di) Xi^T|^2 / |Di Xi^T|^2, in one round.

    They are 1/K each for what is no linear, or has no text reach it.
    """
    mean = shares_of((1.0,) * tensor.experts)
    if not tensor.linear or tensor.moments is None or tensor.space is None:
        return mean
    linears = Linears.of(tensor)
    if linears.transposed:
        gathered: Gathered = yield Gathered(linears, tensor.experts, tensor.space)
        sums = _Products(tensor.experts)
        for number, moments in enumerate(tensor.moments):
            for deltas in gathered.by_outputs(number):
                sums.add(_products(deltas, moments))
        return _solved(sums.finish()) or mean
    found = yield _ProductsOfRows(linears, tensor.moments, tensor.experts)
    return _solved(found) or mean


class _Products:
    """Sums of the inner products of all pairs of deltas, for each expert's texts."""

    def __init__(self, experts: int) -> None:
        self._total = torch.zeros(experts, experts, experts, dtype=torch.float64)

    def add(self, part: Tensor) -> None:
        self._total += part

    def finish(self) -> Tensor:
        return self._total


class _ProductsOfRows(_Products):
    """The same as a fold over tiles of rows."""

    def __init__(self, linears: Linears, moments: Sequence[Moments], experts: int) -> None:
        super().__init__(experts)
        self._linears, self._moments = linears, moments

    def part(self, rows: Rows) -> Tensor:
        return _products(deltas_of(rows), self._moments[self._linears.place(rows)[0]])


def _products(deltas: Sequence[Tensor], moments: Moments) -> Tensor:
    """<Dj, Dk>_i over some rows: (experts i, experts j, experts k) float64 on the CPU."""
    count = len(deltas)
    found = torch.zeros(count, count, count, dtype=torch.float64)
    for i, moment in enumerate(moments):
        if moment is not None:
            for j, product in enumerate(_times(deltas, moment)):
                for k in range(count):
                    found[i, j, k] = float((product * deltas[k]).sum(dtype=torch.float32))
    return found


def _times(deltas: Sequence[Tensor], moment: Any) -> Iterator[Tensor]:
    for delta in deltas:
        product = torch.zeros_like(delta)
        moment.times(delta, product)
        yield product


def _solved(products: Tensor) -> tuple[float, ...] | None:
    """The coefficients; None if no text sees any delta."""
    count = len(products)
    left, right = torch.zeros(count, count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
    for i in range(count):
        whole = products[i, i, i]
        if float(whole) > 0.0:
            left += (products[i] + products[i].T) / 2 / whole
            right += products[i, :, i] / whole
    mean = float(left.diagonal().mean())
    if mean <= 0.0:
        return None
    left.diagonal().add_(RIDGE * mean)
    return tuple(torch.linalg.solve(left, right).tolist())
