"""Carried here from relaxation.py."""

from __future__ import annotations

import math

from torch import Tensor

from lowmem_aim.methods.exact import exact_sum, to_float
from lowmem_aim.planning.tasks import Task

# How much of a delta is left is told by so many of a tensor's elements, evenly spread over rows and columns.
SAMPLED_ELEMENTS = 1 << 16


class DeltaSampler:
    """Sums of |delta| before and after it was relaxed, over the elements of one tensor that are looked at.

    The same for any slices: elements are chosen by their place in the tensor, their sums are exact.
    """

    def __init__(self, task: Task) -> None:
        columns = task.shape[-1] if task.shape else 1
        step = max(1, math.prod(task.shape) // SAMPLED_ELEMENTS)
        while math.gcd(step, columns) > 1:  # else some channels would never be looked at
            step += 1
        self._step = step
        self._sums = (0, 0)

    def of(self, rows: Tensor, base: Tensor, start: int) -> int:
        """A slice's part of a sum, in the units of `methods.exact`; `start`: place of its first element."""
        looked_at = slice(-start % self._step, None, self._step)
        delta = rows.reshape(-1)[looked_at].float() - base.reshape(-1)[looked_at].float()
        return exact_sum(delta.cpu().double().abs())

    def add(self, before: int, after: int) -> None:
        self._sums = (self._sums[0] + before, self._sums[1] + after)

    def sums(self) -> tuple[float, float]:
        """Of the whole tensor, as far as those elements tell."""
        before, after = map(to_float, self._sums)
        return before * self._step, after * self._step
