"""A recorded run, shown again: played faster than it was, or drawn as one picture."""

from __future__ import annotations

import io
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from lowmem_aim.errors import UsageError, printable
from lowmem_aim.events import RunEnded
from lowmem_aim.output.folder import LOG, PRIVATE, outputs_of
from lowmem_aim.system import interrupts
from lowmem_aim.system.files import write_file
from lowmem_aim.system.lock import is_held
from lowmem_aim.view.dashboard import playing
from lowmem_aim.view.plain_lines import Lines
from lowmem_aim.view.progress import Progress, seen
from lowmem_aim.view.record import Timed, runs_in
from lowmem_aim.view.screen import screen
from lowmem_aim.view.status import keeps_something
from lowmem_aim.view.summary import summary_lines
from lowmem_aim.view.terminal import is_interactive
from lowmem_aim.view.wrapping import columns_of

NO_RUN = "a run that has kept something leaves its log in OUT/.lowmem_aim, until `--fresh` discards it"
LONGEST_WAIT = 2.0  # seconds between two events


def run_of(out: Path, number: int = -1) -> list[Timed]:
    """One of the runs in an output's log; `number` counts from 1, or from -1 backwards. Raises UsageError."""
    log = outputs_of(out)[0] / PRIVATE / LOG
    runs = runs_in(log)
    if not runs:
        raise UsageError(f"`{printable(str(out))}` holds no recorded run", hint=NO_RUN)
    if not 1 <= abs(number) <= len(runs):
        raise UsageError(
            f"there is no run {number}: `{printable(str(log))}` has {len(runs)}",
            f"1 is the first run, and {len(runs)} the last",
        )
    run = runs[number - 1 if number > 0 else number]
    return run if run is runs[-1] and is_held(log.with_name("lock")) else _closed(run, keeps_something(log.parents[1]))


def _closed(run: list[Timed], kept: bool) -> list[Timed]:
    """A run that is over, with an end if its log has none: it was killed."""
    last, event = run[-1]
    if isinstance(event, RunEnded):
        return run
    hint = interrupts.message(kept)
    return [*run, (last, RunEnded("interrupted", -1, ("the process was killed: the log has no end",), hint))]


def play(run: Sequence[Timed], speed: float) -> None:
    """Play a run: on a terminal as the dashboard, `speed` times as fast; elsewhere as plain lines, at once.

    The last screen stays, and the summary follows.
    """
    now = 0.0
    if is_interactive():
        with playing(lambda: now) as dashboard:
            for t, event in run:
                time.sleep(min(max(t - now, 0.0) / speed, LONGEST_WAIT))
                now = t
                dashboard(event)
        console = Console(stderr=True)
        console.print(screen(dashboard.progress, console.size.width - 1, console.size.height - 1))
    else:
        lines = Lines(lambda: now)
        for now, event in run:  # noqa: B007  # the lines' clock
            lines(event)
    for line in summary_lines(seen(run), columns_of(sys.stderr)):
        print(line, file=sys.stderr)


def parse_size(text: str) -> tuple[int, int]:
    """Read a size such as `80x24`: (columns, rows). Raises UsageError."""
    match = re.fullmatch(r"(\d{1,4})x(\d{1,4})", text)
    if not match or not 20 <= int(match[1]) <= 500 or not 1 <= int(match[2]) <= 200:
        raise UsageError(f"`{printable(text)}` is not a screen size", hint="write columns x rows, such as 80x24")
    return int(match[1]), int(match[2])


def picture(run: Sequence[Timed], second: float | None, size: tuple[int, int], svg: Path | None = None) -> None:
    """Draw the screen at a second of the run, or at its last event, on stdout or as an SVG file.

    Raises UsageError if the SVG file exists, DiskError if it cannot be written.
    """
    if svg is not None and os.path.lexists(svg):
        raise UsageError(f"`{printable(str(svg))}` exists already", hint="name a new file")
    progress = Progress()
    for t, event in run:
        if second is not None and t > second:
            break
        progress.see(t, event)
    progress.now = max(progress.now, second or 0.0)
    drawn = screen(progress, *size, keys=True)
    if svg is None:
        console = Console(file=sys.stdout, width=size[0], force_terminal=is_interactive() and sys.stdout.isatty())
        console.print(drawn)
        return
    console = Console(record=True, width=size[0], file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(drawn)
    drawing = re.sub(r"@font-face \{.*?\}\s*", "", console.export_svg(title="lowmem-aim"), flags=re.DOTALL)
    write_file(svg, drawing.encode())  # without the fonts that rich would have a browser fetch
