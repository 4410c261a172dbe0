"""Memory that a merge takes, and the division of a budget for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lowmem_aim.errors import MemoryBudgetError
from lowmem_aim.methods import kernels
from lowmem_aim.models.headers import matrix_shape
from lowmem_aim.models.inputs import Inputs
from lowmem_aim.planning.tasks import Plan
from lowmem_aim.system.memory import Budget
from lowmem_aim.units import shown

# A slice then has 2 MB of bfloat16 in each model: it stays in a processor's cache from read to write.
CPU_SLICE_ELEMENTS = 1 << 20
# Without compiled loops each operation makes a tensor of its own, of which these stay in the cache.
TORCH_SLICE_ELEMENTS = 1 << 17
# Large enough that starting a kernel costs nothing against running it.
GPU_SLICE_ELEMENTS = 1 << 22
# What a method may hold between its rounds for each expert: histograms, collected magnitudes.
STATS_BYTES = 24 << 20
# Slices read ahead, and finished ones that wait to be written, where the budget allows it.
AHEAD, WAITING = 4, 4
# Slices on a GPU at the same time: one copied in, one computed, one copied out.
STREAMS = 3


@dataclass(frozen=True)
class Needs:
    """Figures of a merge's plans and models that decide how much memory each element in work takes."""

    models: int  # whose rows are in memory at the same time, the base's included
    stored_bytes: int  # of one element in all models and in all outputs
    row: int  # elements of the longest row
    compiled: bool  # numba's loops do the arithmetic; they make no float32 copies
    scratch: int = 0  # bytes an element that the method needs besides

    @classmethod
    def of(cls, plans: Sequence[Plan], inputs: Inputs, device: torch.device) -> Needs:
        """The needs of a merge that writes all `plans` at once; the plans differ in their relaxation only."""
        plan = plans[0]
        tasks = [task for task in plan.tasks if task.action == "merge"]
        models = len(inputs.experts) + 1
        widest = max((task.dtype.itemsize for task in tasks), default=4)
        stored = max((t.dtype.itemsize for checkpoint in inputs.checkpoints for t in checkpoint), default=4)
        rows = [max(matrix_shape(task.shape)) if task.whole else matrix_shape(task.shape)[1] for task in tasks]
        return cls(
            models=models,
            stored_bytes=models * stored + widest * len(plans),
            row=max(rows, default=1),
            compiled=plan.recipe.method.compiled and device.type == "cpu" and kernels.available(),
            scratch=plan.recipe.method.scratch,
        )

    def work_bytes(self, on_host: bool) -> int:
        """Bytes of temporaries needed to compute one element; `on_host`: on the CPU, where compiled loops may run."""
        return (12 if on_host and self.compiled else 4 * (2 * self.models + 6)) + self.scratch

    def held_bytes(self, ahead: int, workers: int, on_host: bool) -> int:
        """Bytes of RAM held for one element of a slice: read ahead, computed by each worker, waiting to be written."""
        work = self.work_bytes(on_host) if on_host else 0
        return self.stored_bytes * (ahead + 2 * workers + WAITING) + work * workers

    def least_ram(self, on_host: bool) -> int:
        """Least bytes of RAM, besides the program itself, with which `share_out` succeeds, slices being single rows."""
        rows = 2 * self.row * self.held_bytes(1, 1, on_host)
        return min(rows + self.models * STATS_BYTES, -(-rows * 4 // 3))


@dataclass(frozen=True)
class Shares:
    """The parts of a budget that a merge may use."""

    slice_elements: int  # of each model, in work at a time
    workers: int  # slices computed at the same time
    ahead: int  # slices read ahead
    kept_bytes: int  # a tensor of at most so many bytes, all models together, is kept between its passes


def share_out(budget: Budget, device: torch.device, needs: Needs) -> Shares:
    """Divide what is left of the budget. Raises MemoryBudgetError if not even single rows fit."""
    on_host = budget.vram is None
    left = budget.ram_left()
    ram = left - min(needs.models * STATS_BYTES, left // 4)
    for workers, ahead in ((torch.get_num_threads() if on_host else STREAMS, AHEAD), (1, 1)):
        held = needs.held_bytes(ahead, workers, on_host)
        room = ram // 2 // held
        if not on_host:
            on_device = (needs.stored_bytes + needs.work_bytes(on_host)) * workers
            room = min(room, budget.vram_left(device) * 9 // 10 // on_device)
        if room >= needs.row:
            on_cpu = CPU_SLICE_ELEMENTS if needs.compiled else TORCH_SLICE_ELEMENTS
            largest = on_cpu if device.type == "cpu" else GPU_SLICE_ELEMENTS
            elements = max(needs.row, min(room, largest))
            return Shares(elements, workers, ahead, kept_bytes=ram // 6)  # of two tensors: the next begins early
    where, there = ("RAM", left) if on_host else ("RAM or VRAM", min(left, budget.vram_left(device)))
    raise MemoryBudgetError(
        f"a row of {needs.row} elements in {needs.models} models needs some {shown(3 * needs.row * held)}, but only "
        f"{shown(there)} of {where} are left in the budget",
        hint="give more memory (`--ram`, `--vram`), close other programs, or merge fewer models at a time",
    )
