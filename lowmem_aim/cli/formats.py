"""The form in which a command shows what it does: `--format`, `--json` and `--quiet`; JSON's last line after an error.

With JSON, the last line on stdout always tells how a command has ended. A run says so itself (`run_ended`); what fails
before a run has begun, or in a command that is none, is told here in the same form.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from lowmem_aim.errors import LowmemAimError, UsageError
from lowmem_aim.system.defaults_file import read_defaults

if TYPE_CHECKING:
    from lowmem_aim.events import RunEnded
    from lowmem_aim.view.dashboard import Style

# Whoever starts commands for a model sets one of these, by the Hub's convention; see `_by_agent`.
AGENT_VARIABLES = ("AI_AGENT", "AGENT")
RUNS = {
    "merge",
    "plan",
    "relax",
    "calibrate",
    "evaluate",
    "sweep",
    "verify",
    "convert",
}  # the commands that take the file's format


class _State:
    answered = False  # stdout holds the JSON that says how the command has ended


def style_of(flags: Mapping[str, Any], kept: str | None = None) -> Style:
    """The style that a command's flags ask for, else `kept`, the file of defaults', else what suits the caller.

    Raises UsageError if the flags contradict each other.
    """
    asked = {f"--format {flags['format']}": flags["format"]} if flags.get("format") else {}
    asked |= {f"--{name}": name for name, is_set in (("json", "as_json"), ("quiet", "quiet")) if flags.get(is_set)}
    if len(set(asked.values())) > 1:
        words = " and ".join(f"`{word}`" for word in asked)
        raise UsageError(f"{words} contradict each other", hint="leave only one of them")
    return cast("Style", next(iter(asked.values()), kept) or _usual())


def _usual() -> Style:
    return "human" if sys.stderr.isatty() and not _by_agent() else "plain"


def _by_agent() -> bool:
    """Whether a coding agent has started this process: it reads lines better than a picture that moves.

    The Hub's library knows agents by a list that it downloads; the one that it has kept is enough here.
    """
    if any(map(os.environ.get, AGENT_VARIABLES)):
        return True
    try:
        from huggingface_hub import constants
        from huggingface_hub.utils import is_agent
    except ImportError:  # an older version
        return False
    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        return is_agent()
    finally:
        constants.HF_HUB_OFFLINE = before


# --- JSON's last line -------------------------------------------------------------------------------------------------


def begin() -> None:
    """Forget what an earlier command of this process has answered."""
    _State.answered = False


def answered() -> None:
    """Note that stdout holds the JSON that says how the command has ended."""
    _State.answered = True


def tell_failure(arguments: Sequence[str], told: LowmemAimError, error: BaseException) -> None:
    """Print the error as the last line of JSON, if JSON is asked for and nothing has told it; `arguments`: sys.argv."""
    if _lacks_json(arguments):
        from lowmem_aim.view.feed import failed

        ended = failed(told, error)
        _print(ended if told.exit_code == 1 else replace(ended, traceback=""))  # only a bug's is of use


def tell_interruption(arguments: Sequence[str], exit_code: int) -> None:
    """Print that the command was interrupted, as `tell_failure` does."""
    if _lacks_json(arguments):
        from lowmem_aim.events import RunEnded

        _print(RunEnded("interrupted", exit_code))


def _print(ended: RunEnded) -> None:
    from lowmem_aim.view.record import to_line

    with contextlib.suppress(OSError):
        print(to_line(0.0, ended), flush=True)


def _lacks_json(arguments: Sequence[str]) -> bool:
    return not _State.answered and _asks_for_json(arguments[1:])


def _asks_for_json(arguments: Sequence[str]) -> bool:
    """Whether a command line asks for JSON; the command line may be one that cannot be parsed."""
    words = [*arguments, ""]
    given = [after for word, after in itertools.pairwise(words) if word == "--format"]
    given += [word.removeprefix("--format=") for word in words if word.startswith("--format=")]
    given += ["json"] * ("--json" in words) + ["quiet"] * bool({"--quiet", "-q"} & set(words))
    if given or not RUNS & set(words):
        return "json" in given
    return _kept_json()


def _kept_json() -> bool:
    """Whether the file of defaults asks for JSON; a file that cannot be read asks for nothing."""
    with contextlib.suppress(LowmemAimError):
        return read_defaults().get("format") == "json"
    return False
