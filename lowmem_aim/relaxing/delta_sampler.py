"""An estimate of how much of a tensor's delta a relaxation has left, from a sample of the tensor's elements."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lowmem_aim.methods.exact import exact_sum, to_float
from lowmem_aim.planning.tasks import Task

if TYPE_CHECKING:
    from torch import Tensor

# Elements of a tensor in the sample, evenly spread over rows and columns.
SAMPLED_ELEMENTS = 1 << 16


class DeltaSampler:
    """Sums of |delta| before and after relaxation, over a sample of one tensor's elements.

    The sums do not depend on how the tensor is cut into slices: elements are sampled by their place in the tensor, and
    sums are exact.
    """

    def __init__(self, task: Task) -> None:
        columns = task.shape[-1] if task.shape else 1
        step = max(1, math.prod(task.shape) // SAMPLED_ELEMENTS)
        while math.gcd(step, columns) > 1:  # else some channels would never be looked at
            step += 1
        self._step = step
        self._sums = (0, 0)

    def of(self, rows: Tensor, base: Tensor, start: int) -> int:
        """One slice's part of a sum, in the units of `methods.exact`.

        `rows` are merged or relaxed, `base` the base's, both (rows, columns); `start` is the flat index of the first
        element.
        """
        looked_at = slice(-start % self._step, None, self._step)
        delta = rows.reshape(-1)[looked_at].float() - base.reshape(-1)[looked_at].float()
        return exact_sum(delta.cpu().double().abs())

    def add(self, before: int, after: int) -> None:
        """Add one slice's parts of the two sums."""
        self._sums = (self._sums[0] + before, self._sums[1] + after)

    def sums(self) -> tuple[float, float]:
        """(before, after), extrapolated from the sampled elements to the whole tensor."""
        before, after = map(to_float, self._sums)
        return before * self._step, after * self._step
