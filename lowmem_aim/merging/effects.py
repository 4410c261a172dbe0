"""An estimate of what a merge keeps of each expert's effect on its own texts, from some outputs of one tensor.

An expert's effect is what its delta adds to a linear's outputs: Di x for its own inputs x, whose second moment is Gi.
Of that the merge, with its delta D, keeps 1 - |(D - Di) Gi^(1/2)|^2 / |Di Gi^(1/2)|^2: 1 is all, 0 is as much as the
base has, and less than 0 is worse than that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lowmem_aim.methods.method import Rows
from lowmem_aim.methods.moments import Moment
from lowmem_aim.output.merged import Effect
from lowmem_aim.planning.tasks import Task
from lowmem_aim.system.on_demand import torch

if TYPE_CHECKING:
    from torch import Tensor

SAMPLED = 64  # outputs of a tensor that are looked at, evenly spread
LEAST = 4  # of each matrix of a stack


class EffectSampler:
    """The effects of all experts in one tensor of one output. The sums do not depend on how the tensor is cut."""

    def __init__(self, task: Task, moments: Sequence[Sequence[Moment | None]]) -> None:
        """`moments`: of each matrix of the tensor, of each expert."""
        self._moments = moments
        self._height, self._columns = task.shape[-2:]
        self._transposed = task.inputs_first
        outputs = self._columns if self._transposed else self._height
        self._most = max(LEAST, SAMPLED // max(len(moments), 1))
        self._step = max(1, -(-outputs // self._most))
        self._parts: list[Tensor] = []

    def of(self, merged: Tensor, rows: Rows) -> Tensor:
        """The deltas of a slice of the result, (rows, columns) float32, and of the experts, at the sampled outputs.

        (1 + experts, rows, columns) float32 on the CPU; some of the rows, or of the columns, of the slice.
        """
        models = [merged, *rows.stored_experts]
        if self._transposed:
            picked = slice(0, self._most * self._step, self._step)
            base = rows.stored_base[:, picked].to(torch.float32)
            return torch.stack([model[:, picked].to(torch.float32) - base for model in models]).cpu()
        first = rows.start // self._columns
        places = torch.arange(first, first + rows.count) % self._height
        chosen = ((places % self._step == 0) & (places < self._most * self._step)).nonzero().flatten()
        chosen = chosen.to(merged.device)
        base = rows.stored_base[chosen].to(torch.float32)
        return torch.stack([model[chosen].to(torch.float32) - base for model in models]).cpu()

    def add(self, part: Tensor) -> None:
        """Add what `of` gave, slice after slice."""
        self._parts.append(part)

    def effects(self) -> list[Effect]:
        """The sums of each expert, once all slices are added; (0, 0) if no text has reached the tensor."""
        whole = torch.cat(self._parts, dim=1)
        experts = len(whole) - 1
        found = [Effect(0.0, 0.0)] * experts
        for deltas, moments in zip(whole.chunk(len(self._moments), dim=1), self._moments, strict=True):
            by_output = deltas.mT.contiguous() if self._transposed else deltas
            for expert, moment in enumerate(moments):
                if moment is not None and not moment.is_zero:
                    own = by_output[expert + 1].to(moment.space.device)
                    lost = _square(by_output[0].to(own.device) - own, moment)
                    found[expert] = Effect(found[expert].lost + lost, found[expert].whole + _square(own, moment))
        return found


def _square(rows: Tensor, moment: Moment) -> float:
    """The sum over rows x of x G x^T."""
    product = torch.zeros_like(rows)
    moment.times(rows, product)
    return float((product * rows).double().sum())
