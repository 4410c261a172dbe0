"""The hypervolume gain: what a model adds to a population of models, over all tasks at once.

    HV(P)         volume of the union of the boxes [0, scores] of the models in P, scores as fractions
    HVgain(m | P) = (HV(P with m) - HV(P)) ^ (1 / N)        N: number of tasks

The measure of the AIM paper (arXiv 2502.02421). moocore (the extra `[report]`) computes the volumes; it is imported
only here, and only to compute.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

MOST_TASKS = 31  # dimensions that moocore takes


def hv_gain(
    scores: Sequence[float],  # (tasks,)
    population: Sequence[Sequence[float]],  # (models, tasks)
) -> float:
    """The hypervolume gain of a model over a population, in [0, 1]; all scores are fractions.

    It is 0 exactly where a model of the population is at least as good on every task. A model alone in its population
    gains the geometric mean of its scores.
    """
    if any(all(own <= other for own, other in zip(scores, model, strict=True)) for model in population):
        return 0.0
    return math.pow(max(_added(scores, population), 0.0), 1 / len(scores))


def _added(scores: Sequence[float], population: Sequence[Sequence[float]]) -> float:
    """The volume of the model's box outside of all the population's.

    The same as HV(P with m) - HV(P), but of two volumes no larger than the box: their rounding, which the N-th root
    would blow up to the third decimal, is smaller.
    """
    if not population:
        return math.prod(scores)
    from moocore import hypervolume

    shared = [[min(own, other) for own, other in zip(scores, model, strict=True)] for model in population]
    return math.prod(scores) - float(hypervolume(shared, ref=[0.0] * len(scores), maximise=True))
