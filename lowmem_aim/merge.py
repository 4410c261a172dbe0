"""The loop: for each tensor of the plan, slice by slice, read -> method -> relax -> round once -> write.

The memory in use depends on SLICE_ELEMENTS and the number of models, not on the size of a tensor or a model. The bytes
written depend on neither, nor on threads or read mode (see `methods.method`).

The first pass over a tensor also checks every model's rows for NaN and Inf, and takes the digest of its bytes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from lowmem_aim.activations import Activations
from lowmem_aim.checkpoint import Checkpoint, raw
from lowmem_aim.errors import ModelError, printable
from lowmem_aim.events import Advanced, Emit, PhaseEnded, PhaseStarted
from lowmem_aim.headers import matrix_shape
from lowmem_aim.inputs import Inputs
from lowmem_aim.methods import Rows, Subject, measure
from lowmem_aim.plan import Plan, Task
from lowmem_aim.recipe import Aim
from lowmem_aim.relax.aim import relax, shrinkage, shrinkage_rows
from lowmem_aim.write import ShardWriter

# A slice of three experts and a base is then 4 MB of float32: it stays in a processor's cache from read to write.
SLICE_ELEMENTS = 1 << 18


@dataclass(frozen=True)
class Merged:
    """What was written and what was read, as digests; all of it follows from the inputs."""

    shards: dict[str, str] = field(default_factory=dict)  # file name -> sha256
    models: list[tuple[str, str]] = field(default_factory=list)  # label, xxh3-128 over its tensors as read, by name


def merge_tensors(
    plan: Plan,
    inputs: Inputs,
    activations: Activations | None,
    staging: Path,
    *,
    device: str,
    slice_rows: int | None,
    emit: Emit,
) -> Merged:
    """Write all shards of the plan into `staging`, durably. Raises ModelError (NaN, changed inputs) and DiskError.

    `slice_rows` overrides how many rows are in work at a time; the bytes do not depend on it.
    """
    emit(PhaseStarted("merge", plan.tensor_bytes, "bytes"))
    loop = _Loop(plan, inputs, activations, torch.device(device), slice_rows)
    merged = Merged()
    done = 0
    for shard in plan.shards:
        with ShardWriter(staging / shard.name, shard.nbytes) as writer:
            writer.append(shard.header)
            for task in shard.tasks:
                for rows in loop.rows_of(task):
                    writer.append(raw(rows))
                done += task.nbytes
                emit(Advanced(done, task.name))
            merged.shards[shard.name] = writer.close()
    merged.models.extend(loop.model_digests())
    emit(PhaseEnded("merge"))
    return merged


@dataclass
class _Loop:
    plan: Plan
    inputs: Inputs
    activations: Activations | None
    device: torch.device
    slice_rows: int | None
    # checkpoint folder -> tensor -> xxh3-128 of its rows as read
    digests: dict[Path, dict[str, str]] = field(default_factory=dict)

    def rows_of(self, task: Task) -> Iterator[Tensor]:
        """The finished rows of one tensor, on the CPU, contiguous, in the output's dtype."""
        return self._copied(task) if task.action == "copy" else self._merged(task)

    def _copied(self, task: Task) -> Iterator[Tensor]:
        source = _Source(self.inputs.reference, task.name)
        for start, stop in self._cuts(task.shape):
            yield source.stored(start, stop)
        self._keep_digest(source)

    def _merged(self, task: Task) -> Iterator[Tensor]:
        shrink = self._shrinkage(task)
        method = self.plan.recipe.method
        slices = _Slices(task, self.inputs, method.base == "required" or shrink is not None, self._cuts, self.device)
        experts = len(self.inputs.experts)
        subject = Subject(task.name, task.shape, math.prod(task.shape), experts, self.plan.seed)
        combine = measure(method.start(subject, task.parameters), slices)
        for rows in slices():
            merged = combine(rows)
            if shrink is not None:
                first = rows.start // merged.shape[1]
                part = shrinkage_rows(shrink, task.shape, first, first + merged.shape[0])
                merged = relax(merged, rows.base, part)
            yield _rounded(merged, task)
        for source in slices.sources:
            self._keep_digest(source)
        if shrink is not None:
            self._check_base(task.name)

    def _cuts(self, shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
        rows, columns = matrix_shape(shape)
        step = self.slice_rows or max(1, SLICE_ELEMENTS // max(columns, 1))
        return ((start, min(start + step, rows)) for start in range(0, rows, step))

    # -- relaxation

    def _shrinkage(self, task: Task) -> Tensor | None:
        """AIM's shrinkage of this weight, on the device; None where it is not relaxed."""
        aim = self.plan.recipe.aim
        if aim is None or self.activations is None:
            return None
        name = statistic_of(task.name, self.activations, aim)
        return shrinkage(self.activations.means[name], aim.omega).to(self.device) if name else None

    def _check_base(self, name: str) -> None:
        """The activations must have been taken on these very weights."""
        assert self.inputs.base is not None
        assert self.activations is not None
        expected = self.activations.base_digests.get(name)
        if expected is not None and expected != self.digests[self.inputs.base.folder][name]:
            raise ModelError(
                f"the activations were measured on another base: `{printable(name)}` differs in "
                f"`{printable(self.inputs.base.label)}`",
                hint="calibrate this base: `lowmem-aim calibrate`",
            )

    # -- digests

    def _keep_digest(self, source: _Source) -> None:
        self.digests.setdefault(source.checkpoint.folder, {})[source.name] = source.digest()

    def model_digests(self) -> list[tuple[str, str]]:
        """(label, one digest over all tensors of the model that were read, by name), for each model."""
        found = []
        for checkpoint in self.inputs.checkpoints:
            table = sorted(self.digests.get(checkpoint.folder, {}).items())
            text = "".join(f"{name}\0{value}\n" for name, value in table)
            found.append((checkpoint.label, xxhash.xxh3_128_hexdigest(text.encode("utf-8", "surrogatepass"))))
        return found


def statistic_of(name: str, activations: Activations, aim: Aim) -> str | None:
    """Whose statistic relaxes the weight `name`: its own; its head's, for a tied embedding; or none."""
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
    rounded = merged.to(task.dtype)
    if not _finite(rounded):
        raise ModelError(
            f"the merged `{printable(task.name)}` leaves the range of {str(task.dtype).removeprefix('torch.')}",
            hint="choose `out_dtype: bfloat16` or `float32`, or smaller weights",
        )
    return rounded.cpu().contiguous()


def _finite(rows: Tensor) -> bool:
    # One reduction instead of an elementwise test: NaN and Inf always show in a sum; finite sums may overflow, so a
    # bad sum only asks for the slow look. Sums of float16 are taken in float32 for that reason.
    return math.isfinite(float(rows.sum(dtype=torch.float32))) or bool(rows.isfinite().all())


# --- reading --------------------------------------------------------------------------------------------------------


class _Source:
    """One model's rows of one tensor, and the digest of those read through `stored` first to last."""

    def __init__(self, checkpoint: Checkpoint, name: str, row_map: Tensor | None = None) -> None:
        self.checkpoint = checkpoint
        self.name = name
        self._row_map = row_map
        self._hash = xxhash.xxh3_128()
        self._hashing = True

    def stored(self, start: int, stop: int) -> Tensor:
        """Rows start:stop as they are stored; the first time around they enter the digest."""
        rows = self.checkpoint.rows(self.name, start, stop)
        if self._hashing:
            self._hash.update(raw(rows))
        return rows

    def rows(self, start: int, stop: int, base: Tensor | None, device: torch.device) -> Tensor:
        """Rows start:stop of the reference's numbering, float32; tokens that this model lacks take `base`'s rows."""
        if self._row_map is None:
            return self.stored(start, stop).to(device).to(torch.float32)
        wanted = self._row_map[start:stop]
        assert base is not None
        rows = base.clone()
        for first, run in _runs(wanted):
            if run[0] >= 0:
                part = self.stored(int(run[0]), int(run[0]) + len(run))
                rows[first : first + len(run)] = part.to(device).to(torch.float32)
        return rows

    def first_pass_done(self) -> None:
        self._hashing = False

    def digest(self) -> str:
        return self._hash.hexdigest()


def _runs(wanted: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(place, run) for each stretch of consecutive rows, or of missing ones (-1): few, as vocabularies mostly agree."""
    before, after = wanted[:-1], wanted[1:]
    goes_on = torch.where(before == -1, after == -1, after == before + 1)
    breaks = (~goes_on).nonzero().flatten() + 1
    for first, last in itertools.pairwise([0, *breaks.tolist(), len(wanted)]):
        yield first, wanted[first:last]


class _Slices:
    """Called, it gives one pass over all slices of one tensor in all models."""

    def __init__(
        self,
        task: Task,
        inputs: Inputs,
        with_base: bool,
        cuts: Callable[[tuple[int, ...]], Iterator[tuple[int, int]]],
        device: torch.device,
    ) -> None:
        self._task = task
        self._cuts = cuts
        self._device = device
        self._checked = False
        self._experts = [
            _Source(expert, task.name, inputs.row_map(i, task.name)) for i, expert in enumerate(inputs.experts)
        ]
        # Rows that a mapped vocabulary lacks come from the reference, whether the method reads it or not.
        mapped = any(inputs.row_map(i, task.name) is not None for i in range(len(inputs.experts)))
        self._base = _Source(inputs.reference, task.name) if with_base or mapped else None

    @property
    def sources(self) -> list[_Source]:
        return [*([self._base] if self._base else []), *self._experts]

    def __call__(self) -> Iterator[Rows]:
        columns = matrix_shape(self._task.shape)[1]
        nothing = torch.empty(0, device=self._device)
        for start, stop in self._cuts(self._task.shape):
            base = self._base.rows(start, stop, None, self._device) if self._base else None
            experts = tuple(source.rows(start, stop, base, self._device) for source in self._experts)
            if not self._checked:
                self._check((base, *experts) if base is not None else experts)
            yield Rows(nothing if base is None else base, experts, start * columns)
        self._checked = True
        for source in self.sources:
            source.first_pass_done()

    def _check(self, rows: tuple[Tensor, ...]) -> None:
        if all(_finite(part) for part in rows):
            return
        problems = []
        for source in self.sources:
            count = self._count(source)
            if count:
                where = f"`{printable(self._task.name)}` of `{printable(source.checkpoint.label)}`"
                problems.append(f"{where} holds {count} value(s) that are NaN or Inf")
        raise ModelError(problems, hint="a broken download or a diverged fine-tune: get this model again")

    def _count(self, source: _Source) -> int:
        info = source.checkpoint.tensors[source.name]
        cuts = self._cuts(info.shape)
        return sum(int((~source.checkpoint.rows(source.name, a, b).isfinite()).sum()) for a, b in cuts)
