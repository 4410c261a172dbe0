"""Requests for an evaluation, from keys and values: those of the flags of `evaluate`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lowmem_aim.errors import UsageError, did_you_mean, printable
from lowmem_aim.evaluating.tasks import Asked
from lowmem_aim.jobs.evaluate import Forwards
from lowmem_aim.recipe.words import DTYPES

SEED = 1234  # as the flag `--seed`


def _is_count(least: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_paths(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(path, str | Path) for path in value)


def _is_table(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(text, str) for pair in value.items() for text in pair)


def _is_settings(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(key, str) for key in value)


def _is_limit(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


_TASKS: Mapping[str, tuple[str, Callable[[Any], bool], str]] = {  # key -> field of Asked, check, what it must be
    "include_path": ("folders", _is_paths, "a list of folders"),
    "metric": ("metrics", _is_table, "a mapping from tasks to metrics"),
    "limit": ("limit", _is_limit, "a number above 0"),
    "num_fewshot": ("num_fewshot", _is_count(0), "a whole number of at least 0"),
    "chat_template": ("chat_template", _is_flag, "True or False"),
    "set": ("settings", _is_settings, "a mapping from other settings to their values"),
    "seed": ("seed", _is_count(0), "a whole number of at least 0"),
    "allow_task_code": ("allow_code", _is_flag, "True or False"),
    "allow_code_execution": ("allow_execution", _is_flag, "True or False"),
}
_FORWARDS: Mapping[str, tuple[str, Callable[[Any], bool], str]] = {  # likewise, of Forwards
    "dtype": ("dtype", lambda value: value in DTYPES, f"one of {', '.join(DTYPES)}"),
    "max_length": ("max_length", _is_count(1), "a whole number of at least 1"),
    "batch_size": ("batch_size", _is_count(1), "a whole number of at least 1"),
    "spill": ("spill", _is_count(0), "a whole number of bytes"),
}


def asked_for(tasks: Sequence[str], settings: Mapping[str, Any]) -> tuple[Asked, Forwards]:
    """The tasks with their settings, and the way in which the model is run. Raises UsageError for all that is wrong."""
    if problems := list(_wrong(tasks, settings)):
        raise UsageError(problems, hint="docs/python.md has the settings")
    own = {field: settings[key] for key, (field, _, _) in _TASKS.items() if settings.get(key) is not None}
    ways = {field: settings[key] for key, (field, _, _) in _FORWARDS.items() if settings.get(key) is not None}
    own["folders"] = tuple(map(Path, own.get("folders", ())))
    return Asked(names=tuple(dict.fromkeys(tasks)), **{"seed": SEED} | own), Forwards(**ways)


def _wrong(tasks: Sequence[str], settings: Mapping[str, Any]) -> Iterator[str]:
    if isinstance(tasks, str) or not all(isinstance(name, str) for name in tasks):
        yield f"`tasks` must be a list of names, not {tasks!r:.100}"
    known = {**_TASKS, **_FORWARDS}
    for key, value in settings.items():
        if key not in known:
            yield f"there is no setting `{printable(str(key))}`{did_you_mean(str(key), known)}"
        elif value is not None and not known[key][1](value):
            yield f"`{key}` must be {known[key][2]}, not {value!r:.100}"
