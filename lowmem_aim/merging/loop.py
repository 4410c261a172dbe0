"""The loop: for each tensor of the plan, slice by slice, read -> method -> relax -> round once -> write.

Reading runs ahead in a thread of its own, through all tensors in order; several workers compute, each a slice; writing
has its own threads. A tensor whose method needs more than one pass is kept between them if the budget allows it, else
read again. The memory in use follows from `memory.Shares` and the number of models, not from the size of a tensor or a
model. The bytes written depend on neither, nor on threads or read mode (see `methods.method`).
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import xxhash

from lowmem_aim.errors import printable
from lowmem_aim.events import Emit, Notice, PhaseEnded, PhaseStarted, Worked
from lowmem_aim.merging.pipeline import Ahead, Job, Pass, Workers
from lowmem_aim.merging.shares import Shares
from lowmem_aim.merging.slices import Stride, TensorInputs, in_halves
from lowmem_aim.merging.targets import Finished, Output, Part, SummedProgress, Target
from lowmem_aim.methods.method import Fold, Rounds, Rows
from lowmem_aim.models.inputs import Inputs
from lowmem_aim.output.merged import Merged
from lowmem_aim.output.shards import Read, Shards
from lowmem_aim.planning.layout import subject_of
from lowmem_aim.planning.tasks import Plan, Task
from lowmem_aim.relaxing.activations import Activations
from lowmem_aim.relaxing.delta_sampler import DeltaSampler
from lowmem_aim.relaxing.relaxation import Relaxation
from lowmem_aim.system.devices import DeviceStreams, one_thread_an_operation

R = TypeVar("R")


def merge_tensors(
    targets: Sequence[Target],
    inputs: Inputs,
    activations: Activations | None,
    *,
    device: torch.device,
    shares: Shares,
    slice_rows: int | None = None,
    emit: Emit,
) -> list[Merged]:
    """Write all shards of each target into its `staging`, durably; what its journal knows to be there is checked and
    kept. Targets differ in how the merged rows are relaxed, in nothing else: inputs are read once for all of them.

    `slice_rows` overrides how many rows are in work at a time; the bytes do not depend on it. Raises ModelError (NaN,
    changed inputs), DiskError, and MemoryBudgetError where not even a row fits.
    """
    emit(PhaseStarted("merge", sum(target.plan.tensor_bytes for target in targets), "bytes"))
    stride = Stride(shares.slice_elements, slice_rows, emit)
    progress = SummedProgress(emit)
    outputs = [
        Output(
            target.plan,
            Shards(target.plan, target.staging, target.journal, progress.of(number), target.name),
            Relaxation(target.plan.recipe.aim, activations, inputs, target.consensus),
        )
        for number, target in enumerate(targets)
    ]
    loop = _Loop(targets[0].plan, outputs, inputs, DeviceStreams(device), stride, shares, emit)
    for output in outputs:
        loop.know(output.shards.read_before)
    with contextlib.ExitStack() as stack:
        stack.enter_context(one_thread_an_operation())
        for output in outputs:
            stack.enter_context(output.shards)
        workers = stack.enter_context(Workers(shares.workers))
        stream = stack.enter_context(Ahead(loop.read_all(), shares.ahead))
        workers.run(loop.job(task, stream) for task in loop.left())
    emit(PhaseEnded("merge"))
    replaced = loop.replaced_elements()
    for label in dict.fromkeys(label for label, _, _ in replaced):
        count = sum(elements for other, _, elements in replaced if other == label)
        emit(Notice(f"{count} element(s) of `{printable(label)}` are NaN or Inf and took the base's value", "warning"))
    models = loop.model_digests()
    return [
        Merged(
            {shard.name: output.shards.digests[shard.name] for shard in output.plan.shards},
            models,
            replaced,
            {task.name: output.shards.kept[task.name] for task in output.plan.tasks if task.name in output.shards.kept},
        )
        for output in outputs
    ]


class _End:
    """In the stream of slices: after the last of a tensor."""


Stream = Iterator[Rows | _End]


@dataclass
class _Loop:
    plan: Plan  # of the first output: the others' tasks are the same but for their relaxation
    outputs: Sequence[Output]
    inputs: Inputs
    streams: DeviceStreams
    stride: Stride
    shares: Shares
    emit: Emit
    tensors: dict[str, TensorInputs] = field(default_factory=dict)  # those whose reading has begun
    # checkpoint folder -> tensor -> xxh3-128 of its rows as read
    digests: dict[Path, dict[str, str]] = field(default_factory=dict)
    replaced: dict[Path, dict[str, int]] = field(default_factory=dict)  # likewise -> elements that were not finite

    def know(self, reads: Iterable[Read]) -> None:
        """What an earlier run, or this one, has read."""
        for read in reads:
            for model, digests in read.digests.items():
                self.digests.setdefault(self.inputs.folders[int(model)], {}).update(digests)
            for model, replaced in read.replaced.items():
                self.replaced.setdefault(self.inputs.folders[int(model)], {}).update(replaced)

    def left(self) -> Iterator[Task]:
        """What any of the outputs lacks, in order."""
        return (task for task in self.plan.tasks if any(task.name in output.left for output in self.outputs))

    def read_all(self) -> Iterator[Rows | _End]:
        """The first pass over every tensor that is left, in order."""
        for task in self.left():
            relaxed = any(output.relaxation.touches(task) for output in self.outputs)
            with_base = self.plan.recipe.builds_on_base or relaxed
            tensor = self.tensors[task.name] = TensorInputs(
                task, self.inputs, with_base, self.stride, self.plan.nonfinite
            )
            yield from self.timed(tensor.slices(first_pass=True), task)
            yield _End()

    def timed(self, slices: Iterator[Rows], task: Task) -> Iterator[Rows]:
        """The same slices; how long each took to be read is told."""
        while True:
            begun = time.perf_counter()
            rows = next(slices, None)
            if rows is None:
                return
            self.emit(Worked("read", _nbytes(rows), time.perf_counter() - begun))
            yield rows

    def job(self, task: Task, stream: Stream) -> Job:
        """The passes over one tensor; the last gives its finished rows to the outputs that lack it."""
        passes = _Passes(self, task, stream)
        parts = [
            Part(output, own, output.relaxation.of(own), DeltaSampler(own))
            for output in self.outputs
            if (own := output.left.get(task.name))
        ]

        def append(results: list[list[Finished]]) -> None:
            for result in results:
                for part, finished in zip(parts, result, strict=True):
                    part.append(finished)

        def done() -> None:
            read = self._read_whole(task)
            for part in parts:
                part.done(read)

        if task.action == "copy":
            # Not by way of the device: it may not have the dtype.
            yield passes.make(
                lambda rows: [Finished(rows.stored_experts[0])] * len(parts), append, last=True, done=done
            )
            return
        finished = yield from self._measured(task, passes, parts)
        yield passes.make(finished, append, last=True, done=done)

    def _measured(
        self, task: Task, passes: _Passes, parts: Sequence[Part]
    ) -> Generator[Pass, None, Callable[[Rows], list[Finished]]]:
        """The measure rounds; returns what makes finished rows for each output: combine, relax, round."""
        method = self.plan.recipe.method
        subject = subject_of(task.name, task.shape, self.plan.recipe, self.inputs, self.plan.seed)
        rounds = Rounds(method.start(subject, task.parameters))
        for fold in rounds:
            yield passes.make(self._on_device(fold.part), functools.partial(_add_all, fold), last=False)
        combine = rounds.combine

        def finished(rows: Rows) -> list[Finished]:
            merged = combine(rows)
            own = [*(merged.clone() for _ in parts[:-1]), merged]  # relaxing overwrites
            return [part.finish(mine, rows, self.streams) for part, mine in zip(parts, own, strict=True)]

        return self._on_device(finished)

    def _on_device(self, work: Callable[[Rows], R]) -> Callable[[Rows], R]:
        """`work` for slices as they were read: copied to the device, and computed in a lane of its own."""

        def computed(rows: Rows) -> R:
            with self.streams.lane():
                up = self.streams.up
                return work(Rows(up(rows.stored_base), tuple(map(up, rows.stored_experts)), rows.start))

        return computed

    def _read_whole(self, task: Task) -> Read:
        """What was seen of a tensor that has been read to its end, which is kept."""
        digests: dict[str, dict[str, str]] = {}
        replaced: dict[str, dict[str, int]] = {}
        tensor = self.tensors.pop(task.name)
        for source in tensor.sources:
            source.checkpoint.check_unchanged()  # else a change between reading and computing would be kept
            model = str(self.inputs.folders.index(source.checkpoint.folder))
            digests[model] = {task.name: source.digest()}
            if count := tensor.replaced_of(source):
                replaced[model] = {task.name: count}
        read = Read(digests, replaced)
        self.know([read])
        base = self.inputs.base
        for output in self.outputs:
            output.relaxation.check_base(task, self.digests.get(base.folder, {}).get(task.name) if base else None)
        return read

    # -- what was read

    def model_digests(self) -> list[tuple[str, str]]:
        """(label, one digest over all tensors of the model that were read, by name), for each model."""
        found = []
        for checkpoint in self.inputs.checkpoints:
            table = sorted(self.digests.get(checkpoint.folder, {}).items())
            text = "".join(f"{name}\0{value}\n" for name, value in table)
            found.append((checkpoint.label, xxhash.xxh3_128_hexdigest(text.encode("utf-8", "surrogatepass"))))
        return found

    def replaced_elements(self) -> list[tuple[str, str, int]]:
        """(label, tensor, elements) of every tensor that took some of the base's values, in the output's order."""
        return [
            (checkpoint.label, task.name, count)
            for checkpoint in dict.fromkeys(self.inputs.checkpoints)
            for task in self.plan.tasks
            if (count := self.replaced.get(checkpoint.folder, {}).get(task.name))
        ]


def _nbytes(rows: Rows) -> int:
    return sum(stored.nbytes for stored in (rows.stored_base, *rows.stored_experts))


def _add_all(fold: Fold, parts: list[Any]) -> None:
    for part in parts:
        fold.add(part)


class _Passes:
    """The passes over one tensor: the first takes its slices from the stream, later ones what was kept, or the files.

    DeltaSampler is what fits `Shares.kept_bytes`.
    """

    def __init__(self, loop: _Loop, task: Task, stream: Stream) -> None:
        self._loop = loop
        self._task = task
        self._stream: Stream | None = stream
        self._kept: deque[Rows] | None = None

    def make(
        self,
        work: Callable[[Rows], Any],
        take: Callable[[list[Any]], None],
        *,
        last: bool,
        done: Callable[[], None] = lambda: None,
    ) -> Pass:
        """work(rows) for each slice. Lists are taken: short of memory, a slice comes in parts."""
        streams, stride = self._loop.streams, self._loop.stride

        def failed(rows: Rows) -> None:
            streams.release()
            stride.too_large(rows.count, rows.stored_experts[0].shape[1], self._task.name, whole=self._task.whole)

        workers = self._loop.shares.workers

        def timed(rows: Rows) -> list[Any]:
            begun = time.perf_counter()
            results = in_halves(work, rows, failed)
            seconds = (time.perf_counter() - begun) / workers
            self._loop.emit(Worked("compute", _nbytes(rows), seconds, self._task.name, self._task.shape))
            return results

        return Pass(self._slices(last), timed, take, last, done)

    def _slices(self, last: bool) -> Iterator[Rows]:
        if self._stream is not None:
            stream, self._stream = self._stream, None
            return self._from(stream, last)
        if self._kept is None:
            return self._read_again()
        return self._let_go() if last else iter(self._kept)

    def _from(self, stream: Stream, last: bool) -> Iterator[Rows]:
        for rows in stream:
            if isinstance(rows, _End):
                return
            if self._kept is None and rows.start == 0 and not last:
                tensor = self._loop.tensors[self._task.name]
                self._kept = deque() if tensor.nbytes <= self._loop.shares.kept_bytes else None
            if self._kept is not None:
                self._kept.append(rows)
            yield rows

    def _read_again(self) -> Iterator[Rows]:
        tensor = self._loop.tensors[self._task.name]
        slices = self._loop.timed(tensor.slices(first_pass=False), self._task)
        with Ahead(slices, self._loop.shares.ahead) as again:
            yield from again

    def _let_go(self) -> Iterator[Rows]:
        while self._kept:
            yield self._kept.popleft()
