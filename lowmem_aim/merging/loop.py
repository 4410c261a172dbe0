"""The loop: every tensor of the plan, slice by slice, from the files of the models to the shards of the outputs.

    model files
        | TensorInputs.slices      rows of all models, checked and digested; a thread of its own runs ahead
        v
    Ahead                          a queue: at most `Shares.ahead` slices
        | TensorPasses             one pass over a tensor for each round of its method, and a last one
        v
    Workers                        `Shares.workers` threads, each computes one slice on the device:
        | Fold.part                    in a round, what the round measures of the slice
        | TargetTensor.finish          in the last pass: method's combine, relaxation, the one rounding
        v
    TargetTensor.append            finished rows, in order -> Shards -> ShardWriter, which has threads of its own

The memory in use follows from `Shares` and the number of models, not from the size of a tensor or a model. The bytes
written depend on neither, nor on threads or read mode (see `methods.method`).
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from lowmem_aim.errors import printable
from lowmem_aim.events import Notice, PhaseEnded, PhaseStarted
from lowmem_aim.merging.passes import PassSettings, Stream, TensorPasses, timed
from lowmem_aim.merging.pipeline import Ahead, Job, Workers
from lowmem_aim.merging.reads import ReadLog
from lowmem_aim.merging.shares import Shares
from lowmem_aim.merging.slices import Stride, TensorInputs
from lowmem_aim.merging.targets import FinishedRows, Target, TargetTensor, copied
from lowmem_aim.methods.method import Fold, Rounds, Rows
from lowmem_aim.models.inputs import Inputs
from lowmem_aim.output.merged import Merged
from lowmem_aim.planning.layout import subject_of
from lowmem_aim.planning.tasks import Plan, Task
from lowmem_aim.system.devices import DeviceStreams, one_thread_an_operation
from lowmem_aim.system.memory import give_back_at_once
from lowmem_aim.system.run import Run
from lowmem_aim.units import counted

R = TypeVar("R")


def merge_tensors(targets: Sequence[Target], inputs: Inputs, run: Run, shares: Shares) -> list[Merged]:
    """Write all shards of each target, durably; tensors that are finished already are checked and kept.

    The targets' plans differ only in how merged rows are relaxed, so that inputs are read once for all of them. Raises
    ModelError (NaN, changed inputs), DiskError, and MemoryBudgetError if not even a row fits.
    """
    run.emit(PhaseStarted("merge", sum(target.plan.tensor_bytes for target in targets), "bytes"))
    reads = ReadLog(inputs)
    if shares.tight:
        give_back_at_once()
    with contextlib.ExitStack() as stack:
        stack.enter_context(one_thread_an_operation())  # slices run in parallel already
        for target in targets:
            reads.add_all(stack.enter_context(target.shards).read_before)
        stride = Stride(shares.slice_elements, run.options.slice_rows, run.emit)
        streams = DeviceStreams(run.device)
        settings = PassSettings(stride, shares, run.emit, streams.release)
        loop = _Loop(targets[0].plan, targets, reads, streams, settings)
        # Left in reverse order: after an error reading stops first, then computing, then writing.
        workers = stack.enter_context(Workers(shares.workers))
        stream = stack.enter_context(Ahead(loop.read_all(), shares.ahead))
        workers.run(loop.passes_over(task, stream) for task in loop.left())
    run.emit(PhaseEnded("merge"))
    replaced = reads.replaced_elements(targets[0].plan)
    for label, counts in itertools.groupby(replaced, key=lambda found: found.label):
        count = sum(found.elements for found in counts)
        what = f"NaN or Inf in {counted(count, 'element')} of `{printable(label)}`: the base's value is used there"
        run.emit(Notice(what, "warning"))
    models = reads.model_digests()
    return [target.merged(models, replaced) for target in targets]


@dataclass(frozen=True)
class _Loop:
    """The loop over the tensors that any target lacks."""

    plan: Plan  # of the first target: the others' tasks are the same but for their relaxation
    targets: Sequence[Target]
    reads: ReadLog
    streams: DeviceStreams
    settings: PassSettings

    def left(self) -> Iterator[Task]:
        """The tasks that any of the targets lacks, in the plan's order."""
        return (task for task in self.plan.tasks if any(task.name in target.left for target in self.targets))

    def read_all(self) -> Stream:
        """Yield the first pass over every tensor that is left."""
        for task in self.left():
            relaxed = any(target.relaxation.touches(task) for target in self.targets)
            with_base = self.plan.recipe.builds_on_base or relaxed
            tensor = TensorInputs(task, with_base, self.settings.stride, self.plan.nonfinite)
            for rows in timed(tensor.slices(first_pass=True), self.settings.emit):
                yield tensor, rows
                del rows  # before the next are read
            yield tensor, None

    def passes_over(self, task: Task, stream: Stream) -> Job:
        """Yield the passes over one tensor; the last one gives finished rows to the targets that lack the tensor."""
        passes = TensorPasses(self.settings, task, stream)
        parts = [
            TargetTensor.of(target, own) for target in self.targets if (own := target.left.get(task.name)) is not None
        ]
        append = functools.partial(_append_all, parts)
        done = functools.partial(self._done, passes, parts)
        if task.action == "copy":
            # Not through the device, which may not have the dtype.
            yield passes.last(
                lambda rows: [FinishedRows(copied(rows.stored_experts[0], task))] * len(parts), append, done
            )
            return
        subject = subject_of(task, self.plan.recipe, self.plan.seed)
        rounds = Rounds(self.plan.recipe.method.start(subject, task.parameters))
        for fold in rounds:
            yield passes.measuring(self._on_device(fold.part), functools.partial(_add_all, fold))

        def finished(rows: Rows) -> list[FinishedRows]:
            merged = rounds.combine(rows)
            own = [*(merged.clone() for _ in parts[:-1]), merged]  # relaxing overwrites
            return [part.finish(mine, rows, self.streams) for part, mine in zip(parts, own, strict=True)]

        yield passes.last(self._on_device(finished), append, done)

    def _on_device(self, work: Callable[[Rows], R]) -> Callable[[Rows], R]:
        """Wrap `work` for slices as they were read: copy them to the device, and compute in a stream of their own."""

        def computed(rows: Rows) -> R:
            with self.streams.own_stream():
                up = self.streams.up
                return work(Rows(up(rows.stored_base), tuple(map(up, rows.stored_experts)), rows.start))

        return computed

    def _done(self, passes: TensorPasses, parts: Sequence[TargetTensor]) -> None:
        """Check what was read of a tensor whose rows are all finished, and have the targets keep the tensor."""
        task = passes.task
        # Before any target keeps the tensor: rows of a changed file, or relaxed for another base, must not stay.
        read = self.reads.add(passes.tensor)
        digest = self.reads.digest_of(task.base) if task.base else None
        for target in self.targets:
            target.relaxation.check_base(task, digest)
        for part in parts:
            part.done(read)


def _add_all(fold: Fold, parts: list[Any]) -> None:
    for part in parts:
        fold.add(part)


def _append_all(parts: Sequence[TargetTensor], results: list[list[FinishedRows]]) -> None:
    """Append finished rows in order; `results` has, for each piece of a slice, the finished rows for each part."""
    for result in results:
        for part, finished in zip(parts, result, strict=True):
            part.append(finished)
