"""What a job will take: memory, disk and time, against what this machine has; and which flag to change.

Memory and disk are what the run itself reckons with before it starts. Times are estimates: this disk and device are
measured for two seconds, and the slowest of reading, computing and writing counts, since they overlap.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from lowmem_aim.errors import LowmemAimError

SCHEMA = 1  # of `plan --json`


@dataclass(frozen=True)
class Requirement:
    """So much of one thing, against what there is of it; bytes."""

    what: str  # `RAM`, `VRAM`, `disk`
    least: int  # it does not go with less
    there: int  # the budget, or what is free
    why: str  # what takes it

    @property
    def fits(self) -> bool:
        return self.least <= self.there


@dataclass(frozen=True)
class Step:
    """One phase's time; `limits`: seconds that each stage alone would take."""

    phase: str
    limits: Mapping[str, float]

    @property
    def seconds(self) -> float:
        return max(self.limits.values(), default=0.0)


@dataclass(frozen=True)
class Forecast:
    survey: Mapping[str, Any]
    device: str
    needs: tuple[Requirement, ...]
    problems: tuple[str, ...]  # why it would not run
    hints: tuple[str, ...]
    exit_code: int  # that a merge would end with for them
    steps: tuple[Step, ...] = ()  # none where nothing was measured
    speeds: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        return not self.problems

    def error(self) -> LowmemAimError:
        """Why it would not run."""
        error = LowmemAimError(self.problems, "; ".join(self.hints))
        error.exit_code = self.exit_code
        return error

    def as_json(self) -> dict[str, Any]:
        steps = [asdict(step) | {"seconds": step.seconds} for step in self.steps]
        needs = [asdict(need) | {"fits": need.fits} for need in self.needs]
        return {"plan": SCHEMA, **asdict(self), "needs": needs, "steps": steps, "fits": self.fits}
