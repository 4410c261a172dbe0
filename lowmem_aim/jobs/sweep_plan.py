"""The plan of a sweep: how many points, how often the inputs are read, disk, memory and time; nothing is done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lowmem_aim.events import Emit, silent
from lowmem_aim.jobs.forecast import Forecast, Pass
from lowmem_aim.jobs.swept import Swept, checked, largest
from lowmem_aim.output.sweep_folder import is_scored
from lowmem_aim.system.options import DEFAULTS, Options

SCHEMA = 1  # of `sweep --plan --json`


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
        return {"sweep_plan": SCHEMA, **asdict(self), **figures, "merges": merges}


def plan_sweep(swept: Swept, out: Path, options: Options = DEFAULTS, emit: Emit = silent) -> SweepPlan:
    """Find out what `sweep` with the same arguments would do and need. Raises what it would raise before work."""
    ready = checked(swept, out, options, emit, measure=True)
    points = swept.points
    batches = ready.merges.batches
    total = sum(sum(batch.output_bytes.values()) for batch in batches)
    return SweepPlan(
        [point.name for point in points],
        len({point.family for point in points}),
        sum(point.recipe.relaxed and not point.is_control for point in points),
        sum(point.is_control for point in points),
        sum(is_scored(out, point.name) for point in points),
        [*ready.experts],
        swept.asked.names,
        batches,
        ready.merges.together,
        0 if swept.keep == "all" or len(batches) < 2 or not total else swept.staying,
    )
