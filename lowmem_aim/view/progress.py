"""The state of a run, from its events: the source of every screen, `status`, the summary and run.json.

`Progress` is a fold: `see(t, event)` for each event, `t` in seconds since the run began. It asks no clock and no
system, so that a recorded run gives the same picture as a live one.
"""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from lowmem_aim.events import (
    Advanced,
    Event,
    Notice,
    Paused,
    Phase,
    PhaseEnded,
    PhaseStarted,
    Planned,
    PointScored,
    RunEnded,
    RunStarted,
    Sampled,
    Snapshot,
    Stage,
    TensorDone,
    Unit,
    Worked,
)
from lowmem_aim.output.effects import EffectShares
from lowmem_aim.output.heatmap import DeltaSums, joined, shares_by

STAGES: tuple[Stage, ...] = ("read", "compute", "write")
WINDOW_SECONDS = 5.0  # over which rates are averaged
HISTORY = 120  # samples kept for the rates' history
# The time left is estimated from the last minute, or from the last third of the phase if that is longer.
ETA_SECONDS, ETA_SHARE = 60.0, 1 / 3


@dataclass
class PhaseSeen:
    """One phase of a run; `begun` and `ended` are seconds since the run began."""

    phase: Phase
    total: int
    unit: Unit
    begun: float
    done: float  # of `total`
    ended: float | None = None
    before: float = 0.0  # seconds of the same phase for other outputs
    marks: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=4096))  # (working time, done)
    label: str = ""  # the phase, with the name of the recipe's stage

    def seconds(self, now: float) -> float:
        """Seconds that the phase has taken, `now` seconds after the run began."""
        return self.before + (now if self.ended is None else self.ended) - self.begun


