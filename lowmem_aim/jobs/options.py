"""What every job begins with: how it is to be done, the device, and how memory is divided."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lowmem_aim.models.checkpoint import ReadMode
from lowmem_aim.planning.tasks import NonFinite
from lowmem_aim.system.devices import usable_device
from lowmem_aim.system.memory import Budget, make_budget

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
