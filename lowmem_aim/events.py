"""Events of a run, as frozen dataclasses: all that a user interface learns about it.

The work emits events; others draw and record them. The same events are the lines of `--json` and of
OUT/.lowmem_aim/run.log (see `view.record` and docs/events.md). Sizes are bytes, times are seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Phase = Literal["plan", "calibrate", "compare", "merge", "finish", "verify", "convert", "fetch", "evaluate"]
Job = Literal["merge", "calibrate", "evaluate", "sweep", "plan"]
Unit = Literal["blocks", "bytes", "files", "data sets", "requests"]
Stage = Literal["read", "compute", "write"]
Outcome = Literal["finished", "interrupted", "failed"]


@dataclass(frozen=True)
class RunStarted:
    """A command has started, or has resumed what an earlier one left unfinished."""

    job: Job
    out: str
    command: str  # what to type to resume the run; "" if it was not started from the command line
    version: str
    pid: int
    started: str  # ISO 8601, UTC


@dataclass(frozen=True)
class Planned:
    """All checks have passed; the event says what the run will do.

    `about` holds details for people and for run.json (see `planning.survey`).
    """

    title: str  # `ties + AIM`
    phases: tuple[Phase, ...]  # those to come, in order
    device: str
    threads: int
    ram_budget: int
    vram_budget: int | None = None
    tensors: int = 0  # of all outputs
    layers: Mapping[str, int] = field(default_factory=dict)  # "0", "1", ... and "" (outside them) -> tensors
    about: Mapping[str, Any] = field(default_factory=dict)
    # The phases before `phases`, of the recipe's named stages or of other readings of the models: (name, phase).
    stages: tuple[tuple[str, Phase], ...] = ()

    @property
    def labels(self) -> tuple[str, ...]:
        """All phases to come, in order, as people read them."""
        return (*(label_of(phase, stage) for stage, phase in self.stages), *self.phases)


@dataclass(frozen=True)
class PhaseStarted:
    """A phase has started: `total` is its amount of work in `unit`, `done` the part that earlier runs have finished."""

    phase: Phase
    total: int
    unit: Unit
    done: float = 0
    stage: str = ""  # the name of the recipe's stage, or of the reading, that the phase belongs to; "": the last

    @property
    def label(self) -> str:
        """The phase as people read it."""
        return label_of(self.phase, self.stage)


@dataclass(frozen=True)
class Advanced:
    """The current phase has advanced: `done` of its units are finished, and `item` names the last one."""

    done: float
    item: str = ""


@dataclass(frozen=True)
class Snapshot:
    """Calibration has kept what is finished: a killed run resumes there. `done` as in Advanced; 0: nothing is kept."""

    done: float


@dataclass(frozen=True)
class TensorDone:
    """A tensor is merged and handed to the disk; `done` is the same as in Advanced."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    action: Literal["merge", "copy"]
    layer: int | None  # None: outside the layers
    kind: str  # the module's name within its layer, or in the model: `self_attn.q_proj`
    done: float
    # Sums of the delta's absolute values before and after AIM and ACM; None: the tensor is not relaxed.
    kept: tuple[float, float] | None = None
    # Of each expert, the share of its effect on its own texts that the merge keeps (None: it has none there); None
    # where no texts are measured.
    effects: tuple[float | None, ...] | None = None
    earlier: bool = False  # found finished when the run began
    output: str = ""  # the folder of this output, if there are several


@dataclass(frozen=True)
class PhaseEnded:
    """A phase has ended."""

    phase: Phase
    stage: str = ""  # as in PhaseStarted

    @property
    def label(self) -> str:
        """The phase as people read it."""
        return label_of(self.phase, self.stage)


@dataclass(frozen=True)
class Worked:
    """A stage has worked on something for `seconds`. These frequent events are added up and never recorded."""

    stage: Stage
    nbytes: int
    seconds: float  # of the stage; the mean of its threads, if several share it
    item: str = ""
    shape: tuple[int, ...] = ()
    done: float | None = None  # of the phase, if it is known more finely than from Advanced


@dataclass(frozen=True)
class Sampled:
    """The state of the run, about once a second. Bytes and seconds of the stages are sums since the run began."""

    done: float  # of the phase
    item: str  # what is being worked on
    shape: tuple[int, ...]
    read_bytes: int
    compute_bytes: int
    write_bytes: int
    read_seconds: float
    compute_seconds: float
    write_seconds: float
    ram: int  # anonymous memory of the process
    ram_peak: int
    file_cache: int  # pages of mapped files that the process has in memory; the system takes them back when it likes
    vram: int | None
    vram_peak: int | None
    disk_free: int | None  # on the filesystem of the output


@dataclass(frozen=True)
class Paused:
    """The user has paused the run, or has let it go on."""

    paused: bool


@dataclass(frozen=True)
class Notice:
    """Something that the user should know and that does not stop the run."""

    text: str
    level: Literal["info", "warning"] = "info"


@dataclass(frozen=True)
class PointScored:
    """A model of a sweep has its scores: an expert, or a point. `front` and `gain` are of what is scored so far."""

    name: str
    scores: Mapping[str, float]  # task -> value
    done: int  # points that are scored
    of: int
    expert: bool = False
    gain: float | None = None  # hypervolume gain over the experts; None: it is an expert, or none can be computed
    front: tuple[str, ...] = ()  # the models that no other is at least as good as on all tasks and better on one
    earlier: bool = False  # scored before the run began


@dataclass(frozen=True)
class RunEnded:
    """The run has ended, whatever the reason: always the last event."""

    outcome: Outcome
    exit_code: int
    problems: tuple[str, ...] = ()
    hint: str = ""
    traceback: str = ""
    error: str = ""  # the first of the problems, for readers that show one line
    hints: tuple[str, ...] = ()  # of each problem; `hint` has each once


Event = (
    RunStarted
    | Planned
    | PhaseStarted
    | Advanced
    | Snapshot
    | TensorDone
    | PhaseEnded
    | Worked
    | Sampled
    | Paused
    | Notice
    | PointScored
    | RunEnded
)
Emit = Callable[[Event], None]


def label_of(phase: str, stage: str) -> str:
    """A phase as people read it: `merge`, or `first: merge` for the stage `first` of a recipe."""
    return f"{stage}: {phase}" if stage else phase


def of_stage(emit: Emit, name: str) -> Emit:
    """An Emit that passes events on as those of a named stage of the recipe; "": as those of the output."""

    def staged(event: Event) -> None:
        emit(replace(event, stage=name) if isinstance(event, PhaseStarted | PhaseEnded) else event)

    return staged


def silent(event: Event) -> None:
    """Ignore `event`: the Emit of callers that show nothing."""
