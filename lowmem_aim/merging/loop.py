"""The loop: every tensor of the plan, slice by slice, from the files of the models to the shards of the outputs.

    model files
        | TensorInputs.slices      rows of all models, checked and digested; a thread of its own runs ahead
        v
    Ahead                          a queue: at most `Shares.ahead` slices
        | TensorPasses             one pass over a tensor for each round of its method or methods, and a last one
        v
    Workers                        `Shares.workers` threads, each computes one slice on the device:
        | Fold.part                    in a round, what the round measures of the slice
        | MergedTensor.finish          in the last pass: method's combine, relaxation, the one rounding
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
from pathlib import Path
from typing import Any, TypeVar

from lowmem_aim.errors import printable
from lowmem_aim.events import Notice, PhaseEnded, PhaseStarted
from lowmem_aim.merging.given import Given
from lowmem_aim.merging.passes import PassSettings, Stream, TensorPasses, timed
from lowmem_aim.merging.pipeline import Ahead, Job, Pass, Workers
from lowmem_aim.merging.shares import Shares
from lowmem_aim.merging.slices import Stride, TensorInputs
from lowmem_aim.merging.targets import FinishedRows, MergedTensor, Target, TargetTensor, copied
from lowmem_aim.methods.method import Fold, Rows
from lowmem_aim.methods.moments import MatrixSpace
from lowmem_aim.models.inputs import Inputs
from lowmem_aim.output.merged import Merged
from lowmem_aim.planning.tasks import Task, as_read
from lowmem_aim.system.devices import DeviceStreams, threads_an_operation
from lowmem_aim.system.memory import give_back_at_once
from lowmem_aim.system.on_demand import torch
from lowmem_aim.system.run import Run
from lowmem_aim.system.tensor_store import TensorStore
from lowmem_aim.units import counted

R = TypeVar("R")


def merge_tensors(targets: Sequence[Target], inputs: Inputs, run: Run, shares: Shares, given: Given) -> list[Merged]:
    """Write all shards of each target, durably; tensors that are finished already are checked and kept.

    The targets' plans differ only in how rows are merged and relaxed (see `recipe.readings`), so that inputs are read
    once for all of them. Raises ModelError (NaN, changed inputs), DiskError, and MemoryBudgetError if not even a row
    fits.
    """
    run.emit(PhaseStarted("merge", sum(target.plan.tensor_bytes for target in targets), "bytes"))
    if shares.tight:
        give_back_at_once()
    with contextlib.ExitStack() as stack:
        threads = torch.get_num_threads()
        stack.enter_context(threads_an_operation(1))  # slices run in parallel already
        for target in targets:
            target.reads.add_all(stack.enter_context(target.sink).read_before)
        stride = Stride(shares.slice_elements, run.options.slice_rows, run.emit)
        streams = DeviceStreams(run.device)
        settings = PassSettings(stride, shares, run.emit, streams.release)
        loop = _Loop(as_read([target.plan for target in targets]), targets, streams, settings, given)
        # Left in reverse order: after an error reading stops first, then computing, then writing.
        workers = stack.enter_context(Workers(shares.workers))
        stream = stack.enter_context(Ahead(loop.read_all(), shares.ahead))
        for block, tasks in given.by_block(loop.left()):
            with loop.block(block, threads):
                workers.run(loop.passes_over(task, stream) for task in tasks)
    run.emit(PhaseEnded("merge"))
    merged = [target.merged() for target in targets]
    for label, counts in itertools.groupby(merged[0].replaced, key=lambda found: found.label):
        count = sum(found.elements for found in counts)
        what = f"NaN or Inf in {counted(count, 'element')} of `{printable(label)}`: the base's value is used there"
        run.emit(Notice(what, "warning"))
    return merged


@contextlib.contextmanager
def matrix_space(run: Run, shares: Shares, folder: Path) -> Iterator[MatrixSpace]:
    """The space for the matrices of methods that solve; those that do not fit in memory lie in a file in `folder`."""
    device_bytes, ram_bytes = shares.device_matrices, shares.matrices
    with TensorStore(run.device, device_bytes=device_bytes, ram_bytes=ram_bytes, folder=folder) as store:
        yield MatrixSpace(store, run.device, shares.workers, lambda text: run.emit(Notice(text, "warning")))


@dataclass(frozen=True)
class _Loop:
    """The loop over the tensors that any target lacks."""

    tasks: Sequence[Task]  # of all targets, as they are read
    targets: Sequence[Target]
    streams: DeviceStreams
    settings: PassSettings
    given: Given

    def left(self) -> Iterator[Task]:
        """The tasks that any of the targets lacks, in the plan's order."""
        return (task for task in self.tasks if self._lacking(task))

    def _lacking(self, task: Task) -> list[Target]:
        return [target for target in self.targets if task.name in target.left]

    def read_all(self) -> Stream:
        """Yield the first pass over every tensor that is left."""
        for task in self.left():
            with_base = any(target.uses_base(task) for target in self._lacking(task))
            tensor = TensorInputs(task, with_base, self.settings.stride, self.targets[0].plan.nonfinite)
            for rows in timed(tensor.slices(first_pass=True), self.settings.emit):
                yield tensor, rows
                del rows  # before the next are read
            yield tensor, None

    @contextlib.contextmanager
    def block(self, number: int | None, threads: int) -> Iterator[None]:
        """The tensors of a block, which is measured before, by operations of so many threads; None: no block's."""
        if number is None or self.given.moments is None:
            yield
            return
        with threads_an_operation(threads):
            self.given.moments.come_to(number)
        yield
        for target in self.targets:
            target.sink.settle()
        self.given.moments.finished(number)

    def passes_over(self, task: Task, stream: Stream) -> Job:
        """Yield the passes over one tensor; the last one gives finished rows to the targets that lack the tensor."""
        passes = TensorPasses(self.settings, task, stream)
        parts = [TargetTensor.of(target, target.left[task.name], self.given) for target in self._lacking(task)]
        if task.action == "copy":
            # Not through the device, which may not have the dtype.
            yield _last(passes, parts, lambda rows: [FinishedRows(copied(rows.stored_experts[0], task))] * len(parts))
            return
        merges = MergedTensor.all_of(parts, self.given)
        for round_ in itertools.zip_longest(*(merge.rounds for merge in merges)):  # some methods have fewer
            folds = [fold for fold in round_ if fold is not None]
            yield passes.measuring(
                self._on_device(functools.partial(_measured, folds)), functools.partial(_add_all, folds)
            )

        def finished(rows: Rows) -> list[FinishedRows]:
            return [finished for merge in merges for finished in merge.finish(rows, self.streams)]

        yield _last(passes, [part for merge in merges for part in merge.parts], self._on_device(finished))

    def _on_device(self, work: Callable[[Rows], R]) -> Callable[[Rows], R]:
        """Wrap `work` for slices as they were read: copy them to the device, and compute in a stream of their own."""

        def computed(rows: Rows) -> R:
            with self.streams.own_stream():
                up = self.streams.up
                return work(Rows(up(rows.stored_base), tuple(map(up, rows.stored_experts)), rows.start))

        return computed


