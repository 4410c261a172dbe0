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
# Scores closer than this are equal: 0.286 and 143 / 500 may differ in their last bit, and the sixth root of such a
# difference of volumes is a gain of 0.001.
EQUAL = 1e-12


def hv_gain(
    scores: Sequence[float],  # (tasks,)
    population: Sequence[Sequence[float]],  # (models, tasks)
) -> float:
    """The hypervolume gain of a model over a population, in [0, 1]; all scores are fractions.

    It is 0 exactly where a model of the population is at least as good on every task. Over nobody, it is the geometric
    mean of the scores.
    """
    if any(all(own <= other + EQUAL for own, other in zip(scores, model, strict=True)) for model in population):
        return 0.0
    added = _volume([*population, scores]) - _volume(population)
    return math.pow(max(added, 0.0), 1 / len(scores))


def _volume(models: Sequence[Sequence[float]]) -> float:
    if len(models) < 2:
        return sum(map(math.prod, models))
    from moocore import hypervolume

    return float(hypervolume(models, ref=[0.0] * len(models[0]), maximise=True))
