"""What a run looks like on stderr: rich progress bars on a terminal, plain lines elsewhere. Both draw `events` only."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich import filesize
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from lowmem_aim.errors import printable
from lowmem_aim.events import Advanced, Emit, Event, Notice, PhaseEnded, PhaseStarted, silent

SECONDS_BETWEEN_LINES = 30.0


@contextmanager
def shown(quiet: bool) -> Iterator[Emit]:
    """The Emit for this process's stderr: bars, plain lines, or nothing."""
    if quiet:
        yield silent
        return
    if sys.stderr.isatty() and os.environ.get("TERM") != "dumb" and not os.environ.get("CI"):
        bars = _Bars()
        with bars.progress:
            yield bars
    else:
        yield _Lines()


def _amount(done: float, total: float, unit: str) -> str:
    if unit == "bytes":
        return f"{filesize.decimal(int(done))} of {filesize.decimal(int(total))}"
    return f"{done:.0f} of {total:.0f} {unit}"


class _Bars:
    """An Emit that draws one bar a phase."""

    def __init__(self) -> None:
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description:<9}"),
            BarColumn(),
            TextColumn("{task.fields[amount]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[item]}", style="dim", markup=False),
            console=Console(stderr=True),
        )
        self._bar: TaskID | None = None
        self._phase: PhaseStarted | None = None

    def __call__(self, event: Event) -> None:
        if isinstance(event, PhaseStarted):
            self._phase = event
            amount = _amount(0, event.total, event.unit)
            self._bar = self.progress.add_task(event.phase, total=event.total, amount=amount, item="")
        elif isinstance(event, Notice):
            colour = {"warning": "yellow", "info": "dim"}[event.level]
            # As a Text: in a str, names would be taken for markup and emoji.
            self.progress.console.print(Text(printable(event.text, 500), style=colour))
        elif self._bar is not None and self._phase is not None:
            phase = self._phase
            done = event.done if isinstance(event, Advanced) else phase.total
            item = printable(event.item, 60) if isinstance(event, Advanced) else ""
            amount = _amount(done, phase.total, phase.unit)
            self.progress.update(self._bar, completed=done, amount=amount, item=item)


class _Lines:
    """An Emit that prints phase changes, notices, and a line at most every SECONDS_BETWEEN_LINES. No escape bytes."""

    def __init__(self) -> None:
        self._phase: PhaseStarted | None = None
        self._last = self._begun = time.monotonic()

    def __call__(self, event: Event) -> None:
        now = time.monotonic()
        if isinstance(event, PhaseStarted):
            self._phase, self._begun, self._last = event, now, now
            self._print(f"{event.phase}: {_amount(0, event.total, event.unit)}")
        elif isinstance(event, PhaseEnded):
            self._print(f"{event.phase}: done in {now - self._begun:.1f} s")
        elif isinstance(event, Notice):
            self._print(f"{'warning: ' * (event.level == 'warning')}{printable(event.text, 500)}")
        elif self._phase and now - self._last >= SECONDS_BETWEEN_LINES:
            self._last = now
            amount = _amount(event.done, self._phase.total, self._phase.unit)
            self._print(f"{self._phase.phase}: {amount}  {printable(event.item, 60)}")

    def _print(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)
