"""What a job will take: memory, disk and time, against what this machine has; and which flag to change.

Memory and disk are what the run itself reckons with before it starts. Times are estimates: this disk and device are
measured for two seconds, and the slowest of reading, computing and writing counts, since they overlap.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from lowmem_aim.errors import LowmemAimError
from lowmem_aim.units import clock, shown

SCHEMA = 1  # of `plan --json`
STARTING_SECONDS = 3.0  # importing torch, opening the models


@dataclass(frozen=True)
class Need:
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
    needs: tuple[Need, ...]
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


def lines(forecast: Mapping[str, Any]) -> Iterator[str]:
    """A Forecast as JSON has it, for people; the survey's lines are `survey.lines`."""
    for need in forecast["needs"]:
        verdict = "fits" if need["fits"] else "DOES NOT FIT"
        amounts = f"{shown(need['least'])} at least, {shown(need['there'])} there"
        yield f"{need['what']:<10}{amounts}: {verdict} ({need['why']})"
    if forecast["steps"]:
        parts = [f"{step['phase']} {clock(step['seconds'])}{_slowest(step)}" for step in forecast["steps"]]
        total = STARTING_SECONDS + sum(step["seconds"] for step in forecast["steps"])
        yield f"time      about {clock(total)} on {forecast['device']}: {', '.join(parts)}"
        yield f"          measured: {', '.join(_speed(name, value) for name, value in forecast['speeds'].items())}"
    for note in forecast["notes"]:
        yield f"note      {note}"
    yield f"verdict   {'it fits' if forecast['fits'] else 'it would not run: see below'}"


def _slowest(step: Mapping[str, Any]) -> str:
    limits = step["limits"]
    return f" (limit: {max(limits, key=limits.__getitem__)})" if len(limits) > 1 else ""


def _speed(name: str, value: float) -> str:
    if name == "compute":
        return f"computing {value / 1e6:.0f} M elements/s"
    if name.startswith("forward"):
        return f"{name} {value / 1e9:.0f} GFLOP/s"
    return f"{name} {shown(value)}/s"
