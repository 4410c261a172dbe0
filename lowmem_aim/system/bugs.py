"""The traceback of a bug, kept for a report: in the run's log, or else in one file in the cache folder."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path

import lowmem_aim
from lowmem_aim.errors import printable

NAME = "last-error.log"
LONGEST_LINE = 2000  # characters
_LOGGED = "its traceback is in "


def note_log(error: BaseException, log: Path) -> None:
    """Add a note to `error`: the run's log, which outlives the run, holds its traceback."""
    error.add_note(f"{_LOGGED}{log}")


def _noted(error: BaseException) -> Path | None:
    logs = (note.removeprefix(_LOGGED) for note in getattr(error, "__notes__", ()) if note.startswith(_LOGGED))
    return next(map(Path, logs), None)


def hint(error: BaseException, command: str, debug: bool) -> str:
    """Advice for the user about a bug. Without `debug` it names the file that holds the traceback."""
    if debug:
        return "this is a bug: report it with the traceback below"
    file = _noted(error) or _keep(error, command)
    if file is None:
        return "this is a bug: run again with `--debug` and report what it prints"
    return f"this is a bug: report it with its traceback, which is in `{printable(str(file), LONGEST_LINE)}`"


def _keep(error: BaseException, command: str) -> Path | None:
    """Write the traceback to the cache folder, replacing the last one; None if no file can be written."""
    try:
        from lowmem_aim.system.files import cache_folder, write_file  # here and not above: `--help` must start fast

        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        text = f"lowmem-aim {lowmem_aim.__version__}\n{command}\n\n{_traceback(error)}"
        write_file(folder / NAME, text.encode("utf-8", "backslashreplace"))
    except Exception:  # no home, no space, no permission: none of these may hide the error
        return None
    return folder / NAME


def print_traceback(error: BaseException) -> None:
    """Print the traceback on stderr, with everything that came from files escaped."""
    print("", *(printable(line, LONGEST_LINE) for line in _traceback(error).splitlines()), sep="\n", file=sys.stderr)


def _traceback(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))
