"""The exception tree: every error carries what happened, what to do next and the exit code of the process.

    LowmemAimError               1  a bug of ours, when nothing below fits
    ├── UsageError               2  a flag or the output folder is wrong
    │   └── RecipeError          2  the recipe is wrong
    ├── ModelError               3  an input model (or calibration input) is wrong
    │   ├── NoSuchModel          3  no folder here and no model on the Hub has that name
    │   └── NoSuchTexts          3  the file of texts or activations is not there
    ├── DiskError                4  too little space, not writable, a write failed
    ├── MemoryBudgetError        5  something does not fit the memory
    ├── LockedError              6  another run owns the output folder
    ├── ResumeError              7  the run in the output folder was a different one, or of other inputs
    ├── VerifyError              8  a finished output is not what was written
    └── NetworkError             9  the Hub cannot be reached

Problems of one kind are collected and raised together: `problems` holds one line each, and `hints` what to do about
each.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

NAMED = 3  # recipes that a message names; more are counted


class LowmemAimError(Exception):
    """Base of all errors that are written for the user: `problems`, one line each, none twice, and their `hints`.

    `hint` is one text for all problems, or a list with one for each.
    """

    exit_code = 1
    usual_hint = "this is a bug: report it, with the command that led here"  # used if no hint is given

    def __init__(self, problems: str | Iterable[str], hint: str | Sequence[str] = "") -> None:
        listed = [problems] if isinstance(problems, str) else list(problems)
        hints = [hint] * len(listed) if isinstance(hint, str) else hint
        told: dict[str, str] = {}
        for problem, own in zip(listed, hints, strict=True):
            told.setdefault(problem, own or self.usual_hint)
        self.problems: tuple[str, ...] = tuple(told)
        self.hints: tuple[str, ...] = tuple(told.values())  # of each problem
        super().__init__("\n".join(self.problems))

    @property
    def hint(self) -> str:
        """All hints, each once and on a line of its own, in the order of the problems."""
        return "\n".join(dict.fromkeys(self.hints))

    def by_hint(self) -> dict[str, list[str]]:
        """Each hint, in the order of the problems, with the problems that it belongs to."""
        found: dict[str, list[str]] = {}
        for problem, hint in zip(self.problems, self.hints, strict=True):
            found.setdefault(hint, []).append(problem)
        return found

    def add_to_hints(self, text: str) -> None:
        """Add to the hint of every problem what else is worth knowing, once."""
        self.hints = tuple(hint if hint.endswith(text) else f"{hint}; {text}" for hint in self.hints)

    def add_before_problems(self, text: str, unless: Callable[[str], bool] = lambda problem: False) -> None:
        """Add to each problem where it is, unless it says so already."""
        self.problems = tuple(problem if unless(problem) else f"{text}{problem}" for problem in self.problems)
        self.args = ("\n".join(self.problems),)


class UsageError(LowmemAimError):
    """A flag or the output folder is wrong."""

    exit_code = 2
    usual_hint = "see `lowmem-aim --help`"


class RecipeError(UsageError):
    """The recipe is wrong; each problem starts with `file:line:column:`, or names a flag."""

    usual_hint = "docs/recipe.md describes every key of a recipe"


class ModelError(LowmemAimError):
    """An input model or a calibration input is wrong."""

    exit_code = 3
    usual_hint = "download the model again, or use another one"


class NoSuchModel(ModelError):
    """No folder here and no model on the Hub has that name."""


class NoSuchTexts(ModelError):
    """The file of texts or activations is not there."""


class DiskError(LowmemAimError):
    """The disk has too little space, cannot be written to, or failed."""

    exit_code = 4
    usual_hint = "check the disk and its permissions"


class MemoryBudgetError(LowmemAimError):
    """Something does not fit the memory budget; `enough` bytes of a `kind` of memory would do, if that is known."""

    exit_code = 5
    usual_hint = "allow more with `--ram` or `--vram`"

    def __init__(
        self, problems: str | Iterable[str], hint: str | Sequence[str] = "", *, kind: str = "", enough: int = 0
    ) -> None:
        super().__init__(problems, hint)
        self.kind, self.enough = kind, enough


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
    """One error of the first one's class, with the problems of all and their hints; `errors` must not be empty.

    Of several budgets that are too small for different work, only the largest that is asked for is told.
    """
    errors = [error for error in errors if not _asks_for_less(error, errors)]
    if len(errors) == 1:
        return errors[0]  # which says how much would be enough
    problems = [problem for error in errors for problem in error.problems]
    return type(errors[0])(problems, [hint for error in errors for hint in error.hints])


def of_some(errors: Mapping[str, Sequence[LowmemAimError]]) -> list[LowmemAimError]:
    """The errors of recipes, by their names, each once; those that are not of all recipes begin with whose they are."""
    found: dict[tuple[type, tuple[str, ...]], tuple[LowmemAimError, dict[str, None]]] = {}
    for name, own in errors.items():
        for error in own:
            _, names = found.setdefault((type(error), error.problems), (error, {}))
            names[name] = None
    for error, names in found.values():
        if len(names) < len(errors):
            error.add_before_problems(whose(list(names)), unless=_is_told_whose)
    return [error for error, _ in found.values()]


def whose(names: Sequence[str]) -> str:
    """The beginning of a message about some of several recipes: `recipe `ties`: `."""
    listed = ", ".join(f"`{printable(name)}`" for name in names[:NAMED])
    more = f" and {len(names) - NAMED} more" * (len(names) > NAMED)
    return f"recipe{'s' * (len(names) > 1)} {listed}{more}: "


def _is_told_whose(problem: str) -> bool:
    """Whether a message begins with the recipes that it is about."""
    return problem.startswith(("recipe `", "recipes `"))


def _asks_for_less(error: LowmemAimError, others: Iterable[LowmemAimError]) -> bool:
    if not isinstance(error, MemoryBudgetError) or not error.enough:
        return False
    same = [other for other in others if isinstance(other, MemoryBudgetError) and other.kind == error.kind]
    return error is not max(same, key=lambda other: other.enough)


def printable(text: str, limit: int = 200) -> str:
    """Return `text` safe for a terminal, a log or a card, with control and direction characters escaped.

    Text of more than `limit` characters is cut and ends with `...`. Every name that comes from a file passes through
    here before people read it: a tensor may be called `\\x1b[2J`.
    """
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[: limit + 1])
    return shown if len(shown) <= limit else shown[:limit] + "..."


def did_you_mean(word: str, known: Iterable[str], short: Mapping[str, str] | None = None) -> str:
    """Return `; did you mean ...?` with the known word that `word` may be a slip of; empty if there is none.

    A slip is one letter in three that is wrong, missing, left over or changed places with the next; or a known word
    that was not finished. Capitals, `_` for `-`, and dashes before a flag do not count. Words of one or two letters are
    too short to guess from. `short` has other names of known words, such as `bf16`.
    """
    meant = (short or {}).get(word.lower()) or nearest(word, known)
    return f"; did you mean `{meant}`?" if meant else ""


def nearest(word: str, known: Iterable[str], slips: int = 1) -> str:
    """The known word that `word` may be a slip of, see `did_you_mean`; empty if there is none.

    `slips`: so many wrong letters are allowed in short words too.
    """
    typed = _letters(word)
    if len(typed) < 3:
        return ""
    found = {name: _slips(typed, _letters(name)) for name in dict.fromkeys(known)}
    near = [name for name, count in found.items() if count <= min(max(slips, len(typed) // 3), len(name) - 1)]
    near = near or [name for name in found if _letters(name).startswith(typed)]
    return min(near, key=lambda name: (found[name], _letters(name)[0] != typed[0])) if near else ""


def _letters(word: str) -> str:
    return word.lstrip("-").replace("_", "-").lower()[:100]


def _slips(typed: str, meant: str) -> int:
    """The fewest letters to change, add, drop, or swap with their neighbour, that turn one word into the other.

    The same letters in another order count as one slip.
    """
    if typed != meant and sorted(typed) == sorted(meant):
        return 1
    before, last = [0] * (len(meant) + 1), list(range(len(meant) + 1))
    for i, letter in enumerate(typed, start=1):
        row = [i]
        for j, other in enumerate(meant, start=1):
            fewest = min(last[j] + 1, row[-1] + 1, last[j - 1] + (letter != other))
            swapped = i > 1 and j > 1 and typed[i - 2 : i] == meant[j - 2 : j][::-1]
            row.append(min(fewest, before[j - 2] + 1) if swapped else fewest)
        before, last = last, row
    return last[-1]
