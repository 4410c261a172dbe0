"""The outputs of a merge: what each does to merged rows (relax, round once), and where it puts them."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from lowmem_aim.errors import ModelError, printable
from lowmem_aim.events import Emit, Event, TensorDone, Worked
from lowmem_aim.merging.effects import EffectSampler
from lowmem_aim.merging.given import BlockMoments, Given
from lowmem_aim.merging.reads import ReadLog
from lowmem_aim.merging.slices import TensorInputs, TensorReader, finite
from lowmem_aim.methods import kernels
from lowmem_aim.methods.method import Rounds, Rows
from lowmem_aim.output.merged import DeltaKept, Merged
from lowmem_aim.output.tensor_facts import Read, TensorFacts
from lowmem_aim.planning.tasks import Plan, Task
from lowmem_aim.relaxing.delta_sampler import DeltaSampler
from lowmem_aim.relaxing.relaxation import Relax, Relaxation
from lowmem_aim.system.devices import DeviceStreams
from lowmem_aim.system.on_demand import torch

if TYPE_CHECKING:
    from torch import Tensor


class Sink(Protocol):
    """The place where the finished rows of one output go: `output.shards` writes them. A context manager.

    Entering it finds out which tasks are `left`. All methods raise DiskError.
    """

    facts: TensorFacts
    digests: dict[str, str]  # file name -> sha256, of what is written
    read_before: list[Read]  # of the tensors that earlier runs have finished
    left: list[Task]

    def append(self, task: Task, rows: Tensor) -> None:
        """Take the next rows of a tensor; tensors come in the plan's order."""
        ...

    def tensor_done(self, task: Task, read: Read) -> None:
        """Mark a tensor as whole."""
        ...

    def settle(self) -> None:
        """Wait until all tensors that are done are where they are to stay."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


@dataclass(frozen=True)
class Target:
    """One output: its plan, where its rows go, how it relaxes merged rows, and what was read for it."""

    plan: Plan
    sink: Sink  # entered by the loop
    relaxation: Relaxation
    reads: ReadLog

    @functools.cached_property
    def left(self) -> dict[str, Task]:
        """The tasks that no earlier run has finished, by tensor name; known once the sink is entered."""
        return {task.name: task for task in self.sink.left}

    def uses_base(self, task: Task) -> bool:
        """Whether the base's rows of a tensor go into this output."""
        recipe = self.plan.recipe
        return recipe.builds_on_base or self.relaxation.touches(task) or (recipe.solve is not None and task.linear)

    def merged(self) -> Merged:
        """Digests and figures of what was read and written, in the plan's order."""
        facts, digests = self.sink.facts, self.sink.digests
        shards = {shard.name: digests[shard.name] for shard in self.plan.shards if shard.name in digests}
        tasks = [task.name for task in self.plan.tasks]
        kept = {name: facts.kept[name] for name in tasks if name in facts.kept}
        effects = {name: facts.effects[name] for name in tasks if name in facts.effects}
        singular = {name: facts.singular[name] for name in tasks if name in facts.singular}
        replaced = self.reads.replaced_elements(self.plan)
        return Merged(shards, self.reads.model_digests(), replaced, kept, effects, singular)


class SummedProgress:
    """The progress of several targets as one."""

    def __init__(self, emit: Emit) -> None:
        self._emit = emit
        self._done: dict[tuple[int, type[Event]], float] = {}

    def of(self, number: int) -> Emit:
        """The function that target `number` emits to: `done` of its events becomes the sum over all targets."""

        def summed(event: Event) -> None:
            if isinstance(event, TensorDone | Worked) and event.done is not None:
                kind = type(event)
                self._done[number, kind] = event.done
                event = replace(event, done=sum(done for (_, of), done in self._done.items() if of is kind))
            self._emit(event)

        return summed


@dataclass(frozen=True)
class FinishedRows:
    """A slice of a target's tensor, ready to be written, and the slice's part of the sums of `DeltaSampler`."""

    rows: Tensor  # (rows, columns), in the output's dtype, on the CPU
    before: int = 0  # in the units of `methods.exact`
    after: int = 0
    effects: Tensor | None = None  # see `EffectSampler.of`
    merged: Tensor | None = None  # the rows as they are before they are relaxed, where that is asked for