@dataclass
class Progress:
    """The state of one run after the events so far."""

    now: float = 0.0  # seconds since it began
    started: RunStarted | None = None
    starting: float = 0.0  # seconds until then, in which the command was loaded
    first_phase_at: float | None = None  # seconds until the first phase began
    planned: Planned | None = None
    phases: dict[str, PhaseSeen] = field(default_factory=dict)  # by label
    samples: deque[tuple[float, Sampled]] = field(default_factory=lambda: deque(maxlen=HISTORY))
    notices: list[Notice] = field(default_factory=list)
    item: str = ""  # being worked on, or finished last
    shape: tuple[int, ...] = ()
    tensors: int = 0  # finished, of all outputs
    earlier: int = 0  # of these, finished by earlier runs
    layers: Counter[str] = field(default_factory=Counter)  # finished tensors of each layer
    kept: dict[tuple[str, str], DeltaSums] = field(default_factory=dict)  # (layer, kind) -> of the first output
    kept_by_output: dict[str, DeltaSums] = field(default_factory=dict)
    effects: EffectShares = field(default_factory=EffectShares)  # of the first output
    snapshot: tuple[float, float] | None = None  # of calibration, the last: when it was made, blocks
    points: dict[str, PointScored] = field(default_factory=dict)  # of a sweep, experts too, in the order of scoring
    paused: bool = False
    idle: float = 0.0  # seconds that the run was paused, until it last went on
    ended: RunEnded | None = None
    _paused_at: float = 0.0

    # -- the fold

    def see(self, t: float, event: Event) -> None:
        """Add an event that came `t` seconds after the run began."""
        self.now = max(self.now, t)
        match event:
            case RunStarted():
                self.started, self.starting = event, t
            case Planned():
                self._plan(event)
            case PointScored():
                self.points[event.name] = event
            case PhaseStarted():
                self.first_phase_at = t if self.first_phase_at is None else self.first_phase_at
                again = self.phases.pop(event.label, None)
                seen = PhaseSeen(event.phase, event.total, event.unit, t, event.done, label=event.label)
                seen.before = again.seconds(t) if again else 0.0
                seen.marks.append((self.working, event.done))
                self.phases[event.label] = seen
                self.item, self.shape = "", ()
            case PhaseEnded():
                self._end(event.label, t)
            case Advanced():
                self._advance(event.done)
                self.item, self.shape = event.item or self.item, ()
            case Snapshot():
                self.snapshot = (t, event.done) if event.done else None
            case TensorDone():
                self._tensor(event)
            case Sampled():
                self._sample(t, event)
            case Paused():
                self._pause(t, event.paused)
            case Notice():
                self.notices.append(event)
            case RunEnded():
                self.ended = event
            case Worked():
                pass

    def _plan(self, event: Planned) -> None:
        if self.planned is not None:  # the next job of a sweep: what was counted is of the one before
            self.tensors, self.earlier = 0, 0
            for counted in (self.layers, self.kept, self.kept_by_output):
                counted.clear()
            self.effects.found.clear()
        self.planned = event

    def _end(self, label: str, t: float) -> None:
        seen = self.phases.get(label)
        if seen:
            seen.ended, seen.done = t, seen.total

    def _advance(self, done: float) -> None:
        current = self.current
        if current and done > current.done:
            current.done = min(done, current.total)
            current.marks.append((self.working, current.done))

    def _tensor(self, event: TensorDone) -> None:
        self.tensors += 1
        self.earlier += event.earlier
        layer = "" if event.layer is None else str(event.layer)
        self.layers[layer] += 1
        if event.kept:
            self.kept_by_output.setdefault(event.output, DeltaSums()).add(event.kept)
            if event.output == next(iter(self.kept_by_output)):
                self.kept.setdefault((layer, event.kind), DeltaSums()).add(event.kept)
        if event.effects and event.output == self._first_output(event.output):
            self.effects.add(event.layer, event.effects)
        if event.earlier and self.current:
            self.current.done = event.done  # the work of an earlier run
            self.current.marks.clear()
            self.current.marks.append((self.working, event.done))
        else:
            self._advance(event.done)
            self.item, self.shape = event.name, event.shape

    def _first_output(self, name: str) -> str:
        """The output whose effects are shown: the first of those that the plan names."""
        outputs = self.planned.about.get("outputs") if self.planned else None
        return str(outputs[0]) if outputs else name

    def expert_names(self) -> list[str]:
        """The labels of the experts, in the recipe's order, as the plan tells them."""
        return [str(name) for name in self.planned.about.get("experts", ())] if self.planned else []

    def _sample(self, t: float, sample: Sampled) -> None:
        self.samples.append((t, sample))
        current = self.current
        if current and current.phase in ("calibrate", "compare", "merge", "evaluate") and sample.item:
            self._advance(sample.done)
            self.item, self.shape = sample.item, sample.shape

    def _pause(self, t: float, paused: bool) -> None:
        if self.paused and not paused:
            self.idle += t - self._paused_at
        self.paused, self._paused_at = paused, t

    # -- what follows from it

    @property
    def working(self) -> float:
        """Seconds since the run began in which it was not paused."""
        return self.now - self.idle - (self.now - self._paused_at if self.paused else 0.0)

    @property
    def current(self) -> PhaseSeen | None:
        """The phase that is under way; None before the first and after the last."""
        seen = next(reversed(self.phases.values()), None)
        return seen if seen and seen.ended is None else None

    @property
    def merging(self) -> bool:
        """Whether a merge has begun, of a stage or of the output."""
        return any(seen.phase == "merge" for seen in self.phases.values())

    @property
    def latest(self) -> Sampled | None:
        """The last sample; None before the first."""
        return self.samples[-1][1] if self.samples else None

    @property
    def warnings(self) -> list[str]:
        """The texts of all warnings, in order."""
        return [notice.text for notice in self.notices if notice.level == "warning"]

    @property
    def planning(self) -> float:
        """Seconds from the start of the run to its first phase: models are opened and compared, memory is shared."""
        return (self.now if self.first_phase_at is None else self.first_phase_at) - self.starting

    def spent(self) -> dict[str, float]:
        """Seconds by part of the run, which add up to `now`: start, plan, the phases, and other for what is between."""
        parts = {"start": self.starting, "plan": self.planning}
        parts |= dict.fromkeys(self.planned.labels if self.planned else (), 0.0)  # in their order; the reused take none
        parts |= {name: seen.seconds(self.now) for name, seen in self.phases.items()}
        return parts | {"other": max(0.0, self.now - sum(parts.values()))}

    def is_reused(self, label: str) -> bool:
        """Whether a planned phase was not needed: one behind it has begun, so what it gives was there already."""
        planned = list(self.planned.labels) if self.planned else []
        if label not in planned or label in self.phases:
            return False
        return any(later in self.phases for later in planned[planned.index(label) + 1 :])

    def left(self) -> float | None:
        """Seconds until the current phase ends, at the pace of its last part; None if that pace is not known."""
        current = self.current
        if current is None or not current.marks or not current.total:
            return None
        begun = current.marks[0][0]
        since = self.working - max(ETA_SECONDS, (self.working - begun) * ETA_SHARE)
        then, done = next(mark for mark in reversed(current.marks) if mark[0] <= since or mark == current.marks[0])
        progress, took = current.done - done, self.working - then
        if progress <= 0 or took <= 0:
            return None
        return (current.total - current.done) / progress * took

    def rate(self, stage: Stage) -> float:
        """Bytes a second of a stage over the last WINDOW_SECONDS."""
        return self._mean(f"{stage}_bytes", self._window())

    def busy(self, stage: Stage) -> float:
        """The share of the last WINDOW_SECONDS in which a stage was at work, in [0, 1]."""
        return min(1.0, self._mean(f"{stage}_seconds", self._window()))

    def bottleneck(self) -> Stage | None:
        """The stage that the others wait for, the busiest; None if even that one is busy less than 30 % of the time."""
        busiest = max(STAGES, key=self.busy)
        return busiest if not self.paused and self.busy(busiest) >= 0.3 else None

    def history(self, stage: Stage, count: int) -> list[float]:
        """Rates of a stage between the last samples, in bytes a second; at most `count` of them."""
        pairs = list(self.samples)[-count - 1 :]
        return [self._mean(f"{stage}_bytes", [a, b]) for a, b in itertools.pairwise(pairs)]

    @property
    def is_measured(self) -> bool:
        """Whether rates are known: of the phase under way only, of which there must be two samples."""
        return len(self._window()) > 1

    def _window(self) -> list[tuple[float, Sampled]]:
        since = self.samples[-1][0] - WINDOW_SECONDS if self.samples else 0.0
        begun = self.current.begun if self.current else 0.0
        return [pair for pair in self.samples if pair[0] >= max(since, begun)]

    @staticmethod
    def _mean(name: str, window: list[tuple[float, Sampled]]) -> float:
        if len(window) < 2 or window[-1][0] <= window[0][0]:
            return 0.0
        (t0, first), (t1, last) = window[0], window[-1]
        return float(getattr(last, name) - getattr(first, name)) / (t1 - t0)

    def kept_share(self) -> float | None:
        """The share of the first output's delta that AIM and ACM have left, in [0, 1]; None before there is any."""
        return joined(self.kept.values()).share

    def kept_by(self, what: int) -> dict[str, float]:
        """The share that is left for each layer (`what` 0) or kind of module (`what` 1), in order of appearance."""
        return shares_by(self.kept, what)


def seen(run: Iterable[tuple[float, Event]]) -> Progress:
    """The state of a recorded run after its last event."""
    progress = Progress()
    for t, event in run:
        progress.see(t, event)
    return progress
