"""All that a user interface may see of a run: frozen dataclasses, emitted by the work, drawn and recorded by others.

The same events are the lines of `--json` and of OUT/.lowmem_aim/run.log (see `record` and docs/events.md). Sizes are
bytes, times are seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Phase = Literal["plan", "calibrate", "compare", "merge", "finish", "verify"]
Unit = Literal["blocks", "bytes", "files"]
Stage = Literal["read", "compute", "write"]
Outcome = Literal["finished", "interrupted", "failed"]


@dataclass(frozen=True)
class RunStarted:
    """A command begins, or goes on with what an earlier one has left."""

    job: Literal["merge", "calibrate"]
    out: str
    command: str  # what to type to go on with it; "" where it was not typed
    version: str
    pid: int
    started: str  # ISO 8601, UTC


@dataclass(frozen=True)
class Planned:
    """Everything is checked; this is what will be done. `about` is for people and for run.json (see `survey`)."""

    title: str  # `ties + AIM`
    phases: tuple[Phase, ...]  # those to come, in order
    device: str
    threads: int
    ram_budget: int
    vram_budget: int | None = None
    tensors: int = 0  # of all outputs
    layers: Mapping[str, int] = field(default_factory=dict)  # "0", "1", ... and "" (outside them) -> tensors
    about: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PhaseStarted:
    """A phase begins; `total` is its amount of work in `unit`s, `done` what earlier runs have done of it."""

    phase: Phase
    total: int
    unit: Unit
    done: float = 0


@dataclass(frozen=True)
class Advanced:
    """`done` of the current phase's units are finished so far; `item` names the last one."""

    done: float
    item: str = ""


@dataclass(frozen=True)
class TensorDone:
    """A tensor is merged and handed to the disk; `done` as in Advanced."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    action: Literal["merge", "copy"]
    layer: int | None  # None: outside the layers
    kind: str  # the module's name within its layer, or in the model: `self_attn.q_proj`
    done: float
    # How much of the delta is left by AIM and ACM: sums of absolute values before and after; None: not relaxed.
    kept: tuple[float, float] | None = None
    earlier: bool = False  # found finished when the run began
    output: str = ""  # of several omegas: the folder


@dataclass(frozen=True)
class PhaseEnded:
    phase: Phase


@dataclass(frozen=True)
class Worked:
    """One stage has been at work on something for so long. Frequent: these are added up, and never recorded."""

    stage: Stage
    nbytes: int
    seconds: float  # of the stage: where several threads share it, their mean
    item: str = ""
    shape: tuple[int, ...] = ()
    done: float | None = None  # of the phase, where it is known more finely than by Advanced


@dataclass(frozen=True)
class Sampled:
    """How things stand, about once a second. Bytes and seconds of the stages are sums since the run began."""

    done: float  # of the phase
    item: str  # what is at work
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
    disk_free: int | None  # where the output goes


@dataclass(frozen=True)
class Paused:
    """The user has paused the run, or lets it go on."""

    paused: bool


@dataclass(frozen=True)
class Notice:
    """Something that the user should know and that stops nothing."""

    text: str
    level: Literal["info", "warning"] = "info"


@dataclass(frozen=True)
class RunEnded:
    """The last event, whatever happened."""

    outcome: Outcome
    exit_code: int
    problems: tuple[str, ...] = ()
    hint: str = ""
    traceback: str = ""


Event = (
    RunStarted
    | Planned
    | PhaseStarted
    | Advanced
    | TensorDone
    | PhaseEnded
    | Worked
    | Sampled
    | Paused
    | Notice
    | RunEnded
)
Emit = Callable[[Event], None]


def silent(event: Event) -> None:
    """The Emit of callers that show nothing."""
