"""`pause` and `resume` from another terminal: a request to the run in a folder, and why there is none to ask."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

from lowmem_aim.errors import LowmemAimError, UsageError, printable
from lowmem_aim.output import requests
from lowmem_aim.output.folder import LOG, PRIVATE, check_private, is_finished, outputs_of
from lowmem_aim.output.requests import Word
from lowmem_aim.system.lock import is_held
from lowmem_aim.view.record import runs_in
from lowmem_aim.view.summary import quoted

ANSWER_SECONDS = 5.0  # a run looks for requests ten times a second
_POLL_SECONDS = 0.05
LONGEST_COMMAND = 6000  # characters that are shown


def ask(out: Path, word: Word) -> None:
    """Ask the run in `out` to pause or to go on, and return once it has taken the request.

    `out` is what `status` takes, or the file that `calibrate` is making. Raises UsageError if no run is at work there,
    or the run does not answer; DiskError.
    """
    folders = outputs_of(out)
    running = [folder / PRIVATE for folder in folders if _is_running(folder)]
    if not running:
        raise _nobody_to_ask(out, folders)
    for private in running:
        requests.leave(private, word)
    until = time.monotonic() + ANSWER_SECONDS
    while any(os.path.lexists(private / requests.REQUEST) for private in running) and time.monotonic() < until:
        time.sleep(_POLL_SECONDS)
    left = [requests.withdraw(private) for private in running]
    if all(left):
        raise UsageError(
            f"the run in `{printable(str(out))}` has not answered within {ANSWER_SECONDS:.0f} seconds",
            hint="a run stopped by Ctrl-Z answers once `fg` continues it; a run of a Python script cannot be paused",
        )
    if not any(map(_is_running, folders)):  # a run that ends removes the requests
        raise _nobody_to_ask(out, folders)


def _is_running(folder: Path) -> bool:
    """Whether a run is at work in a folder. Raises DiskError for links in the place of this tool's own files."""
    check_private(folder)
    return is_held(folder / PRIVATE / "lock") and not is_finished(folder)


def _nobody_to_ask(out: Path, folders: Sequence[Path]) -> LowmemAimError:
    """The error for a folder in which no run is at work: whether one has been, and how to go on with it."""
    shown = f"`{printable(str(out))}`"
    been = [folder for folder in folders if os.path.isdir(folder / PRIVATE)]
    if not been:
        return UsageError(
            f"no run is active in {shown}",
            hint="name the output folder of a run; a run that is still reading its inputs cannot be paused yet",
        )
    if all(map(is_finished, been)):
        return UsageError(
            f"the run in {shown} is finished", hint=f"`lowmem-aim verify {quoted(out)}` checks its output"
        )
    return UsageError(f"no run is active in {shown}: it was interrupted", hint=_to_go_on(been))


def _to_go_on(folders: Sequence[Path]) -> str:
    """The command that resumes an interrupted run, from its log."""
    runs = next((runs for folder in folders if (runs := runs_in(folder / PRIVATE / LOG))), None)
    started = runs[-1][0][1] if runs else None
    command = printable(getattr(started, "command", ""), LONGEST_COMMAND)
    return f"to resume it, type: {command}" if command else "give the same command again to resume it"
