"""The types of values that arguments and flags take: sizes, counts, numbers in a range, paths."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Any

import click

from lowmem_aim.errors import printable
from lowmem_aim.units import bytes_of

LONGEST_NAME = 255  # bytes


class SizeType(click.ParamType[int]):
    """A size in bytes, written as `units.bytes_of` takes it."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> int:
        """The value in bytes. Raises click.BadParameter."""
        if isinstance(value, int):
            return value
        try:
            return bytes_of(str(value))
        except ValueError as error:
            raise click.BadParameter(str(error), context, param) from error


class CountType(click.ParamType[int]):
    """A count of parameters as mergekit writes it: `2B`, `500M`, `10k` or digits alone."""

    name = "count"
    _pattern = re.compile(r"(\d{1,18})([KMB]?)", re.IGNORECASE)

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> int:
        """The count. Raises click.BadParameter."""
        match = self._pattern.fullmatch(str(value))
        if not match:
            shown = printable(str(value), 100)
            self.fail(
                f"`{shown}` is not a number of parameters; write 2B or 500M, or give `--shard-size` bytes",
                param,
                context,
            )
        return int(match[1]) * int(1000 ** " KMB".index(match[2].upper() or " "))


class NumberRange(click.FloatRange):
    """A number in a range; NaN, which click's FloatRange lets through, is refused."""

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> Any:
        """The value as a number. Raises click.BadParameter."""
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if math.isnan(number):
            self.fail(f"`{printable(str(value))}` is not a number", param, context)
        if (self.min is not None and number < self.min) or (self.max is not None and number > self.max):
            self.fail(f"must lie between {self.min:g} and {self.max:g}, not {number:g}", param, context)
        return number


class PathType(click.Path):
    """A pathlib.Path; a name that is too long is an error here, and not wherever the path is first looked at."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> Any:
        """The value as a path. Raises click.BadParameter."""
        if any(len(os.fsencode(part)) > LONGEST_NAME for part in Path(value).parts):
            self.fail(f"`{printable(str(value))}` is too long for a path", param, context)
        return super().convert(value, param, context)
