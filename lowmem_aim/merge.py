"""The loop: for each tensor of the plan, slice by slice, read -> method -> relax -> round once -> write.

Reading runs ahead in a thread of its own, through all tensors in order; several workers compute, each a slice; writing
has its own threads. A tensor whose method needs more than one pass is kept between them if the budget allows it, else
read again. The memory in use follows from `memory.Shares` and the number of models, not from the size of a tensor or a
model. The bytes written depend on neither, nor on threads or read mode (see `methods.method`).
"""

from __future__ import annotations

import contextlib
import functools
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import xxhash
from torch import Tensor

from lowmem_aim import kernels
from lowmem_aim.activations import Activations
from lowmem_aim.devices import Lanes
from lowmem_aim.errors import ModelError, printable
from lowmem_aim.events import Emit, Notice, PhaseEnded, PhaseStarted
from lowmem_aim.inputs import Inputs
from lowmem_aim.journal import Journal
from lowmem_aim.memory import Shares
from lowmem_aim.methods import Rows, rounds
from lowmem_aim.methods.method import Combine, Fold
from lowmem_aim.pipeline import Ahead, Job, Pass, Workers
from lowmem_aim.plan import Plan, Task, subject_of
from lowmem_aim.recipe import Aim
from lowmem_aim.relax.aim import relax, shrinkage, shrinkage_rows
from lowmem_aim.shards import Read, Shards
from lowmem_aim.slices import Stride, TensorInputs, finite, in_halves

R = TypeVar("R")


@dataclass(frozen=True)
class Merged:
    """What was written and what was read, as digests; all of it follows from the inputs."""

    shards: dict[str, str] = field(default_factory=dict)  # file name -> sha256
    models: list[tuple[str, str]] = field(default_factory=list)  # label, xxh3-128 over its tensors as read, by name
    replaced: list[tuple[str, str, int]] = field(default_factory=list)  # label, tensor, elements that were not finite


def merge_tensors(
    plan: Plan,
    inputs: Inputs,
    activations: Activations | None,
    staging: Path,
    journal: Journal,
    *,
    device: torch.device,
    shares: Shares,
    slice_rows: int | None = None,
    emit: Emit,
) -> Merged:
    """Write all shards of the plan into `staging`, durably; what the journal knows to be there is checked and kept.

    `slice_rows` overrides how many rows are in work at a time; the bytes do not depend on it. Raises ModelError (NaN,
    changed inputs), DiskError, and MemoryBudgetError where not even a row fits.
    """
    emit(PhaseStarted("merge", plan.tensor_bytes, "bytes"))
    stride = Stride(shares.slice_elements, slice_rows, emit)
    output = Shards(plan, staging, journal, emit)
    loop = _Loop(plan, inputs, activations, Lanes(device), stride, shares)
    loop.know(output.read_before)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_one_thread_an_operation())
        stack.enter_context(output)
        workers = stack.enter_context(Workers(shares.workers))
        stream = stack.enter_context(Ahead(loop.read_all(output.left), shares.ahead))
        workers.run(loop.job(task, stream, output) for task in output.left)
    emit(PhaseEnded("merge"))
    replaced = loop.replaced_elements()
    for label in dict.fromkeys(label for label, _, _ in replaced):
        count = sum(elements for other, _, elements in replaced if other == label)
        emit(Notice(f"{count} element(s) of `{printable(label)}` are NaN or Inf and took the base's value", "warning"))
    return Merged({shard.name: output.digests[shard.name] for shard in plan.shards}, loop.model_digests(), replaced)


