"""A comparison of models: each one's change against its parent, what of it is chance, and its hypervolume gain."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lowmem_aim.errors import LowmemAimError, UsageError, did_you_mean, noted, printable, raise_all
from lowmem_aim.evaluating.comparable import check_comparable, tasks_of
from lowmem_aim.evaluating.families import in_families, parents_of
from lowmem_aim.evaluating.gains import Gains, gains_over, why_no_gain
from lowmem_aim.evaluating.scores import Score, Scores, read_scores
from lowmem_aim.system.files import real

MOST_NAMED = 3  # models, each in a note of its own
CLEAR = 2.0  # standard errors of a difference, from which on it is not called chance


@dataclass(frozen=True)
class Change:
    """The difference of a model's score, or its gain, and its parent's."""

    value: float
    stderr: float | None  # of the difference; None if it is not known

    @classmethod
    def between(cls, own: Score, parent: Score) -> Change:
        """The change from `parent` to `own`, whose errors are taken to be independent."""
        known = own.stderr is not None and parent.stderr is not None
        stderr = math.hypot(own.stderr or 0.0, parent.stderr or 0.0) if known else None
        return cls(own.value - parent.value, stderr)

    @property
    def is_clear(self) -> bool | None:
        """Whether the change is two standard errors or more; None if that is not known. No change is not clear."""
        return None if self.stderr is None else self.value != 0 and abs(self.value) >= CLEAR * self.stderr


@dataclass(frozen=True)
class Gain:
    """A model's hypervolume gain over the population."""

    value: float
    stderr: float | None
    change: Change | None  # None without a parent
    relative: float | None  # the share by which it is more than the parent's; None if that has none


@dataclass(frozen=True)
class Row:
    """One model of a comparison."""

    model: Scores
    parent: Scores | None  # the same merge unrelaxed, if it is among the files
    changes: Mapping[str, Change]  # by task; empty without a parent
    gain: Gain | None  # None if none can be computed, and for models that are only in the population

    @property
    def name(self) -> str:
        """The model's name."""
        return self.model.name


@dataclass(frozen=True)
class Comparison:
    """Models compared on the same tasks, in the order in which they are shown."""

    tasks: tuple[str, ...]
    volume: tuple[str, ...]  # the tasks that the hypervolume is made of
    population: tuple[Row, ...]  # against which the gain is computed
    rows: tuple[Row, ...]  # the models that are compared; some may be of the population, too
    notes: tuple[str, ...]  # what has to be known to read the numbers

    @property
    def every(self) -> tuple[Row, ...]:
        """Every model once, the population first."""
        names = {row.name for row in self.population}
        return (*self.population, *(row for row in self.rows if row.name not in names))

    @property
    def listed(self) -> tuple[Row, ...]:
        """The compared models that are not of the population: those among which there is a best one."""
        return self.every[len(self.population) :]

    def score_of(self, task: str) -> Score:
        """The first model's score on a task: all have its unit."""
        return self.every[0].model.scores[task]


def read_all(files: Sequence[Path], population: Sequence[Path]) -> tuple[list[Scores], list[Scores]]:
    """Read files of scores (the compared models', the population's), each once, even if it is named several times.

    Raises UsageError with everything that is wrong with all of them.
    """
    found: dict[Path, Scores] = {}
    errors: list[LowmemAimError] = []
    for file in dict.fromkeys((*files, *population)):
        if real(file) not in found:
            with noted(errors):
                found[real(file)] = read_scores(file)
    raise_all(errors)
    first, second = ([found[file] for file in dict.fromkeys(map(real, several))] for several in (files, population))
    return first, second


def compared(
    models: Sequence[Scores],
    population: Sequence[Scores] = (),
    *,
    tasks: Sequence[str] = (),
    sort: str = "family",
    forced: bool = False,
    draws: bool = True,
) -> Comparison:
    """Compare models, and their hypervolume gain over a population, on all their tasks or on those named.

    `sort`: `family` (unrelaxed merge, then by omega), `name`, `hv`, or a task; the best first. `forced`: also if they
    were evaluated with other settings. Without `draws`, gains come without standard errors, and at once. A model may be
    in both lists. Raises UsageError with all that forbids it.
    """
    every = [*models, *(model for model in population if model not in models)]
    errors: list[LowmemAimError] = []
    parents: dict[str, Scores] = {}
    notes: list[str] = []
    with noted(errors):
        every = _of_tasks(every, tasks)
        notes = check_comparable(every, forced)
    with noted(errors):
        parents = parents_of(every)
    with noted(errors):
        _check_sort(sort, bool(population), tasks_of(every))
    raise_all(errors)
    own = {model.name: model for model in every}
    models, population = ([own[model.name] for model in several] for several in (models, population))
    volume = tuple(task for task, score in every[0].scores.items() if score.in_volume)
    gains = None if why_no_gain(population, volume) else gains_over(every, population, volume, draws=draws)
    rows = {model.name: _row(model, parents.get(model.name), gains if model in models else None) for model in every}
    found = Comparison(
        tasks=tuple(every[0].scores),
        volume=volume,
        population=tuple(rows[model.name] for model in population),
        rows=tuple(rows[model.name] for model in in_families(models, parents)),
        notes=(*notes, *_notes(every, population, volume, parents)),
    )
    return replace(found, rows=tuple(_sorted(found, sort)))


