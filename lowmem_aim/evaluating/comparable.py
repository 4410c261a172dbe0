"""Whether models can be compared: other names, the same tasks in the same units, evaluated with the same settings."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial
from typing import Any

from lowmem_aim.errors import UsageError, printable
from lowmem_aim.evaluating.scores import SETTINGS, Score, Scores

_NAMED = 3  # models that a message names; the others are counted
_FORCE = "evaluate all models alike; `--force` compares them all the same, and the report says so"
_UNKNOWN = object()  # a hand-written file does not say

Models = Sequence[Scores]


def check_comparable(models: Models, forced: bool) -> list[str]:
    """Return what the report must say of models that are compared although they were evaluated differently.

    Raises UsageError with everything that forbids a comparison: names that occur twice, tasks that some models lack or
    have in another unit, and, unless it is `forced`, settings that differ.
    """
    differing = list(_settings(models))
    problems = [(problem, "give one of them another `name`") for problem in _repeated(models)]
    problems += [
        (problem, "evaluate all models on the same tasks, or name those to compare with `--tasks`")
        for problem in _lacking(models)
    ]
    problems += [(problem, "compare scores by one metric") for problem in _units(models)]
    if not forced:
        problems += [(problem, _FORCE) for problem in differing]
    if problems:
        raise UsageError([problem for problem, _ in problems], [hint for _, hint in problems])
    return [f"compared by force: {problem}" for problem in differing]


def _repeated(models: Models) -> Iterator[str]:
    names = [model.name for model in models]
    for name in dict.fromkeys(names):
        if names.count(name) > 1:
            yield f"{names.count(name)} files have the name {_name(name)}"


def tasks_of(models: Models) -> list[str]:
    """Every task of the models, in the order in which they come."""
    return list(dict.fromkeys(task for model in models for task in model.scores))


def _lacking(models: Models) -> Iterator[str]:
    tasks = tasks_of(models)
    for model in models:
        if lacking := [_name(task) for task in tasks if task not in model.scores]:
            yield f"{_name(model.name)} lacks {_few(lacking)}, which others have"


def _units(models: Models) -> Iterator[str]:
    for task in tasks_of(models):
        yield from _differing(models, f"the unit of {_name(task)}", _of_score(task, _unit))


def _unit(score: Score) -> str:
    return (score.unit or "fraction") + ("" if score.higher_is_better else ", less is better")


def _settings(models: Models) -> Iterator[str]:
    for key in SETTINGS:
        yield from _differing(models, f"`{key}`", partial(_setting, key))
    for task in tasks_of(models):
        metric = _of_score(task, lambda score: score.metric or _UNKNOWN)
        yield from _differing(models, f"the metric of {_name(task)}", metric)
        alike: dict[Hashable, list[Scores]] = {}
        for model in models:  # another limit has been told, and so have the numbers that follow from it
            alike.setdefault(json.dumps(model.settings.get("limit")), []).append(model)
        items = _of_score(task, lambda score: _UNKNOWN if score.n is None else score.n)
        for same in alike.values():
            yield from _differing(same, f"the number of items of {_name(task)}", items)


def _setting(key: str, model: Scores) -> Any:
    return model.settings.get(key, _UNKNOWN)


def _of_score(task: str, what: Callable[[Score], Any]) -> Callable[[Scores], Any]:
    return lambda model: what(model.scores[task]) if task in model.scores else _UNKNOWN


def _differing(models: Models, what: str, value_of: Callable[[Scores], Any]) -> Iterator[str]:
    """Yield one message if the models that say it say different things."""
    found: dict[str, list[str]] = {}
    for model in models:
        value = value_of(model)
        if value is not _UNKNOWN:
            found.setdefault(_said(value), []).append(_name(model.name))
    if len(found) > 1:
        yield f"{what} differs: {'; '.join(f'{value} in {_few(names)}' for value, names in found.items())}"


def _said(value: Any) -> str:
    text = value if isinstance(value, str) else "none" if value is None else json.dumps(value, sort_keys=True)
    return printable(text, 60)


def _few(names: Sequence[str]) -> str:
    """Names as a list that stays readable for a hundred of them."""
    shown = ", ".join(names[:_NAMED])
    return shown if len(names) <= _NAMED else f"{shown} and {len(names) - _NAMED} more"


def _name(name: str) -> str:
    return f"`{printable(name, 80)}`"
