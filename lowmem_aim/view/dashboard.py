"""A run on the screen: a live dashboard on a terminal, and plain lines elsewhere. Both draw events only."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Literal

from rich.cells import cell_len
from rich.console import Console
from rich.live import Live
from rich.text import Text

from lowmem_aim.errors import printable
from lowmem_aim.events import Event, Notice, Paused, PhaseStarted, Planned, RunStarted
from lowmem_aim.system import beginning, interrupts
from lowmem_aim.view import terminal
from lowmem_aim.view.plain_lines import JsonLines, Lines, Quiet, View, first_lines, line_of
from lowmem_aim.view.plan_lines import INDENT
from lowmem_aim.view.screen import screen
from lowmem_aim.view.wrapping import wrapped

REFRESH_SECONDS = 1.0  # samples come as often; a picture takes up to 10 ms to draw
Style = Literal["human", "plain", "json", "quiet"]


@contextlib.contextmanager
def showing(style: Style) -> Iterator[View]:
    """The View of `style`; `human` is the dashboard if this process has a terminal, and plain lines if not."""
    clock_ = _seconds_since(beginning.began())
    if style == "quiet":
        yield Quiet(clock_)
    elif style == "json":
        yield JsonLines(clock_)
    elif style == "human" and terminal.is_interactive():
        with _live(clock_) as dashboard:
            yield dashboard
    else:
        lines = Lines(clock_)
        with interrupts.telling(lines.tell):
            yield lines


def _seconds_since(began: float) -> Callable[[], float]:
    return lambda: time.monotonic() - began


# --- the dashboard ----------------------------------------------------------------------------------------------------


class Dashboard(Quiet):
    """A View that draws the screen once a second, in a thread of its own, below what is printed meanwhile."""

    def __init__(
        self, clock: Callable[[], float], console: Console, foreground: Callable[[], bool] = lambda: True
    ) -> None:
        super().__init__(clock)
        self.console = console
        self.keys = False
        self._lock = threading.RLock()
        self._size = console.size
        self._live: Live | None = None
        self._drawn: list[int] = []  # columns of each line of the last picture
        self._away = False
        self._foreground = foreground
        self._stop = threading.Event()

    def __call__(self, event: Event) -> None:
        with self._lock:
            super().__call__(event)
        with contextlib.suppress(OSError):  # the terminal is gone; the run goes on all the same
            self._show(event)

    def _show(self, event: Event) -> None:
        if isinstance(event, Notice) and event.level == "info":
            # A Text: in a str, rich would take names for markup and emoji.
            self.console.print(Text(printable(event.text, 500), style="dim"))
        elif isinstance(event, Planned):
            told = wrapped(first_lines(event), self.console.size.width, INDENT)
            self.console.print(Text("\n".join(told), no_wrap=True, overflow="ellipsis"))
        elif isinstance(event, PhaseStarted | RunStarted | Paused):
            self.draw()

    def picture(self) -> Text:
        """The screen as it is now, in the size of the window."""
        with self._lock:
            self.progress.now = max(self.progress.now, self.clock())
            width, height = self.console.size
            # A column and a line less than there are: a full last line would scroll.
            drawn = screen(self.progress, width - 1, height - 1, self.keys and terminal.listens())
            self._drawn = [cell_len(line) for line in drawn.plain.split("\n")]
            return drawn

    def start(self) -> None:
        """Begin to draw."""
        with self._lock:
            self._live = Live(
                get_renderable=self.picture,
                console=self.console,
                auto_refresh=False,
                transient=True,
                vertical_overflow="crop",
                redirect_stdout=False,
            )
            self._live.start()
            self.console.show_cursor(True)  # else a killed process would leave a terminal without one

    def stop(self) -> None:
        """Take the picture off the terminal; `start` brings it back."""
        with self._lock:
            live, self._live = self._live, None
            if live:
                live.stop()

    def draw(self) -> None:
        """Draw the screen, if the terminal is ours: in the background it shows the shell's prompt."""
        with self._lock:
            if self._away or self._stop.is_set():
                return
            if not self._foreground():
                self.stop()
            elif self._live is None:
                self.start()
            elif self.console.size != self._size:
                self._draw_anew(self._live)
            else:
                self._live.refresh()
            self._size = self.console.size

    def _draw_anew(self, live: Live) -> None:
        """Draw after the window has changed its size, which may have wrapped the lines of the last picture."""
        width = max(self.console.size.width, 1)
        rows = sum(max(1, -(-cells // width)) for cells in self._drawn)
        self.console.file.write(f"\r\x1b[{max(rows - 1, 0)}A\x1b[J" if rows > 1 else "\r\x1b[J")
        live._live_render._shape = None  # else rich would move up by the lines of the last picture
        live.refresh()

    def leave(self) -> None:
        """Leave the terminal to other processes until `come_back`."""
        self._away = True
        self.stop()

    def come_back(self) -> None:
        """Draw again after `leave`."""
        self._away = False
        self.draw()

    def tell(self) -> None:
        """Print the state of the run in one line."""
        self.console.print(Text(line_of(self.progress)))

    def draw_on(self) -> None:
        """Draw once a second until `end`."""
        while not self._stop.wait(REFRESH_SECONDS):
            try:
                self.draw()
            except OSError:  # the terminal is gone; the run is not
                return
            except RuntimeError:  # a signal's handler is drawing
                continue

    def end(self) -> None:
        """Take the picture off the terminal for good."""
        self._stop.set()
        with self._lock, contextlib.suppress(OSError):
            self.stop()


@contextlib.contextmanager
def playing(clock: Callable[[], float]) -> Iterator[Dashboard]:
    """Show a dashboard that follows another clock, for a run that is over."""
    dashboard = Dashboard(clock, Console(stderr=True))
    with interrupts.restoring(dashboard.end):
        dashboard.start()
        threading.Thread(target=dashboard.draw_on, daemon=True, name="draw").start()
        yield dashboard


@contextlib.contextmanager
def _live(clock: Callable[[], float]) -> Iterator[Dashboard]:
    dashboard = Dashboard(clock, Console(stderr=True), terminal.in_foreground)
    drawing = threading.Thread(target=dashboard.draw_on, daemon=True, name="draw")
    actions = {"q": terminal.stop_run, "p": interrupts.toggle_pause}
    with (
        interrupts.restoring(dashboard.end),
        terminal.keys(actions) as dashboard.keys,
        terminal.suspendable(dashboard.leave, dashboard.come_back),
        interrupts.telling(dashboard.tell),
    ):
        dashboard.draw()
        drawing.start()
        yield dashboard