def _last(passes: TensorPasses, parts: Sequence[TargetTensor], work: Callable[[Rows], list[FinishedRows]]) -> Pass:
    """The last pass over a tensor: `work` gives the finished rows of a slice for each of the parts."""
    return passes.last(work, functools.partial(_append_all, parts), functools.partial(_done, passes, parts))


def _done(passes: TensorPasses, parts: Sequence[TargetTensor]) -> None:
    """Check what was read of a tensor whose rows are all finished, and have the targets keep the tensor."""
    digests = passes.tensor.digests()  # before any target keeps the tensor: rows of a changed file must not stay
    for part in parts:
        part.done(passes.tensor, digests)


def _measured(folds: Sequence[Fold], rows: Rows) -> list[Any]:
    return [fold.part(rows) for fold in folds]


def _add_all(folds: Sequence[Fold], results: list[list[Any]]) -> None:
    """Add what was measured of a slice; `results` has, for each piece of it, a part for each fold."""
    for parts in results:
        for fold, part in zip(folds, parts, strict=True):
            fold.add(part)


def _append_all(parts: Sequence[TargetTensor], results: list[list[FinishedRows]]) -> None:
    """Append finished rows in order; `results` has, for each piece of a slice, the finished rows for each part."""
    for result in results:
        for part, finished in zip(parts, result, strict=True):
            part.append(finished)
