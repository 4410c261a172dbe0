"""Sums that do not depend on order, slicing, thread count or device: every sum is exact, and rounded once at the end.

A float64 term is cut into pieces, each a small multiple of a power of two 2^s. Adding and subtracting 1.5 * 2^(52+s)
cuts off such a piece; CHUNK pieces add up in float64 without any rounding, in whatever order; the pieces' sums are
collected in one Python integer, in units of 2^-1074, the smallest float64. Two or three cuts exhaust ordinary weights.
(A scale fixed by dtype and element count, with int64 sums, would only do for a narrow range: bfloat16 reaches from
1e-38 to 3e38, so a scale that cannot overflow would round every real delta to zero.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from lowmem_aim.methods.method import Rows
from lowmem_aim.system.on_demand import torch

if TYPE_CHECKING:
    from torch import Tensor

PIECE_BITS = 30
# 2^22 pieces below 2^30 units stay below 2^52 units, with one bit to spare for pieces rounded up.
CHUNK = 1 << 22
_UNIT = 1074  # units of 2^-1074
UNITS = 1 << _UNIT  # in 1, for counts among the sums


def exact_sum(terms: Tensor) -> int:
    """The sum of finite float64 `terms` (any shape, overwritten) as an integer in units of 2^-1074.

    Raises ValueError for a term that is not finite.
    """
    flat = terms.reshape(-1)
    return sum(_chunk_sum(flat[first : first + CHUNK]) for first in range(0, flat.numel(), CHUNK))


def _chunk_sum(rest: Tensor) -> int:
    total = 0
    while rest.numel() and (largest := float(rest.abs().amax())) != 0.0:
        if not math.isfinite(largest):
            raise ValueError("an exact sum needs finite terms")
        # Every |term| < 2^(s + PIECE_BITS): the first piece takes its PIECE_BITS leading bits.
        s = max(math.frexp(largest)[1] - PIECE_BITS, -_UNIT)
        if s + 53 > 1023:  # the cutter would overflow: such terms are rare, and Python sums them exactly
            return total + sum(_units(term) for term in rest.tolist())
        cutter = math.ldexp(1.5, 52 + s)
        piece = rest.add(cutter).sub_(cutter)
        total += _units(float(piece.sum()))
        rest.sub_(piece)
    return total


def _units(value: float) -> int:
    numerator, denominator = value.as_integer_ratio()
    return numerator * ((1 << _UNIT) // denominator)


def to_float(units: int) -> float:
    """The float64 nearest to a number of units of 2^-1074. Raises ValueError beyond the range of float64."""
    try:
        return units / (1 << _UNIT)  # Python rounds the quotient of integers correctly
    except OverflowError:
        raise ValueError("a sum is beyond the range of float64") from None


class ExactSums:
    """A fold of exact sums over the whole tensor, several at a time; the result is a list of floats."""

    def __init__(self, sums: Callable[[Rows], Sequence[int]]) -> None:
        """Sum up what `sums(rows)` gives for each slice: its own sums, as from `exact_sum`."""
        self._sums = sums
        self._totals: list[int] = []

    def part(self, rows: Rows) -> Sequence[int]:
        """The sums of one slice."""
        return self._sums(rows)

    def add(self, part: Sequence[int]) -> None:
        """Add the sums of one slice to the totals."""
        self._totals = [a + b for a, b in zip(self._totals or [0] * len(part), part, strict=True)]

    def finish(self) -> list[float]:
        """The totals, each rounded once to float64."""
        return [to_float(total) for total in self._totals]


def wide(x: Tensor) -> Tensor:
    """A float64 copy of the float32 tensor `x`; on the CPU if the device has no float64 (Apple's GPUs)."""
    return (x.cpu() if x.device.type == "mps" else x).to(torch.float64)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """The terms of a dot product of two float32 tensors; float64 holds each of them exactly."""
    return wide(a).mul_(wide(b))
