"""The records that the journal of a run may hold, a class for each kind. All fields are JSON values.

A new kind is a class here; if a later run can build on its records, the class also stands in `PROGRESS`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar


@dataclass(frozen=True)
class Record:
    """A row of the journal; `kind` is the name that its kind has there."""

    kind: ClassVar[str]

    def as_json(self) -> dict[str, Any]:
        """The record as the journal gives it back: JSON values, lists in place of tuples."""
        same: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return same


@dataclass(frozen=True)
class Schema(Record):
    """The version of the records in a journal."""

    kind = "schema"

    version: int


VERSION = 2  # to be raised when a record gets fields without defaults, or a field another meaning


@dataclass(frozen=True)
class Identity(Record):
    """The identity of a run: an interrupted run may be resumed by the same job on the same inputs."""

    kind = "identity"

    job: Mapping[str, Any]  # recipe, seed, layout, small files: any difference is another output
    inputs: Sequence[Mapping[str, Any]]  # of each model's folder: label, tensors, and the files' sizes, times, inodes
    environment: Mapping[str, str]  # versions, device: another may give other bytes


@dataclass(frozen=True)
class AcceptedEnvironments(Record):
    """The environments of a run that was resumed in another one because the user allowed it; the first one first."""

    kind = "accepted"

    environments: Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class PlanSize(Record):
    """The amount of work in a plan, for `status`."""

    kind = "plan"

    tensors: int = 0
    bytes: int = 0  # of the shards
    shards: Sequence[str] = ()  # file names
    headers: Sequence[int] = ()  # bytes of each shard's header


@dataclass(frozen=True)
class CalibrationSnapshot(Record):
    """The progress of a calibration after a block, and the file that holds its tensors (see `measuring.snapshots`)."""

    kind = "calibration"

    recorded: str  # xxh3-128 of what the recorder found
    file: str  # name, beside the journal
    blocks: int  # that are finished
    of: int  # blocks in all
    states: Sequence[Any]  # of each text: how its hidden state stands in the file
    outputs: Sequence[Any]  # of each finished block: how its output for the canary stands in the file
    tallies: Sequence[Any]  # (parameter, how its sums stand in the file, calls, shape)
    weights: Mapping[str, str]  # tensor -> xxh3-128 of its bytes as read
    digest: str  # xxh3-128 of the file
    texts: int = 0  # the canary's copy included, that have also passed the block after those


@dataclass(frozen=True)
class SolvingSnapshot(Record):
    """The hidden states that the experts' texts have before a block, in a file (see `solving.kept_states`)."""

    kind = "solving"

    recorded: str  # xxh3-128 of what the recorder found
    file: str  # name, beside the journal
    block: int  # the block before which they are
    sides: Sequence[Mapping[str, Sequence[Any]]]  # of each model: how its texts' states, and its outputs for the canary
    digest: str  # xxh3-128 of the file


@dataclass(frozen=True)
class KeptActivations(Record):
    """Measured activations in a file beside the journal."""

    kind = "activations"

    file: str  # xxh3-128 of the file
    weights: Mapping[str, str]  # tensor of the base -> xxh3-128 of its bytes as read


@dataclass(frozen=True)
class KeptComparison(Record):
    """The mutual information that ACM has measured."""

    kind = "acm"

    stamp: str  # xxh3-128 of the compared files' names, sizes, times and inodes
    information: Mapping[str, Sequence[float]]  # group -> mutual information of each text, in nats


@dataclass(frozen=True)
class KeptAnswers(Record):
    """The answered requests of an evaluation; their answers lie in the cache, or in a file beside the journal."""

    kind = "answers"

    answered: int
    of: int


@dataclass(frozen=True)
class SweptPoint(Record):
    """A point of a sweep; its scores lie in a file of its name."""

    kind = "swept"

    name: str
    recipe: str  # as it lies in its file


@dataclass(frozen=True)
class SweepSize(Record):
    """The amount of work in a sweep, and how much of it is done."""

    kind = "sweep"

    scored: int  # points
    of: int
    finished: bool = False


@dataclass(frozen=True)
class RunAlone(Record):
    """The finding that a model's sequences cannot be run together: an evaluation that is resumed need not try again."""

    kind = "alone"


@dataclass(frozen=True)
class MadeStage(Record):
    """A named stage of the recipe that an output was made of: what is known of it once its folder is gone."""

    kind = "stage"

    name: str
    job: Mapping[str, Any]  # see Identity
    inputs: Sequence[Mapping[str, Any]]
    digests: Mapping[str, Mapping[str, str]]  # model folder -> tensor -> xxh3-128 of its bytes as read


@dataclass(frozen=True)
class Group(Record):
    """Tensors of one shard that became durable together: numbers `start` to `tensors` - 1, whose bytes end at `end`."""

    kind = "group"

    shard: str  # file name
    start: int
    tensors: int  # the number of the shard's tensors that are finished with this group
    end: int
    sha256: str  # of the file's bytes up to `end`
    digests: Mapping[str, Mapping[str, str]]  # model folder -> tensor of this group -> xxh3-128 of its bytes as read
    replaced: Mapping[str, Mapping[str, int]] = field(default_factory=dict)  # likewise -> elements that were not finite
    kept: Mapping[str, Sequence[float]] = field(default_factory=dict)  # tensor -> sums, see `relaxing.delta_sampler`
    effects: Mapping[str, Sequence[Sequence[float]]] = field(default_factory=dict)  # tensor -> of each expert its sums
    singular: Mapping[str, str] = field(default_factory=dict)  # tensor -> what was done where no system could be solved


# The kinds that a later run can build on. If a run's folder has none of them, nothing is lost with it.
PROGRESS: tuple[type[Record], ...] = (
    CalibrationSnapshot,
    SolvingSnapshot,
    KeptActivations,
    KeptComparison,
    KeptAnswers,
    SweepSize,
    Group,
)
