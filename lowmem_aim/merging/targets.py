"""The outputs of a merge at work: what each does to merged rows (relax, round once), and where it puts them."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from lowmem_aim.errors import ModelError, printable
from lowmem_aim.events import Emit, Event, TensorDone, Worked
from lowmem_aim.merging.slices import finite
from lowmem_aim.methods import kernels
from lowmem_aim.methods.method import Rows
from lowmem_aim.output.journal import Journal
from lowmem_aim.output.shards import Read, Shards
from lowmem_aim.planning.tasks import Plan, Task
from lowmem_aim.relaxing.delta_sampler import DeltaSampler
from lowmem_aim.relaxing.relaxation import Consensus, Relax, Relaxation
from lowmem_aim.system.devices import DeviceStreams


@dataclass(frozen=True)
class Target:
    """One output: its plan, where its shards are made, and what is known of them."""

    plan: Plan
    staging: Path
    journal: Journal
    consensus: Consensus | None = None
    name: str = ""  # of its folder, where there are several


@dataclass(frozen=True)
class Output:
    """A target at work."""

    plan: Plan
    shards: Shards
    relaxation: Relaxation

    @functools.cached_property
    def left(self) -> dict[str, Task]:
        return {task.name: task for task in self.shards.left}


class SummedProgress:
    """Several outputs' progress as one."""

    def __init__(self, emit: Emit) -> None:
        self._emit = emit
        self._done: dict[tuple[int, type[Event]], float] = {}

    def of(self, number: int) -> Emit:
        """What one of them emits to."""

        def summed(event: Event) -> None:
            if isinstance(event, TensorDone | Worked) and event.done is not None:
                kind = type(event)
                self._done[number, kind] = event.done
                event = replace(event, done=sum(done for (_, of), done in self._done.items() if of is kind))
            self._emit(event)

        return summed


@dataclass(frozen=True)
class Finished:
    """A slice of an output's tensor, and its part of the sums that `DeltaSampler` takes."""

    rows: Tensor
    before: int = 0
    after: int = 0


@dataclass(frozen=True)
class Part:
    """What one output does to the merged rows of one tensor."""

    output: Output
    task: Task
    relax: Relax | None
    kept: DeltaSampler

    def finish(self, merged: Tensor, rows: Rows, streams: DeviceStreams) -> Finished:
        if self.relax is None:
            return Finished(streams.down(rounded(merged, self.task)))
        before = self.kept.of(merged, rows.stored_base, rows.start)
        relaxed = self.relax(merged, rows)
        after = self.kept.of(relaxed, rows.stored_base, rows.start)
        return Finished(streams.down(rounded(relaxed, self.task)), before, after)

    def append(self, finished: Finished) -> None:
        self.kept.add(finished.before, finished.after)  # here: a slice that fails is computed again
        self.output.shards.append(self.task, finished.rows)

    def done(self, read: Read) -> None:
        if self.relax is not None:
            read = replace(read, kept={self.task.name: self.kept.sums()})
        self.output.shards.tensor_done(self.task, read)


def rounded(merged: Tensor, task: Task) -> Tensor:
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
