"""Pareto fronts of two tasks: the models that no other one is at least as good as on both and better on one."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from lowmem_aim.errors import UsageError, did_you_mean, printable
from lowmem_aim.evaluating.comparison import Comparison, Row

MOST_PAIRS = 6  # that are drawn unasked: pictures of more are not looked at
MOST_ASKED = 24  # that can be asked for: a picture of some hundred panels is larger than matplotlib draws
MOST_TASKS = 20  # whose pairs are looked at unasked

Pair = tuple[str, str]


@dataclass(frozen=True)
class Front:
    """The front of two tasks, from the model that is best on the second to the one that is best on the first."""

    pair: Pair
    rows: tuple[Row, ...]

    @property
    def corners(self) -> int:
        """The number of its places: models of equal scores are at one."""
        return len({tuple(row.model.scores[task].value for task in self.pair) for row in self.rows})


def front_of(found: Comparison, pair: Pair) -> Front:
    """The front of a pair of tasks, among all models, the population's too. Models of equal scores are all on it."""
    return Front(pair, tuple(sorted(undominated(found, pair), key=lambda row: _place(found, row, pair))))


def undominated(found: Comparison, tasks: Sequence[str]) -> list[Row]:
    """The models, the population's too, that no other is at least as good as on all tasks and better on one."""
    places = [_place(found, row, tasks) for row in found.every]
    return [
        row
        for row, place in zip(found.every, places, strict=True)
        if not any(_dominates(other, place) for other in places)
    ]


def _place(found: Comparison, row: Row, tasks: Sequence[str]) -> tuple[float, ...]:
    """A model's scores, each so that more is better."""
    return tuple(row.model.scores[task].value * (1 if found.score_of(task).higher_is_better else -1) for task in tasks)


def _dominates(other: Sequence[float], own: Sequence[float]) -> bool:
    return other != own and all(theirs >= ours for theirs, ours in zip(other, own, strict=True))


def fronts_of(found: Comparison, pairs: Sequence[Pair] = ()) -> list[Front]:
    """The fronts of these pairs, or without any, of the six pairs (of the first 20 tasks) with the longest fronts.

    A long front is a choice between models; on a short one, a single model is best on both tasks.
    """
    fronts = [front_of(found, pair) for pair in pairs or itertools.combinations(found.tasks[:MOST_TASKS], 2)]
    if pairs:
        return fronts
    kept = sorted(fronts, key=lambda front: -front.corners)[:MOST_PAIRS]
    return [front for front in fronts if front in kept]  # in the order of the tasks


def check_pairs(pairs: Sequence[Pair], tasks: Sequence[str]) -> None:
    """Raise UsageError for pairs of tasks that are not compared, of a task with itself, and too many of them."""
    problems = [
        f"`--pair {printable(','.join(pair))}`: there is no task `{printable(task)}`{did_you_mean(task, tasks)}"
        for pair in pairs
        for task in pair
        if task not in tasks
    ]
    problems += [f"`--pair {printable(','.join(pair))}` is one task twice" for pair in pairs if pair[0] == pair[1]]
    if len(pairs) > MOST_ASKED:
        problems.append(f"`--pair` is given {len(pairs)} times, and a picture has at most {MOST_ASKED} panels")
    if problems:
        raise UsageError(problems, hint=f"the tasks are {', '.join(map(printable, tasks))}")
