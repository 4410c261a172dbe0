"""The exception tree: every error carries what happened, what to do next and the exit code of the process.

    LowmemAimError               1  a bug of ours, when nothing below fits
    ├── UsageError               2  a flag or the output folder is wrong
    │   └── RecipeError          2  the recipe is wrong
    ├── ModelError               3  an input model (or calibration input) is wrong
    │   └── NoSuchModel          3  no folder here and no model on the Hub has that name
    ├── DiskError                4  too little space, not writable, a write failed
    ├── MemoryBudgetError        5  something does not fit the memory
    ├── LockedError              6  another run owns the output folder
    ├── ResumeError              7  the run in the output folder was a different one, or of other inputs
    ├── VerifyError              8  a finished output is not what was written
    └── NetworkError             9  the Hub cannot be reached

Problems of one kind are collected and raised together: `problems` holds one line each.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Iterator


class LowmemAimError(Exception):
    """Base of all errors that are written for the user: `problems`, one line each, and a `hint`."""

    exit_code = 1
    usual_hint = "this is a bug: report it, with the command that led here"  # used if no hint is given

    def __init__(self, problems: str | Iterable[str], hint: str = "") -> None:
        self.problems: tuple[str, ...] = (problems,) if isinstance(problems, str) else tuple(problems)
        self.hint = hint or self.usual_hint
        super().__init__("\n".join(self.problems))


class UsageError(LowmemAimError):
    """A flag or the output folder is wrong."""

    exit_code = 2
    usual_hint = "see `lowmem-aim --help`"


class RecipeError(UsageError):
    """The recipe is wrong; each problem starts with `file:line:`."""

    usual_hint = "mend what is named here; docs/recipe.md describes every key"


class ModelError(LowmemAimError):
    """An input model or a calibration input is wrong."""

    exit_code = 3
    usual_hint = "mend or replace what is named here"


class NoSuchModel(ModelError):
    """No folder here and no model on the Hub has that name."""


class DiskError(LowmemAimError):
    """The disk has too little space, cannot be written to, or failed."""

    exit_code = 4
    usual_hint = "check the disk and its permissions"


class MemoryBudgetError(LowmemAimError):
    """Something does not fit the memory budget."""

    exit_code = 5
    usual_hint = "allow more with `--ram` or `--vram`"


class LockedError(LowmemAimError):
    """Another run owns the output folder."""

    exit_code = 6
    usual_hint = "wait for the other run, or stop it"


class ResumeError(LowmemAimError):
    """The run in the output folder, interrupted or finished, was a different one or of other inputs."""

    exit_code = 7
    usual_hint = "`--fresh` starts over; another output folder leaves the interrupted run as it is"


class VerifyError(LowmemAimError):
    """A finished output is not what was written."""

    exit_code = 8
    usual_hint = "make the output again"


class NetworkError(LowmemAimError):
    """The Hub cannot be reached."""

    exit_code = 9
    usual_hint = "try again later, or give a local folder"


@contextlib.contextmanager
def noted(errors: list[LowmemAimError]) -> Iterator[None]:
    """Append a LowmemAimError raised in the block to `errors`, so that later checks still run; see `raise_all`."""
    try:
        yield
    except LowmemAimError as error:
        errors.append(error)


def raise_all(errors: list[LowmemAimError]) -> None:
    """Raise the one error, or all as one (see `joined`); nothing if there are none."""
    if len(errors) == 1:
        raise errors[0]  # with its traceback and cause
    if errors:
        raise joined(errors) from errors[0]


def joined(errors: list[LowmemAimError]) -> LowmemAimError:
    """One error of the first one's class, with the problems and hints of all; `errors` must not be empty."""
    problems = [problem for error in errors for problem in error.problems]
    hints = dict.fromkeys(error.hint for error in errors if error.hint != error.usual_hint)
    return type(errors[0])(dict.fromkeys(problems), hint="; ".join(hints))


def printable(text: str, limit: int = 200) -> str:
    """Return `text` safe for a terminal, a log or a card, with control and direction characters escaped.

    Text of more than `limit` characters is cut and ends with `...`. Every name that comes from a file passes through
    here before people read it: a tensor may be called `\\x1b[2J`.
    """
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[: limit + 1])
    return shown if len(shown) <= limit else shown[:limit] + "..."


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `; did you mean ...?` with the known word nearest to `word`, or an empty string if none is near."""
    names = {name.lower(): name for name in known}
    near = difflib.get_close_matches(word.lower(), names, n=1)
    return f"; did you mean `{names[near[0]]}`?" if near else ""
