"""The plan of a sweep: how many points, how often the inputs are read, disk, memory and time; nothing is done."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lowmem_aim.events import Emit, silent
from lowmem_aim.jobs.evaluation_plan import EvaluationPlan, plan_evaluation
from lowmem_aim.jobs.forecast import Forecast, Pass, Step
from lowmem_aim.jobs.headers import Headers
from lowmem_aim.jobs.plan import MEASURED_SECONDS
from lowmem_aim.jobs.swept import Checked, Swept, checked, largest, unused_file
from lowmem_aim.output.sweep_folder import has_scores_of_expert, is_scored
from lowmem_aim.system.options import DEFAULTS, Options

SCHEMA = 1  # of `sweep --plan --json`


@dataclass(frozen=True)
class SweepTime:
    """The time of a sweep, estimated: merges and models one after the other. All in seconds."""

    start: float  # what is done before any work
    merges: float
    models: int  # that are to be scored
    each: EvaluationPlan | None  # the cost of one of them; None: unknown, or none is left

    @property
    def seconds(self) -> float | None:
        """All that is known, without what models write; None: unknown."""
        each = self.each.seconds if self.each else None
        return None if each is None and self.models else self.start + self.merges + self.models * (each or 0.0)

    @property
    def writing_seconds(self) -> float | None:
        """The most seconds in which models write; None: unknown."""
        each = self.each.writing_seconds if self.each else None
        return None if each is None and self.models else self.models * (each or 0.0)

    def as_json(self) -> dict[str, Any]:
        """The time as JSON values."""
        each = self.each.as_json() if self.each else None
        return {**asdict(self), "each": each, "seconds": self.seconds, "writing_seconds": self.writing_seconds}


@dataclass(frozen=True)
class SweepPlan:
    """The plan of a sweep: all that it would do and need."""

    points: Sequence[str]
    families: int  # unrelaxed merges
    relaxed: int  # points with AIM or ACM
    controls: int
    scored: int  # points, by an earlier run
    experts: Sequence[str]  # that are scored first
    tasks: Sequence[str]
    batches: Sequence[Pass]  # each reads the inputs once
    merges: Forecast | None  # None: nothing is left to merge
    kept: int  # merged models that stay beside a batch
    time: SweepTime

    @property
    def read_bytes(self) -> int:
        """Bytes read of the inputs, for all merges."""
        return sum(batch.read_bytes for batch in self.batches)

    @property
    def disk_bytes(self) -> int:
        """The most bytes of merged models at a time."""
        batches = [sum(batch.output_bytes.values()) for batch in self.batches]
        return max(batches, default=0) + self.kept * largest(self.batches)

    def as_json(self) -> dict[str, Any]:
        """The plan as JSON values, as `sweep --plan --json` prints it."""
        merges = self.merges.as_json() if self.merges else None
        figures = {"read_bytes": self.read_bytes, "disk_bytes": self.disk_bytes}
        return {"sweep_plan": SCHEMA, **asdict(self), **figures, "merges": merges, "time": self.time.as_json()}


def plan_sweep(swept: Swept, out: Path, options: Options = DEFAULTS, emit: Emit = silent) -> SweepPlan:
    """Find out what `sweep` with the same arguments would do and need. Raises what it would raise before work."""
    begun, points = time.perf_counter(), swept.points
    with contextlib.ExitStack() as stack:
        hub = Headers(stack)
        ready = checked(swept, out, options, emit, measure=True, find=hub.find)
        start = time.perf_counter() - begun
        scored = 0 if options.fresh else sum(is_scored(out, point.name) for point in points)
        models = len(points) - scored + experts_left(ready, out, options)
        merges = ready.merges.together
        spent = time_of(merges, start, models, evaluation(swept, ready, models, out, options, hub))
    return SweepPlan(
        [point.name for point in points],
        len({point.family for point in points}),
        sum(point.recipe.relaxed and not point.is_control for point in points),
        sum(point.is_control for point in points),
        scored,
        [*ready.experts],
        swept.asked.names,
        ready.merges.batches,
        merges,
        _kept(swept, ready.merges.batches, out),
        spent,
    )


def _kept(swept: Swept, batches: Sequence[Pass], out: Path) -> int:
    """The merged models that are on the disk beside the largest batch: those that stay, and those of other workers."""
    one = largest(batches)
    if len(batches) < 2 or not one:
        return 0
    if swept.ray:
        return min(len(batches), max(1, swept.room(out) // one)) - 1
    if swept.keep == "all":
        sizes = [len(batch.output_bytes) for batch in batches]
        return sum(sizes) - max(sizes)
    return swept.staying


def experts_left(ready: Checked, out: Path, options: Options) -> int:
    """The number of experts that are not scored yet."""
    return sum(options.fresh or not has_scores_of_expert(out, name) for name in ready.experts)


def evaluation(
    swept: Swept, ready: Checked, models: int, out: Path, options: Options, hub: Headers
) -> EvaluationPlan | None:
    """The cost of scoring one model, by the first expert; None if there is nothing to score, or no expert."""
    if not models or not ready.experts:
        return None
    reference = next(iter(ready.experts.values()))
    return plan_evaluation(reference, swept.asked, swept.forwards, options, unused_file(out), hub.find)


def time_of(merges: Forecast | None, start: float, models: int, each: EvaluationPlan | None) -> SweepTime:
    """The time of a sweep with these merges; `start`: the seconds in which it was checked, and the merges measured."""
    steps: Sequence[Step] = merges.steps if merges else ()
    return SweepTime(
        max(0.0, start - 2 * MEASURED_SECONDS * bool(steps)), sum(step.seconds for step in steps), models, each
    )