@dataclass(frozen=True)
class TargetTensor:
    """One tensor in one target: its merged rows are relaxed, rounded and written."""

    target: Target
    task: Task
    relax: Relax | None
    sampler: DeltaSampler
    effects: EffectSampler | None
    singular: Mapping[str, str]  # of tensors so far, what became of them
    taker: BlockMoments | None  # what takes the rows as they are before they are relaxed

    @classmethod
    def of(cls, target: Target, task: Task, given: Given) -> TargetTensor:
        """The tensor of a task that the target lacks."""
        relax, effects, taker = target.relaxation.of(task), given.sampler(task), given.taker(task)
        return cls(target, task, relax, DeltaSampler(task), effects, given.space.singular, taker)

    def begun(self, given: Given) -> Rounds:
        """The rounds of the target's method over the tensor, none of them run yet."""
        plan = self.target.plan
        subject = given.subject(self.task, plan)
        return Rounds(plan.recipe.method.start(subject, self.task.parameters))

    def finish(self, merged: Tensor, rows: Rows, streams: DeviceStreams) -> FinishedRows:
        """Relax and round a merged slice, (rows, columns) float32, which is overwritten. The result is on the CPU.

        Raises ModelError for values that the output's dtype cannot hold.
        """
        before = after = 0
        if self.relax is not None:
            before = self.sampler.of(merged, rows.stored_base, rows.start)
            merged = self.relax(merged, rows)
            after = self.sampler.of(merged, rows.stored_base, rows.start)
        effects = self.effects.of(merged, rows) if self.effects else None
        return FinishedRows(streams.down(rounded(merged, self.task)), before, after, effects)

    def append(self, finished: FinishedRows) -> None:
        """Write the next rows. Raises DiskError."""
        self.sampler.add(finished.before, finished.after)  # not in `finish`: a slice that fails is computed again
        if self.effects and finished.effects is not None:
            self.effects.add(finished.effects)
        if self.taker and finished.merged is not None:
            self.taker.take(self.task.name, finished.merged)
        self.target.sink.append(self.task, finished.rows)

    def done(self, tensor: TensorInputs, digests: Mapping[TensorReader, str]) -> None:
        """Mark the tensor as finished once all rows are written; `digests` are of what was read of it.

        Raises DiskError, and ModelError if it was relaxed by another base's activations.
        """
        read = self.target.reads.add(tensor, digests, with_base=self.target.uses_base(self.task))
        # Before the tensor is kept: what was relaxed for another base must not stay.
        base = self.task.base
        self.target.relaxation.check_base(self.task, self.target.reads.digest_of(base) if base else None)
        if self.relax is not None:
            read = replace(read, kept={self.task.name: DeltaKept(*self.sampler.sums())})
        if self.effects:
            read = replace(read, effects={self.task.name: self.effects.effects()})
        if self.task.name in self.singular and self.target.plan.recipe.method.rows_of_linears:
            read = replace(read, singular={self.task.name: self.singular[self.task.name]})
        self.target.sink.tensor_done(self.task, read)


@dataclass(frozen=True)
class MergedTensor:
    """One tensor merged once, for all targets that have the same method and parameters and only relax it differently.

    `rounds` are to be driven to their end before `finish`.
    """

    rounds: Rounds
    parts: Sequence[TargetTensor]

    @classmethod
    def all_of(cls, parts: Sequence[TargetTensor], given: Given) -> list[MergedTensor]:
        """One for each way in which targets merge the tensor; together they have all `parts`, in another order."""
        alike: dict[Hashable, list[TargetTensor]] = {}
        for part in parts:
            alike.setdefault(part.target.plan.way(part.task), []).append(part)
        return [cls(own[0].begun(given), own) for own in alike.values()]

    def finish(self, rows: Rows, streams: DeviceStreams) -> list[FinishedRows]:
        """Merge a slice, and finish it for each of the parts. Raises ModelError as `TargetTensor.finish`."""
        merged, first = self.rounds.combine(rows), self.parts[0]
        plain = streams.down(rounded(merged.clone(), first.task)) if first.taker else None
        # Relaxing overwrites. One copy after another, so that no more than one is in memory.
        finished = [part.finish(merged.clone(), rows, streams) for part in self.parts[:-1]]
        finished.append(self.parts[-1].finish(merged, rows, streams))
        return [replace(finished[0], merged=plain), *finished[1:]]


def copied(stored: Tensor, task: Task) -> Tensor:
    """Rows that are copied, in the output's dtype. Raises ModelError as `rounded`."""
    return stored if stored.dtype == task.dtype.torch else rounded(stored.to(torch.float32), task)


def rounded(merged: Tensor, task: Task) -> Tensor:
    """Round merged rows to the output's dtype, once. Raises ModelError for finite values that the dtype cannot hold."""
    if task.dtype.name == "bfloat16" and kernels.usable([merged]):
        rounded, good = kernels.to_bfloat16(merged)
    else:
        rounded = merged.to(task.dtype.torch)
        good = finite(rounded)
    if not good:
        raise ModelError(
            f"the merged `{printable(task.name)}` leaves the range of {task.dtype.name}",
            hint="choose `out_dtype: bfloat16` or `float32`, or smaller weights",
        )
    return rounded
