"""The differences between two runs, key by key, as messages."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lowmem_aim.errors import printable
from lowmem_aim.jobs.identity import CALIBRATION, COMPARISON, PARAMETERS, RECIPE, ROWS, SHARDS, SMALL, TEXTS
from lowmem_aim.recipe.parts import WAYS

MOST_TOLD = 20
_SHOWN = 200  # characters of a value in a message
_DIGEST = re.compile("[0-9a-f]{32}")
# Keys of a job of which only a digest is known.
_CHANGED = {
    PARAMETERS: "the parameters of single tensors have changed",
    SHARDS: "the layout of the output files has changed (`--shard-size`, the dtype, or the models' tensors)",
    CALIBRATION: "the calibration of AIM has changed (its texts, its dtype, or the base's config)",
    TEXTS: "the texts of the experts have changed (or the dtype in which they are run, or an expert's config)",
    COMPARISON: "the texts of ACM have changed, or its dtype, or the base's config",
    ROWS: "the rows of the vocabulary that belong together have changed: a model has another tokenizer",
}
# Keys that follow from others: told only where none of these differs.
_FOLLOW_FROM = {PARAMETERS: (RECIPE,), SHARDS: tuple(RECIPE + key for key in ("dtype", "base_model", *WAYS))}

_Difference = tuple[str, Any, Any]  # (dotted key, the value then, the value now); None: there is none


def differences(then: Mapping[str, Any], now: Mapping[str, Any], *, explained: bool = False) -> list[str]:
    """Each value that differs between two tables, such as `aim.omega: 0.4 then, 0.5 now`; of digests only that.

    `explained`: the caller tells of differences already, from which others may follow.
    """
    found = list(_differences(then, now))
    keys = [key for key, _, _ in found]
    told = []
    for key, old, new in found:
        causes = _FOLLOW_FROM.get(key, ())
        if not causes or not (explained or any(other.startswith(causes) for other in keys)):
            told.append(_message(key, old, new))
    return list(dict.fromkeys(told))


def most(messages: Sequence[str]) -> list[str]:
    """The first MOST_TOLD messages, and how many more there are."""
    more = len(messages) - MOST_TOLD
    return [*messages[:MOST_TOLD], *([f"and {more} more"] if more > 0 else [])]


def _differences(then: Any, now: Any, key: str = "") -> Iterator[_Difference]:
    """Yield what differs, as deep within tables and lists as both have the same places."""
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        for name in dict.fromkeys([*then, *now]):
            yield from _differences(then.get(name), now.get(name), f"{key}.{name}" if key else name)
    elif isinstance(then, list) and isinstance(now, list):
        for place in range(max(len(then), len(now))):
            old, new = (values[place] if place < len(values) else None for values in (then, now))
            yield from _differences(old, new, f"{key}[{place}]")
    elif then != now:
        yield key, then, now


def _message(key: str, then: Any, now: Any) -> str:
    if text := _CHANGED.get(key) or _CHANGED.get(key.partition(".")[0]):
        return text
    key = key.removeprefix(RECIPE).removeprefix(f"{SMALL}.")
    if all(isinstance(value, str) and _DIGEST.fullmatch(value) for value in (then, now) if value is not None):
        change = "is new" if then is None else "is gone" if now is None else "has changed"
        return f"{printable(key)} {change}"
    return f"{printable(key)}: {_shown(then)} then, {_shown(now)} now"


def _shown(value: Any) -> str:
    if value is None:
        return "not given"
    if isinstance(value, Mapping) and "model" in value:
        value = value["model"]
    return "given" if isinstance(value, Mapping | list) else printable(str(value), _SHOWN)
