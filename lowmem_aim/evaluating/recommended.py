"""The merges of a sweep that are worth a second look: the one that adds most, and the one that loses least.

    adds most      the highest hypervolume gain over the experts
    loses least    of what a merge scores below the best expert of each task, the largest is the smallest

Both look at the tasks whose metric is a fraction. Without any, `loses least` takes the others relative to the best
expert's value. Controls are never among them: they are there to judge AIM by.
"""

from __future__ import annotations

from collections.abc import Sequence

from lowmem_aim.evaluating.comparison import Comparison
from lowmem_aim.evaluating.scores import Scores
from lowmem_aim.output.sweep_folder import ADDS_MOST, LOSES_LEAST


def recommended(found: Comparison) -> dict[str, str]:
    """ADDS_MOST and LOSES_LEAST -> the name of the merge; the former only if a merge adds anything to the experts."""
    merges = [row for row in found.rows if row.model.control is None]
    experts = [row.model for row in found.population]
    best: dict[str, str] = {}
    gains = {row.name: row.gain.value for row in merges if row.gain is not None}
    if max(gains.values(), default=0.0) > 0:
        best[ADDS_MOST] = max(gains, key=lambda name: gains[name])  # of equals, the first
    if merges and experts:
        tasks = found.volume or found.tasks
        losses = {row.name: largest_loss(row.model, experts, tasks) for row in merges}
        best[LOSES_LEAST] = min(losses, key=lambda name: losses[name])
    return best


def largest_loss(model: Scores, experts: Sequence[Scores], tasks: Sequence[str]) -> float:
    """The most that a model scores below the best expert of a task; negative if it is better everywhere.

    Fractions count as they are, other metrics relative to the expert's value.
    """
    return max(_loss(model, experts, task) for task in tasks)


def _loss(model: Scores, experts: Sequence[Scores], task: str) -> float:
    own = model.scores[task]
    sign = 1 if own.higher_is_better else -1
    best = max(sign * expert.scores[task].value for expert in experts)
    lost = best - sign * own.value
    return lost if own.in_volume or best == 0 else lost / abs(best)
