"""The values that a search may choose from: a range of numbers, `0.2:0.9`, or categories, `0.3,0.5`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lowmem_aim.errors import RecipeError, printable

DIGITS = 6  # of a number that a search chooses; more would say nothing, and be unreadable in a recipe


@dataclass(frozen=True)
class Range:
    """All numbers from `low` to `high`; `whole`: whole numbers alone."""

    low: float
    high: float
    whole: bool = False


Domain = Range | tuple[str, ...]  # categories as the texts that a flag would have


def is_range(text: str) -> bool:
    """Whether the text has the form of a range, right or wrong: no value of a parameter has a colon."""
    return ":" in text


def domain_of(values: Sequence[str], flag: str) -> Domain:
    """The values that a flag lists, as a range or as categories. Raises RecipeError for what is neither."""
    if not any(map(is_range, values)):
        return tuple(values)
    shown = printable(",".join(values))
    hint = "a range is LOW:HIGH, such as `0.2:0.9`; single values are separated by commas"
    ends = _numbers(values[0]) if len(values) == 1 else []
    if len(ends) != 2:
        raise RecipeError(f"{flag}: `{shown}` is no range of numbers", hint)
    if not ends[0] < ends[1]:
        raise RecipeError(f"{flag}: the range `{shown}` ends where it begins, or before", hint)
    return Range(ends[0], ends[1])


def _numbers(text: str) -> list[float]:
    """The finite numbers that colons separate; none if any part is something else."""
    try:
        found = [float(part) for part in text.split(":")]
    except ValueError:
        return []
    return found if all(map(math.isfinite, found)) else []


def number_text(value: float, within: Range) -> str:
    """A number of a range, rounded, as YAML reads a number: `1.0e-05`, since `1e-05` would be a word there."""
    rounded = min(max(float(f"{value:.{DIGITS}g}"), within.low), within.high)
    mantissa, e, exponent = repr(rounded).partition("e")
    return f"{mantissa}.0e{exponent}" if e and "." not in mantissa else repr(rounded)
