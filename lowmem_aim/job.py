"""What every job begins with: how it is to be done, the device, and how memory is divided."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lowmem_aim import kernels
from lowmem_aim.checkpoint import ReadMode
from lowmem_aim.devices import usable_device
from lowmem_aim.headers import matrix_shape
from lowmem_aim.inputs import Inputs
from lowmem_aim.memory import Budget, Shares, least_ram, make_budget, share_out
from lowmem_aim.plan import NonFinite, Plan

DEFAULT_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class Options:
    """How to do a job; none of it, but `seed`, `shard_bytes` and `nonfinite`, changes a byte of the merge.

    What AIM and ACM measure depends in its low bits on `device` and `threads`, though.
    """

    seed: int = 0
    nonfinite: NonFinite = "stop"  # what becomes of an expert's NaN and Inf
    shard_bytes: int = DEFAULT_SHARD_BYTES
    read: ReadMode = "mmap"
    device: str = "auto"
    threads: int | None = None
    use_cache: bool = True
    ram: int | None = None  # bytes of anonymous memory; None: what is free, less a reserve
    vram: int | None = None  # the same on a device with memory of its own
    slice_rows: int | None = None  # rows in work at a time; None: what fits the budget and the processor's cache
    fresh: bool = False  # discard what an interrupted run has left
    accept_environment: bool = False  # go on with it under other versions or on another device
    command: str = ""  # what to type to go on, for those who look at the run


DEFAULTS = Options()


def set_up(options: Options) -> tuple[torch.device, Budget]:
    """Process-wide settings; returns the device to work on and the budget."""
    if options.threads:
        torch.set_num_threads(options.threads)
    device = usable_device(options.device)
    return device, make_budget(device, options.ram, options.vram)


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
