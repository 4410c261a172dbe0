"""How a merge divides its budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lowmem_aim.errors import MemoryBudgetError
from lowmem_aim.methods import kernels
from lowmem_aim.models.headers import matrix_shape
from lowmem_aim.models.inputs import Inputs
from lowmem_aim.planning.tasks import Plan
from lowmem_aim.system.memory import Budget
from lowmem_aim.units import shown

# A slice of three experts and a base then has 2 MB of bfloat16: it stays in a processor's cache from read to write.
CPU_SLICE_ELEMENTS = 1 << 20
# Without compiled loops each operation makes a tensor of its own, of which these stay in the cache.
TORCH_SLICE_ELEMENTS = 1 << 17
# Large enough that starting a kernel costs nothing against running it.
GPU_SLICE_ELEMENTS = 1 << 22
# What a method may hold between its rounds, an expert: histograms, collected magnitudes.
STATS_BYTES = 24 << 20
# Slices read ahead, and finished ones that wait to be written, where the budget allows it.
AHEAD, WAITING = 4, 4
# Slices on a GPU at the same time: one copied in, one computed, one copied out.
STREAMS = 3


@dataclass(frozen=True)
class Shares:
    """The parts of a budget that a merge lives in."""

    slice_elements: int  # of each model, in work at a time
    workers: int  # slices computed at the same time
    ahead: int  # slices read ahead
    kept_bytes: int  # a tensor of at most so many bytes, all models together, is kept between its passes


def share_out(
    budget: Budget,
    device: torch.device,
    *,
    models: int,
    stored_bytes: int,
    row: int,
    threads: int,
    compiled: bool,
    scratch: int = 0,
) -> Shares:
    """Divide what is left of the budget.

    `stored_bytes`: of one element in all models and in the output; `row`: elements of the longest row; `compiled`:
    numba's loops run, which need no float32 copies; `scratch`: bytes an element that the method needs besides. Raises
    MemoryBudgetError if not even single rows fit.
    """
    on_host = budget.vram is None
    work = _work_bytes(models, on_host and compiled, scratch)
    left = budget.ram_left()
    ram = left - min(models * STATS_BYTES, left // 4)
    for workers, ahead in ((threads if on_host else STREAMS, AHEAD), (1, 1)):
        held = _held_bytes(stored_bytes, ahead, workers, work if on_host else 0)
        room = ram // 2 // held
        if not on_host:
            room = min(room, budget.vram_left(device) * 9 // 10 // ((stored_bytes + work) * workers))
        if room >= row:
            on_cpu = CPU_SLICE_ELEMENTS if compiled else TORCH_SLICE_ELEMENTS
            largest = on_cpu if device.type == "cpu" else GPU_SLICE_ELEMENTS
            return Shares(max(row, min(room, largest)), workers, ahead, kept_bytes=ram // 6)  # two tensors at a time
    where, there = ("RAM", left) if on_host else ("RAM or VRAM", min(left, budget.vram_left(device)))
    raise MemoryBudgetError(
        f"a row of {row} elements in {models} models needs some {shown(3 * row * held)}, but of the budget "
        f"{shown(there)} of {where} are left",
        hint="give more memory (`--ram`, `--vram`), close other programs, or merge fewer models at a time",
    )


def least_ram(*, models: int, stored_bytes: int, row: int, on_host: bool, compiled: bool, scratch: int = 0) -> int:
    """Bytes of RAM beside the program itself with which `share_out` finds room for single rows."""
    held = _held_bytes(stored_bytes, 1, 1, _work_bytes(models, on_host and compiled, scratch) if on_host else 0)
    rows = 2 * row * held
    return min(rows + models * STATS_BYTES, -(-rows * 4 // 3))


def _work_bytes(models: int, compiled: bool, scratch: int) -> int:
    """That computing an element takes."""
    return (12 if compiled else 4 * (2 * models + 6)) + scratch


def _held_bytes(stored_bytes: int, ahead: int, workers: int, work: int) -> int:
    """Of an element of a slice, which is held while it is read, waits, is computed, waits for its turn, is written."""
    return stored_bytes * (ahead + 2 * workers + WAITING) + work * workers


def shares_of(plans: Sequence[Plan], inputs: Inputs, budget: Budget, device: torch.device) -> Shares:
    """How a merge divides the budget. Raises MemoryBudgetError."""
    facts = _facts(plans, inputs, device)
    return share_out(budget, device, threads=torch.get_num_threads(), **facts)


def least_ram_of(plans: Sequence[Plan], inputs: Inputs, budget: Budget, device: torch.device) -> int:
    """Bytes of RAM beside the program itself that the merge takes at least."""
    return least_ram(on_host=budget.vram is None, **_facts(plans, inputs, device))


def _facts(plans: Sequence[Plan], inputs: Inputs, device: torch.device) -> dict[str, Any]:
    plan = plans[0]
    tasks = [task for task in plan.tasks if task.action == "merge"]
    models = len(inputs.experts) + 1
    widest = max((task.dtype.itemsize for task in tasks), default=4)
    stored = max((t.dtype.itemsize for checkpoint in inputs.checkpoints for t in checkpoint), default=4)
    return {
        "models": models,
        "stored_bytes": models * stored + widest * len(plans),
        "row": max(
            (max(matrix_shape(task.shape)) if task.whole else matrix_shape(task.shape)[1] for task in tasks), default=1
        ),
        "scratch": plan.recipe.method.scratch,
        "compiled": plan.recipe.method.compiled and device.type == "cpu" and kernels.available(),
    }
