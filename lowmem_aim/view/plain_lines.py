"""A run as plain lines without escape bytes, for logs and pipes, and as lines of JSON, for programs."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Protocol

from lowmem_aim.errors import printable
from lowmem_aim.events import (
    Event,
    Notice,
    Paused,
    PhaseEnded,
    PhaseStarted,
    Planned,
    PointScored,
    Sampled,
    Stage,
    Worked,
)
from lowmem_aim.units import clock, shown
from lowmem_aim.view import plan_lines as survey
from lowmem_aim.view.point_rows import line_of_point
from lowmem_aim.view.progress import PhaseSeen, Progress
from lowmem_aim.view.record import to_line
from lowmem_aim.view.wrapping import for_terminal

SECONDS_BETWEEN_LINES = 30.0
RATES: tuple[Stage, ...] = ("read", "write")


class View(Protocol):
    """An Emit that shows the events it gets; `progress` is the state of the run after them."""

    progress: Progress

    def __call__(self, event: Event) -> None: ...


class Quiet:
    """A View that shows nothing."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.progress, self.clock = Progress(), clock

    def __call__(self, event: Event) -> None:
        self.progress.see(self.clock(), event)


class JsonLines(Quiet):
    """A View that prints events as lines of JSON on stdout (see `record`), all but the frequent ones."""

    def __call__(self, event: Event) -> None:
        super().__call__(event)
        if not isinstance(event, Worked):
            with contextlib.suppress(OSError):
                print(to_line(self.clock(), event), flush=True)


class Lines(Quiet):
    """A View that prints phase changes, notices and progress, the latter at most every SECONDS_BETWEEN_LINES."""

    def __init__(self, clock: Callable[[], float]) -> None:
        super().__init__(clock)
        self._last = 0.0
        self._reused: set[str] = set()

    def __call__(self, event: Event) -> None:
        super().__call__(event)
        now = self.progress.now
        if isinstance(event, Planned):
            again = self.progress.points  # of a sweep, whose jobs are all on the same machine
            _print(*([printable(event.title)] if again else first_lines(event)), indent=survey.INDENT)
        elif isinstance(event, PointScored):
            _print(line_of_point(event))
        elif isinstance(event, Paused):
            _print("paused" if event.paused else "going on")
        elif isinstance(event, PhaseStarted):
            self._last = now
            self._tell_reused()
            _print(f"{printable(event.label)}: {_amount(self.progress.phases[event.label])}")
        elif isinstance(event, PhaseEnded):
            seen = self.progress.phases.get(event.label)
            _print(f"{printable(event.label)}: done in {clock(now - seen.begun if seen else 0.0)}")
        elif isinstance(event, Notice):
            _print(f"{'warning: ' * (event.level == 'warning')}{printable(event.text, 500)}")
        elif isinstance(event, Sampled) and now - self._last >= SECONDS_BETWEEN_LINES:
            self._last = now
            _print(line_of(self.progress))

    def _tell_reused(self) -> None:
        """Print which phases were not needed, each once."""
        for phase in self.progress.planned.labels if self.progress.planned else ():
            if self.progress.is_reused(phase) and phase not in self._reused:
                self._reused.add(phase)
                _print(f"{printable(phase)}: reused")

    def tell(self) -> None:
        """Print the progress now, because the user asks for it (SIGUSR1)."""
        _print(line_of(self.progress))


def _print(*lines: str, indent: int = 2) -> None:
    with contextlib.suppress(OSError):  # nobody reads any more; the run goes on all the same
        print(for_terminal(lines, indent, sys.stderr), file=sys.stderr, flush=True)


def _amount(seen: PhaseSeen) -> str:
    share = f"{min(seen.done / seen.total, 1.0):.0%}, " if seen.total and seen.done else ""
    if seen.unit == "bytes":
        return f"{share}{shown(seen.done)} of {shown(seen.total)}"
    done = f"{seen.done:.1f}" if seen.unit == "blocks" and seen.done % 1 else f"{seen.done:.0f}"  # as on the screen
    return f"{share}{done} of {seen.total} {seen.unit}"


def line_of(run: Progress) -> str:
    """The state of a run in one line."""
    current, latest = run.current, run.latest
    if current is None:
        state = run.ended.outcome if run.ended else "planning" if not run.phases else "between two phases"
        return f"{state}, {clock(run.now)}"
    left = run.left()
    parts = [f"{printable(current.label)}: {_amount(current)}"]
    parts += ["paused" if run.paused else f"{clock(left)} left" if left is not None else ""]
    if latest:
        rates = [f"{stage} {shown(rate)}/s" for stage in RATES if (rate := run.rate(stage))]
        budget = f" of {shown(run.planned.ram_budget)}" if run.planned else ""
        parts += [", ".join(rates), f"RAM {shown(latest.ram)}{budget}"]
        parts += [f"VRAM {shown(latest.vram)}"] if latest.vram is not None else []
    return "; ".join(part for part in [*parts, printable(run.item, 80)] if part)


def first_lines(planned: Planned) -> Iterator[str]:
    """The lines that say what a run is going to do, before it begins."""
    with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError):  # an event of another version
        yield from list(survey.survey_lines(planned.about)) if planned.about else ()
    vram = f", VRAM {shown(planned.vram_budget)}" if planned.vram_budget else ""
    where = f"{printable(planned.device)} with {planned.threads} threads"
    yield f"budget    RAM {shown(planned.ram_budget)}{vram}; on {where}"
    yield ""
