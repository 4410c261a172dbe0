"""The loop: for each tensor of the plan, slice by slice, read -> method -> relax -> round once -> write.

The memory in use depends on `slices.SLICE_ELEMENTS` and the number of models, not on the size of a tensor or a model.
The bytes written depend on neither, nor on threads or read mode (see `methods.method`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from lowmem_aim.activations import Activations
from lowmem_aim.checkpoint import raw
from lowmem_aim.errors import ModelError, printable
from lowmem_aim.events import Advanced, Emit, PhaseEnded, PhaseStarted
from lowmem_aim.inputs import Inputs
from lowmem_aim.methods import Subject, measure
from lowmem_aim.plan import Plan, Task
from lowmem_aim.recipe import Aim
from lowmem_aim.relax.aim import relax, shrinkage, shrinkage_rows
from lowmem_aim.slices import Slices, Source, cuts, finite
from lowmem_aim.write import ShardWriter


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
        source = Source(self.inputs.reference, task.name)
        for start, stop in cuts(task.shape, self.slice_rows):
            yield source.stored(start, stop)
        self._keep_digest(source)

    def _merged(self, task: Task) -> Iterator[Tensor]:
        shrink = self._shrinkage(task)
        method = self.plan.recipe.method
        with_base = method.base == "required" or shrink is not None
        slices = Slices(task, self.inputs, with_base, self.slice_rows, self.device)
        experts = len(self.inputs.experts)
        subject = Subject(task.name, task.shape, math.prod(task.shape), experts, self.plan.seed)
        combine = measure(method.start(subject, task.parameters), slices)
        for rows in slices():
            merged = combine(rows)
            if shrink is not None:
                first = rows.start // merged.shape[1]
                part = shrinkage_rows(shrink, task.shape, first, first + merged.shape[0])
                merged = relax(merged, rows.base, self._known(task, part, first, merged.shape[0]))
            yield _rounded(merged, task)
        for source in slices.sources:
            self._keep_digest(source)
        if shrink is not None:
            self._check_base(task.name)

    # -- relaxation

    def _shrinkage(self, task: Task) -> Tensor | None:
        """AIM's shrinkage of this weight, on the device; None where it is not relaxed."""
        aim = self.plan.recipe.aim
        if aim is None or self.activations is None:
            return None
        name = statistic_of(task.name, self.activations, aim)
        return shrinkage(self.activations.means[name], aim.omega).to(self.device) if name else None

    def _known(self, task: Task, part: Tensor, first: int, count: int) -> Tensor:
        """`part` of a shrinkage without the rows that the base does not have: new vocabulary is not relaxed."""
        assert self.inputs.base is not None
        row_map = self.inputs.row_map(self.inputs.base, task.name)
        if row_map is None:
            return part
        known = (row_map[first : first + count] >= 0).to(part.device)
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

    # -- digests

    def _keep_digest(self, source: Source) -> None:
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
    rounded = merged.to(task.dtype)
    if not finite(rounded):
        raise ModelError(
            f"the merged `{printable(task.name)}` leaves the range of {str(task.dtype).removeprefix('torch.')}",
            hint="choose `out_dtype: bfloat16` or `float32`, or smaller weights",
        )
    return rounded.cpu().contiguous()
