"""What a run looks like: a live dashboard on a terminal, plain lines elsewhere, JSON lines for programs.

All three draw the same events, and nothing else.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Literal, Protocol

from rich.console import Console
from rich.live import Live
from rich.text import Text

from lowmem_aim import interrupts, terminal
from lowmem_aim.errors import printable
from lowmem_aim.events import Event, Notice, PhaseEnded, PhaseStarted, Planned, RunStarted, Sampled, Worked
from lowmem_aim.progress import PhaseSeen, Progress
from lowmem_aim.record import to_line
from lowmem_aim.screen import screen
from lowmem_aim.units import clock, shown

SECONDS_BETWEEN_LINES = 30.0
REFRESH_SECONDS = 0.5  # a picture takes some milliseconds to draw
Style = Literal["auto", "json", "quiet"]


class View(Protocol):
    """An Emit that shows what it is told; `progress` is what it has been told."""

    progress: Progress

    def __call__(self, event: Event) -> None: ...


@contextlib.contextmanager
def showing(style: Style) -> Iterator[View]:
    """The View for this process's terminal, or pipe."""
    clock_ = _seconds_since(time.monotonic())
    if style == "quiet":
        yield Quiet(clock_)
    elif style == "json":
        yield JsonLines(clock_)
    elif terminal.is_interactive():
        with _live(clock_) as dashboard:
            yield dashboard
    else:
        lines = Lines(clock_)
        with interrupts.telling(lines.tell):
            yield lines


def _seconds_since(began: float) -> Callable[[], float]:
    return lambda: time.monotonic() - began


class Quiet:
    """Shows nothing."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.progress, self.clock = Progress(), clock

    def __call__(self, event: Event) -> None:
        self.progress.see(self.clock(), event)


class JsonLines(Quiet):
    """Every event but the frequent ones on stdout, as `record` writes them."""

    def __call__(self, event: Event) -> None:
        super().__call__(event)
        if not isinstance(event, Worked):
            print(to_line(self.clock(), event), flush=True)


# --- plain lines ------------------------------------------------------------------------------------------------------


class Lines(Quiet):
    """Phase changes, notices, and a line at most every SECONDS_BETWEEN_LINES. No escape bytes."""

    def __init__(self, clock: Callable[[], float]) -> None:
        super().__init__(clock)
        self._last = 0.0

    def __call__(self, event: Event) -> None:
        super().__call__(event)
        now = self.progress.now
        if isinstance(event, PhaseStarted):
            self._last = now
            _print(f"{event.phase}: {_amount(self.progress.phases[event.phase])}")
        elif isinstance(event, PhaseEnded):
            seen = self.progress.phases.get(event.phase)
            _print(f"{event.phase}: done in {clock(now - seen.begun if seen else 0.0)}")
        elif isinstance(event, Notice):
            _print(f"{'warning: ' * (event.level == 'warning')}{printable(event.text, 500)}")
        elif isinstance(event, Sampled) and now - self._last >= SECONDS_BETWEEN_LINES:
            self._last = now
            _print(line_of(self.progress))

    def tell(self) -> None:
        """Now, because somebody asks (SIGUSR1)."""
        _print(line_of(self.progress))


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _amount(seen: PhaseSeen) -> str:
    if seen.unit == "bytes":
        return f"{shown(seen.done)} of {shown(seen.total)}"
    return f"{seen.done:.0f} of {seen.total} {seen.unit}"


def line_of(run: Progress) -> str:
    """How a run stands, in a line."""
    current, latest = run.current, run.latest
    if current is None:
        return f"{'planning' if not run.phases else 'done'}, {clock(run.now)}"
    left = run.left()
    parts = [f"{current.phase}: {_amount(current)}"]
    parts += ["paused" if run.paused else f"{clock(left)} left" if left is not None else ""]
    if latest:
        rates = [f"{stage} {shown(rate)}/s" for stage in ("read", "write") if (rate := run.rate(stage))]
        budget = f" of {shown(run.planned.ram_budget)}" if run.planned else ""
        parts += [", ".join(rates), f"RAM {shown(latest.ram)}{budget}"]
        parts += [f"VRAM {shown(latest.vram)}"] if latest.vram is not None else []
    return "; ".join(part for part in [*parts, printable(run.item, 80)] if part)


# --- the dashboard ----------------------------------------------------------------------------------------------------


class Dashboard(Quiet):
    """Draws the screen twice a second, in a thread of its own, below what is printed meanwhile."""

    def __init__(self, clock: Callable[[], float], console: Console) -> None:
        super().__init__(clock)
        self.console = console
        self.keys = False
        self._lock = threading.RLock()
        self._size = console.size
        self._live: Live | None = None
        self._stop = threading.Event()

    def __call__(self, event: Event) -> None:
        with self._lock:
            super().__call__(event)
        if isinstance(event, Notice) and event.level == "info":
            # As a Text: in a str, names would be taken for markup and emoji.
            self.console.print(Text(printable(event.text, 500), style="dim"))
        elif isinstance(event, PhaseStarted | Planned | RunStarted):
            self.draw()

    def picture(self) -> Text:
        with self._lock:
            self.progress.now = max(self.progress.now, self.clock())
            width, height = self.console.size
            # A column and a line less than there are: a full last line would scroll.
            return screen(self.progress, width - 1, height - 1, self.keys)

    def start(self) -> None:
        self._live = Live(
            get_renderable=self.picture,
            console=self.console,
            auto_refresh=False,
            transient=True,
            vertical_overflow="crop",
            redirect_stdout=False,
        )
        self._live.start()

    def stop(self) -> None:
        live, self._live = self._live, None
        if live:
            live.stop()

    def draw(self) -> None:
        with self._lock:
            if self._live is None:
                return
            if self.console.size != self._size:  # what was drawn may have been wrapped anew: nobody knows where it is
                self._size = self.console.size
                self.stop()
                self.console.clear()
                self.start()
            if self._live:
                self._live.refresh()

    def tell(self) -> None:
        self.console.print(Text(line_of(self.progress)))

    def draw_on(self) -> None:
        """Until `end`."""
        while not self._stop.wait(REFRESH_SECONDS):
            try:
                self.draw()
            except OSError:  # the terminal is gone; the run is not
                return

    def end(self) -> None:
        self._stop.set()
        with self._lock, contextlib.suppress(OSError):
            self.stop()


@contextlib.contextmanager
def _live(clock: Callable[[], float]) -> Iterator[Dashboard]:
    dashboard = Dashboard(clock, Console(stderr=True))
    drawing = threading.Thread(target=dashboard.draw_on, daemon=True, name="draw")
    actions = {"q": terminal.stop_run, "p": interrupts.toggle_pause}
    with (
        interrupts.restoring(dashboard.end),
        terminal.keys(actions) as dashboard.keys,
        terminal.suspendable(dashboard.stop, dashboard.start),
        interrupts.telling(dashboard.tell),
    ):
        dashboard.start()
        drawing.start()
        yield dashboard
