"""Facts about the tensors of an output, found out while they are read and merged, and the events that tell them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from lowmem_aim.events import Emit, TensorDone
from lowmem_aim.output.merged import DeltaKept, Effect
from lowmem_aim.planning.tasks import Task

V = TypeVar("V")
ByModel = Mapping[str, Mapping[str, V]]  # number of the model's folder -> tensor -> a fact


@dataclass(frozen=True)
class Read:
    """Facts about tensors that were read to their end."""

    digests: ByModel[str]  # xxh3-128 of the bytes as read
    replaced: ByModel[int]  # how many elements were not finite, and took the base's value
    kept: Mapping[str, DeltaKept] = field(default_factory=dict)  # tensor -> how much of its delta is left
    effects: Mapping[str, Sequence[Effect]] = field(default_factory=dict)  # tensor -> of each expert
    singular: Mapping[str, str] = field(default_factory=dict)  # tensor -> what was done where no system could be solved


class TensorFacts:
    """The facts about all tensors of one output that are finished so far, each told by an event."""

    def __init__(self, emit: Emit, output: str = "") -> None:
        """`output` is the output's name in events, if there are several."""
        self._emit, self._output = emit, output
        self.done_bytes = 0  # of tensors that are finished
        self.kept: dict[str, DeltaKept] = {}  # of every tensor that was relaxed
        self.effects: dict[str, Sequence[Effect]] = {}  # of every tensor that texts have reached
        self.singular: dict[str, str] = {}  # of tensors whose systems could not be solved as they are

    def add(self, read: Read) -> None:
        """Add what was found out about some tensors."""
        self.kept |= read.kept
        self.effects |= read.effects
        self.singular |= read.singular

    def tell(self, task: Task, *, earlier: bool = False) -> None:
        """Tell that a tensor is finished, with the facts about it; `earlier`: since before this run."""
        self.done_bytes += task.nbytes
        effects = self.effects.get(task.name)
        self._emit(
            TensorDone(
                name=task.name,
                shape=task.shape,
                dtype=task.dtype.name,
                action=task.action,
                layer=task.layer,
                kind=task.kind,
                done=self.done_bytes,
                kept=self.kept.get(task.name),
                effects=None if effects is None else tuple(effect.kept for effect in effects),
                earlier=earlier,
                output=self._output,
            )
        )
