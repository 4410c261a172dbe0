"""The one exception tree. Every error carries what happened, what to do next, and the process's exit code.

    LowmemAimError               1  a bug of ours, when nothing below fits
    ├── UsageError               2  a flag or the output folder is wrong
    │   └── RecipeError          2  the recipe is wrong
    ├── ModelError               3  an input model (or calibration input) is wrong
    ├── DiskError                4  too little space, not writable, a write failed
    ├── MemoryBudgetError        5  something does not fit the memory
    ├── LockedError              6  another run owns the output folder
    ├── ResumeError              7  an interrupted run was another one
    ├── VerifyError              8  a finished output is not what was written
    └── NetworkError             9  the Hub cannot be reached

Problems of one kind are collected and raised together: `problems` holds one line each.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Iterator


class LowmemAimError(Exception):
    """Base of all errors that are meant for the user's eyes."""

    exit_code = 1

    def __init__(self, problems: str | Iterable[str], hint: str = "") -> None:
        self.problems: tuple[str, ...] = (problems,) if isinstance(problems, str) else tuple(problems)
        self.hint = hint
        super().__init__("\n".join(self.problems))


class UsageError(LowmemAimError):
    exit_code = 2


class RecipeError(UsageError):
    """The recipe is wrong; each problem starts with `file:line:`."""


class ModelError(LowmemAimError):
    exit_code = 3


class DiskError(LowmemAimError):
    exit_code = 4


class MemoryBudgetError(LowmemAimError):
    exit_code = 5


class LockedError(LowmemAimError):
    exit_code = 6


class ResumeError(LowmemAimError):
    exit_code = 7


class VerifyError(LowmemAimError):
    exit_code = 8


class NetworkError(LowmemAimError):
    exit_code = 9


@contextlib.contextmanager
def noted(errors: list[LowmemAimError]) -> Iterator[None]:
    """Keep an error for `raise_all`, so that what comes next is checked as well."""
    try:
        yield
    except LowmemAimError as error:
        errors.append(error)


def raise_all(errors: list[LowmemAimError]) -> None:
    """One error with all problems and hints, of the first one's kind; none if there are none."""
    if errors:
        problems = [problem for error in errors for problem in error.problems]
        hints = dict.fromkeys(error.hint for error in errors if error.hint)
        raise type(errors[0])(dict.fromkeys(problems), hint="; ".join(hints))


def printable(text: str, limit: int = 200) -> str:
    """`text` safe for a terminal, a log or a card: control and direction characters escaped, length cut.

    Names that come from files reach people only through here: a tensor may be called `\\x1b[2J`.
    """
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[: limit + 1])
    return shown if len(shown) <= limit else shown[:limit] + "..."


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean ...?`, or nothing if no known word is near."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean `{near[0]}`?" if near else ""