@contextlib.contextmanager
def _one_thread_an_operation() -> Iterator[None]:
    """Slices are what is worked on in parallel; threads within torch's operations would only get in their way."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _End:
    """In the stream of slices: after the last of a tensor."""


Stream = Iterator[Rows | _End]


@dataclass
class _Loop:
    plan: Plan
    inputs: Inputs
    activations: Activations | None
    lanes: Lanes
    stride: Stride
    shares: Shares
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

    def read_all(self, tasks: Sequence[Task]) -> Iterator[Rows | _End]:
        """The first pass over every tensor, in the tasks' order."""
        for task in tasks:
            with_base = self.plan.recipe.builds_on_base or self._statistic(task) is not None
            tensor = self.tensors[task.name] = TensorInputs(
                task, self.inputs, with_base, self.stride, self.plan.nonfinite
            )
            yield from tensor.slices(first_pass=True)
            yield _End()

    def job(self, task: Task, stream: Stream, output: Shards) -> Job:
        """The passes over one tensor; the last gives its finished rows to the output."""
        passes = _Passes(self, task, stream)

        def append(parts: list[Tensor]) -> None:
            for rows in parts:
                output.append(task, rows)

        def done() -> None:
            output.tensor_done(task, self._read_whole(task))

        finished = self._copied if task.action == "copy" else (yield from self._measured(task, passes))
        yield passes.make(finished, append, last=True, done=done)

    def _measured(self, task: Task, passes: _Passes) -> Generator[Pass, None, Callable[[Rows], Tensor]]:
        """The measure rounds; returns what makes finished rows: combine, relax, round."""
        method = self.plan.recipe.method
        subject = subject_of(task.name, task.shape, self.plan.recipe, self.inputs, self.plan.seed)
        combine = yield from self._rounds(rounds(method.start(subject, task.parameters)), passes)
        shrink = self._shrinkage(task)

        def finished(rows: Rows) -> Tensor:
            merged = combine(rows)
            if shrink is not None:
                first = rows.start // merged.shape[1]
                part = shrinkage_rows(shrink, task.shape, first, first + rows.count)
                part = self._known(task, part, first, rows.count)
                merged = relax(merged, rows.stored_base, part.to(merged.device))
            return self.lanes.down(_rounded(merged, task))

        return self._on_device(finished)

    def _rounds(self, folds: Generator[Fold, None, Combine], passes: _Passes) -> Generator[Pass, None, Combine]:
        while True:
            try:
                fold = next(folds)
            except StopIteration as stopped:
                combine: Combine = stopped.value
                return combine
            yield passes.make(self._on_device(fold.part), functools.partial(_add_all, fold), last=False)

    def _on_device(self, work: Callable[[Rows], R]) -> Callable[[Rows], R]:
        """`work` for slices as they were read: copied to the device, and computed in a lane of its own."""

        def computed(rows: Rows) -> R:
            with self.lanes.lane():
                up = self.lanes.up
                return work(Rows(up(rows.stored_base), tuple(map(up, rows.stored_experts)), rows.start))

        return computed

    @staticmethod
    def _copied(rows: Rows) -> Tensor:
        # Not by way of the device: it may not have the dtype.
        return rows.stored_experts[0]

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
        if self._statistic(task):
            self._check_base(task.name)
        return read

    # -- relaxation

    def _statistic(self, task: Task) -> str | None:
        """Whose statistic relaxes this weight; None where it is not relaxed."""
        aim = self.plan.recipe.aim
        if aim is None or self.activations is None or task.action == "copy":
            return None
        return statistic_of(task.name, self.activations, aim)

    def _shrinkage(self, task: Task) -> Tensor | None:
        """AIM's shrinkage of this weight; None where it is not relaxed."""
        name = self._statistic(task)
        if name is None:
            return None
        assert self.activations is not None
        assert self.plan.recipe.aim is not None
        return shrinkage(self.activations.means[name], self.plan.recipe.aim.omega)

    def _known(self, task: Task, part: Tensor, first: int, count: int) -> Tensor:
        """`part` of a shrinkage without the rows that the base does not have: new vocabulary is not relaxed."""
        assert self.inputs.base is not None
        row_map = self.inputs.row_map(self.inputs.base, task.name)
        if row_map is None:
            return part
        known = row_map[first : first + count] >= 0
        return torch.where(known[:, None], part, 0.0)

    def _check_base(self, name: str) -> None:
        """The activations must have been taken on these very weights."""
        assert self.inputs.base is not None
        assert self.activations is not None
        expected = self.activations.base_digests.get(name)
        if expected is not None and expected != self.digests[self.inputs.base.folder][name]:
            raise ModelError(
                f"the activations were measured on another base: `{printable(name)}` differs in "
                f"`{printable(self.inputs.base.label)}`",
                hint="calibrate this base (`lowmem-aim calibrate`), or, if they came from the cache, pass `--no-cache`",
            )

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


def _add_all(fold: Fold, parts: list[Any]) -> None:
    for part in parts:
        fold.add(part)


class _Passes:
    """The passes over one tensor: the first takes its slices from the stream, later ones what was kept, or the files.

    Kept is what fits `Shares.kept_bytes`.
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
        lanes, stride = self._loop.lanes, self._loop.stride

        def failed(rows: Rows) -> None:
            lanes.release()
            stride.too_large(rows.count, rows.stored_experts[0].shape[1], self._task.name, whole=self._task.whole)

        return Pass(self._slices(last), lambda rows: in_halves(work, rows, failed), take, last, done)

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
        slices = self._loop.tensors[self._task.name].slices(first_pass=False)
        with Ahead(slices, self._loop.shares.ahead) as again:
            yield from again

    def _let_go(self) -> Iterator[Rows]:
        while self._kept:
            yield self._kept.popleft()


def statistic_of(name: str, activations: Activations, aim: Aim) -> str | None:
    """Whose statistic relaxes the weight `name`: its own; its head's, for a tied embedding; or none."""
    if name in activations.tied and aim.tied == "keep":
        return None  # the head itself is what the file holds of the pair
    if name in activations.means:
        return name
    heads = [head for head, embedding in activations.tied.items() if embedding == name and head in activations.means]
    return heads[0] if heads and aim.tied == "relax" else None


def check_activations(activations: Activations, inputs: Inputs, aim: Aim) -> None:
    """Raises ModelError unless the statistics fit the weights they are for; all problems at once."""
    assert inputs.base is not None
    problems = []
    fitting = 0
    for info in inputs.base:
        name = statistic_of(info.name, activations, aim)
        if name is None:
            continue
        means = activations.means[name]
        if means.ndim != len(info.shape) or any(m not in (1, s) for m, s in zip(means.shape, info.shape, strict=True)):
            problems.append(f"the activations of `{printable(name)}` {list(means.shape)} do not fit {list(info.shape)}")
        fitting += 1
    if not fitting:
        problems.append(f"the activations name no weight of `{printable(inputs.base.label)}`")
    if problems:
        raise ModelError(problems, hint="they were measured on another model; make them with `lowmem-aim calibrate`")


def _rounded(merged: Tensor, task: Task) -> Tensor:
    """The one rounding, to the output's dtype. A finite result that the dtype cannot hold is an error."""
    if task.dtype == torch.bfloat16 and kernels.usable([merged]):
        rounded, good = kernels.to_bfloat16(merged)
    else:
        rounded = merged.to(task.dtype)
        good = finite(rounded)
    if not good:
        raise ModelError(
            f"the merged `{printable(task.name)}` leaves the range of {str(task.dtype).removeprefix('torch.')}",
            hint="choose `out_dtype: bfloat16` or `float32`, or smaller weights",
        )
    return rounded
