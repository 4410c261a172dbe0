"""The hypervolume gains of several models over one population, and how far chance moves them.

A gain is no mean over items, so it has no standard error of its own. Here the scores of all models, the population's
too, are drawn many times around their values, by their standard errors; the spread of the gains is their standard
error. The draws of a model depend on its name alone: the same files give the same figures, in any order.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lowmem_aim.evaluating.hypervolume import MOST_TASKS, hv_gain
from lowmem_aim.evaluating.scores import Score, Scores

DRAWS = 400  # a standard error of 400 draws is right to 4 %
# moocore's time grows with the number of models to the power of the tasks, and it cannot be interrupted. Of few models
# it takes a tenth of a millisecond, of few tasks milliseconds, and of more than both it may take days.
FEW_MODELS, FEW_TASKS = 12, 10


@dataclass(frozen=True)
class Gains:
    """The gain of each model, and its gains in all draws where every standard error is known."""

    values: Mapping[str, float]  # by the model's name
    draws: Mapping[str, Sequence[float]]

    def stderr(self, name: str) -> float | None:
        """The standard error of a model's gain; None if it is not known."""
        return statistics.stdev(self.draws[name]) if name in self.draws else None

    def difference_stderr(self, name: str, other: str) -> float | None:
        """The standard error of the difference of two gains, whose population is the same; None if not known."""
        if name not in self.draws or other not in self.draws:
            return None
        return statistics.stdev(own - theirs for own, theirs in zip(self.draws[name], self.draws[other], strict=True))


def why_no_gain(population: Sequence[Scores], tasks: Sequence[str]) -> str:
    """Why no gain over a population can be computed, in words; empty if it can."""
    if not population:
        return "`--against` names the population, the experts that were merged"
    if not tasks:
        return "no task is a fraction of which more is better"
    if len(tasks) > MOST_TASKS:
        return f"it can be computed of at most {MOST_TASKS} tasks; `--tasks` names those to compare"
    if len(population) > FEW_MODELS and len(tasks) > FEW_TASKS:
        return f"of a population of {len(population)} models and {len(tasks)} tasks it would take too long"
    return ""


def gains_over(
    models: Sequence[Scores], population: Sequence[Scores], tasks: Sequence[str], *, draws: bool = True
) -> Gains:
    """The gains of models over a population, over these tasks; there must be no reason against it (`why_no_gain`).

    Without `draws`, which take most of the time, nothing is known of their standard errors.
    """
    boxes = [_values(model, tasks) for model in population]
    values = {model.name: hv_gain(_values(model, tasks), boxes) for model in models}
    if not draws or len(population) > FEW_MODELS or not all(_is_known(model, tasks) for model in population):
        return Gains(values, {})
    drawn = list(zip(*(_drawn(model, tasks) for model in population), strict=True))
    found = {
        model.name: [hv_gain(own, others) for own, others in zip(_drawn(model, tasks), drawn, strict=True)]
        for model in models
        if _is_known(model, tasks)
    }
    return Gains(values, found)


def _values(model: Scores, tasks: Sequence[str]) -> list[float]:
    return [model.scores[task].value for task in tasks]


def _is_known(model: Scores, tasks: Sequence[str]) -> bool:
    return all(model.scores[task].stderr is not None for task in tasks)


def _drawn(model: Scores, tasks: Sequence[str]) -> list[list[float]]:
    """A model's scores in all draws, as (draws, tasks)."""
    draw = random.Random(model.name)
    return [[_around(model.scores[task], draw) for task in tasks] for _ in range(DRAWS)]


def _around(score: Score, draw: random.Random) -> float:
    return min(max(draw.gauss(score.value, score.stderr or 0.0), 0.0), 1.0)