def _of_tasks(models: Sequence[Scores], tasks: Sequence[str]) -> list[Scores]:
    """The models with the scores of these tasks alone. Raises UsageError for a task that none of them has."""
    known = tasks_of(models)
    problems = [
        f"no model has the task `{printable(task)}`{did_you_mean(task, known)}" for task in tasks if task not in known
    ]
    if problems:
        raise UsageError(problems, hint=f"the tasks are {', '.join(printable(task) for task in known)}")
    if not tasks:
        return list(models)
    return [replace(m, scores={task: m.scores[task] for task in tasks if task in m.scores}) for m in models]


def _row(model: Scores, parent: Scores | None, gains: Gains | None) -> Row:
    changes: dict[str, Change] = {}
    if parent is not None:
        changes = {task: Change.between(score, parent.scores[task]) for task, score in model.scores.items()}
    return Row(model, parent, changes, _gain(model.name, parent, gains) if gains else None)


def _gain(name: str, parent: Scores | None, gains: Gains) -> Gain:
    own = gains.values[name]
    if parent is None:
        return Gain(own, gains.stderr(name), None, None)
    before = gains.values[parent.name]
    change = Change(own - before, gains.difference_stderr(name, parent.name))
    return Gain(own, gains.stderr(name), change, own / before - 1 if before else None)


# --- order ------------------------------------------------------------------------------------------------------------


def _check_sort(sort: str, has_population: bool, tasks: Sequence[str]) -> None:
    words = ["family", "name", "hv", *tasks]
    if sort not in words:
        raise UsageError(
            f"`--sort {printable(sort)}` is neither family, name, hv nor a task{did_you_mean(sort, words)}",
            hint=f"the tasks are {', '.join(map(printable, tasks))}",
        )
    if sort == "hv" and not has_population:
        raise UsageError("`--sort hv` needs a population", hint="name the experts that were merged with `--against`")


def _sorted(found: Comparison, sort: str) -> Sequence[Row]:
    if sort == "family":
        return found.rows
    if sort == "name":
        return sorted(found.rows, key=lambda row: row.name)
    if sort == "hv":
        return sorted(found.rows, key=lambda row: -(row.gain.value if row.gain else 0.0))
    sign = -1 if found.score_of(sort).higher_is_better else 1
    return sorted(found.rows, key=lambda row: sign * row.model.scores[sort].value)


# --- notes ------------------------------------------------------------------------------------------------------------


def _notes(
    every: Sequence[Scores], population: Sequence[Scores], volume: Sequence[str], parents: Mapping[str, Scores]
) -> Iterator[str]:
    yield _of_the_gain(population, volume)
    for task, score in every[0].scores.items():
        if not score.in_volume:
            what = f"is no fraction but {score.unit}" if score.unit else "is better the smaller it is"
            yield f"{printable(task)} {what}: it is left out of the HV gain"
    orphans = [m.name for m in every if m.name not in parents and (m.relaxed or m.parent) and not _is_plain_merge(m)]
    if len(orphans) > MOST_NAMED:  # a search has hundreds
        others = f"{printable(orphans[0])} and {len(orphans) - 1} others"
        yield f"{others}: their unrelaxed merges are not among the files, so no changes are shown"
    else:
        for name in orphans:
            yield f"{printable(name)}: its unrelaxed merge is not among the files, so no change is shown"
    versions = sorted({model.versions["lm_eval"] for model in every if "lm_eval" in model.versions})
    if len(versions) > 1:
        yield f"evaluated by lm-evaluation-harness {', '.join(map(printable, versions))}, whose tasks may differ"


def _is_plain_merge(model: Scores) -> bool:
    """Whether the model is itself the unrelaxed merge that its `parent` stands for."""
    return not model.relaxed and model.method is not None


def _of_the_gain(population: Sequence[Scores], volume: Sequence[str]) -> str:
    if why := why_no_gain(population, volume):
        return f"no HV gain: {why}"
    names = ", ".join(printable(model.name) for model in population)
    tasks = "1 task" if len(volume) == 1 else f"{len(volume)} tasks"
    return f"HV gain: against the population {names}; over {tasks}, as fractions, reference point 0"
