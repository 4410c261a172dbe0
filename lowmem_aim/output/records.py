"""What the journal of a run may hold, each kind of row as a record. All fields are JSON values.

A new kind is a class here; if its rows are progress that a later run can build on, it stands in `PROGRESS` too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar


@dataclass(frozen=True)
class Record:
    """A row of the journal; `kind` is its name there."""

    kind: ClassVar[str]

    def as_json(self) -> dict[str, Any]:
        """The record as the journal gives it back: lists for tuples."""
        same: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return same


@dataclass(frozen=True)
class Identity(Record):
    """What a run is of: the same job on the same inputs may be resumed."""

    kind = "identity"

    job: Mapping[str, Any]  # recipe, seed, layout, small files: any difference is another output
    inputs: Sequence[Mapping[str, Any]]  # of each model's folder: label, tensors, and the files' sizes, times, inodes
    environment: Mapping[str, str]  # versions, device: another may give other bytes


@dataclass(frozen=True)
class AcceptedEnvironments(Record):
    """The environments of a run that was resumed in another one, because the user said so; the first one first."""

    kind = "accepted"

    environments: Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class PlanSize(Record):
    """How much there is to do, for `status`."""

    kind = "plan"

    tensors: int = 0
    bytes: int = 0  # of the shards
    shards: Sequence[str] = ()  # file names


@dataclass(frozen=True)
class CalibrationSnapshot(Record):
    """Where a calibration stands after a block, and the file that holds its tensors (see `measuring.snapshots`)."""

    kind = "calibration"

    recorded: str  # xxh3-128 of what the recorder found
    file: str  # name, beside the journal
    blocks: int  # that are finished
    of: int  # blocks in all
    states: Sequence[Any]  # of each text: how its hidden state stands in the file
    outputs: Sequence[Any]  # of each finished block: how its output for the canary stands in the file
    tallies: Sequence[Any]  # (parameter, how its sums stand in the file, calls, shape)
    stacks: Sequence[str]  # fused experts that were met
    weights: Mapping[str, str]  # tensor -> xxh3-128 of its bytes as read
    digest: str  # xxh3-128 of the file


@dataclass(frozen=True)
class KeptActivations(Record):
    """Measured activations in a file beside the journal."""

    kind = "activations"

    file: str  # xxh3-128 of the file
    weights: Mapping[str, str]  # tensor of the base -> xxh3-128 of its bytes as read


@dataclass(frozen=True)
class KeptComparison(Record):
    """What ACM has measured."""

    kind = "acm"

    stamp: str  # xxh3-128 of the compared files' names, sizes, times and inodes
    information: Mapping[str, Sequence[float]]  # group -> mutual information of each text, in nats


@dataclass(frozen=True)
class Group(Record):
    """Finished tensors of one shard, from number `start` on: now its first `tensors`, the bytes up to `end`, are."""

    kind = "group"

    shard: str  # file name
    start: int
    tensors: int
    end: int
    sha256: str  # of the file's bytes up to `end`
    digests: Mapping[str, Mapping[str, str]]  # model folder -> tensor of this group -> xxh3-128 of its bytes as read
    replaced: Mapping[str, Mapping[str, int]] = field(default_factory=dict)  # likewise -> elements that were not finite
    kept: Mapping[str, Sequence[float]] = field(default_factory=dict)  # tensor -> sums, see `relaxing.delta_sampler`


# What a later run can build on. Without any of them nothing is lost if a run's folder goes.
PROGRESS: tuple[type[Record], ...] = (CalibrationSnapshot, KeptActivations, KeptComparison, Group)
