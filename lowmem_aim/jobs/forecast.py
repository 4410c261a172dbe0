"""The forecast of a job: memory, disk and time that it takes, against what this machine has; and which flag to change.

Memory and disk are the figures that the run itself checks before it starts. Times are estimates: this disk and device
are measured for two seconds, and the slowest of reading, computing and writing counts, since the three overlap.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from lowmem_aim.errors import LowmemAimError, joined
from lowmem_aim.events import label_of

SCHEMA = 1  # of `plan --json`
MERGE = "merge"  # the phase in which models are merged


@dataclass(frozen=True)
class Requirement:
    """The need of one thing, in bytes, against what there is of it."""

    what: str  # `RAM`, `VRAM`, `disk`
    least: int  # the job does not run with less
    there: int  # the budget, or what is free
    why: str  # what takes it

    @property
    def fits(self) -> bool:
        """Whether there is enough."""
        return self.least <= self.there


@dataclass(frozen=True)
class Step:
    """The time of one phase; `limits` are the seconds that reading, computing or writing alone would take."""

    phase: str
    limits: Mapping[str, float]

    @property
    def seconds(self) -> float:
        """Seconds of the phase: the largest of its limits."""
        return max(self.limits.values(), default=0.0)


@dataclass(frozen=True)
class Forecast:
    """The answer of `plan`: what a merge would do and need, and why it would not run."""

    survey: Mapping[str, Any]
    device: str
    needs: tuple[Requirement, ...]  # none where every output is finished
    problems: tuple[str, ...] = ()  # why it would not run
    hints: tuple[str, ...] = ()  # what to do about each problem
    exit_code: int = 0  # that a merge would end with for them
    steps: tuple[Step, ...] = ()  # none where nothing was measured
    speeds: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()  # what a merge would warn of; told as notices too
    effects: tuple[Mapping[str, Any], ...] = ()  # what each output would keep of each expert (see `jobs.unwritten`)

    @property
    def fits(self) -> bool:
        """Whether the merge would run."""
        return not self.problems

    def error(self) -> LowmemAimError:
        """The problems as one error, with the exit code that a merge would end with."""
        error = LowmemAimError(self.problems, self.hints)
        error.exit_code = self.exit_code
        return error

    def as_json(self) -> dict[str, Any]:
        """The forecast as JSON values, as `plan --json` prints it."""
        steps = [asdict(step) | {"seconds": step.seconds} for step in self.steps]
        needs = [asdict(need) | {"fits": need.fits} for need in self.needs]
        return {"plan": SCHEMA, **asdict(self), "needs": needs, "steps": steps, "fits": self.fits}


def in_all(forecasts: Mapping[str, Forecast], errors: list[LowmemAimError]) -> Forecast:
    """The forecast of all merges of a recipe: by the name of a stage, and "" for the output. `errors` are of any."""
    last, stages = forecasts[""], {name: found for name, found in forecasts.items() if name}
    error = joined(errors) if errors else None
    surveys = {"stages": {name: found.survey for name, found in stages.items()}} if stages else {}
    steps = [replace(step, phase=label_of(step.phase, name)) for name, one in forecasts.items() for step in one.steps]
    return replace(
        last,
        survey={**last.survey, **surveys},
        needs=tuple(_largest(need, stages) for need in last.needs),
        problems=error.problems if error else (),
        hints=error.hints if error else (),
        exit_code=error.exit_code if error else 0,
        steps=tuple(steps) if last.steps else (),
        speeds={name: speed for found in forecasts.values() for name, speed in found.speeds.items()},
        notes=tuple(dict.fromkeys(note for found in forecasts.values() for note in found.notes)),
    )


def _largest(need: Requirement, stages: Mapping[str, Forecast]) -> Requirement:
    """The need of the merge that needs the most; that of disk space is the output's, which counts the stages."""
    if need.what == "disk":
        return need
    others = {name: found for name, one in stages.items() for found in one.needs if found.what == need.what}
    name = max(others, key=lambda name: others[name].least, default="")
    if not name or others[name].least <= need.least:
        return need
    return replace(others[name], there=need.there, why=f"stage `{name}`: {others[name].why}")


# --- several merges ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pass:
    """One pass over the models, of which several outputs are made."""

    read_bytes: int  # once over
    output_bytes: Mapping[str, int]  # name -> bytes of the disk that the output takes


@dataclass(frozen=True)
class ForecastOfMany:
    """The forecast of the merges by several recipes: each pass, and all of them together."""

    passes: tuple[Pass, ...]  # in their order; outputs that are finished are in none
    together: Forecast  # its needs are those of the pass that needs the most, its steps those of all


def in_passes(forecasts: Sequence[Forecast], errors: list[LowmemAimError]) -> Forecast:
    """The forecast of merges that are made one after another, each as a reading of the models; `errors` are of any."""
    last, error = forecasts[-1], joined(errors) if errors else None
    names = [f"reading {number}" for number in range(1, len(forecasts))] + [""]
    steps = [
        replace(step, phase=label_of(step.phase, name))
        for name, one in zip(names, forecasts, strict=True)
        for step in one.steps
    ]
    needs: dict[str, Requirement] = {}
    for need in (need for one in forecasts for need in one.needs):
        if need.what not in needs or need.least > needs[need.what].least:
            needs[need.what] = need
    return replace(
        last,
        needs=tuple(needs.values()),
        problems=error.problems if error else (),
        hints=error.hints if error else (),
        exit_code=error.exit_code if error else 0,
        steps=tuple(steps),
        speeds={name: speed for one in forecasts for name, speed in one.speeds.items()},
        notes=tuple(dict.fromkeys(note for one in forecasts for note in one.notes)),
    )


def read_more_often(forecast: Forecast, times: float) -> Forecast:
    """The forecast of merges that read their models so many times as often."""
    return replace(forecast, steps=tuple(times_of_merge(step, read=times) for step in forecast.steps))


def times_of_merge(step: Step, *, read: float, others: float = 1.0) -> Step:
    """A step of a merge with its reading, and its other limits, so many times as long; any other step as it is."""
    if step.phase.rpartition(": ")[2] != MERGE:
        return step
    return replace(
        step, limits={name: took * (read if name == "read" else others) for name, took in step.limits.items()}
    )
