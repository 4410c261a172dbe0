"""A running job: its options, its device, its memory budget, and the receiver of its events."""

from __future__ import annotations

from dataclasses import dataclass

from lowmem_aim.errors import UsageError
from lowmem_aim.events import Emit
from lowmem_aim.system.devices import usable_device
from lowmem_aim.system.memory import Budget, make_budget
from lowmem_aim.system.on_demand import torch
from lowmem_aim.system.options import Options, wrong_options


@dataclass(frozen=True)
class Run:
    """A job at work: made once by `start`, then passed along whole."""

    options: Options
    device: torch.device
    budget: Budget
    emit: Emit


def start(options: Options, emit: Emit) -> Run:
    """Apply the options that hold for the whole process (threads), and find the device and the memory budget.

    Raises UsageError for wrong options and for a device that is not there.
    """
    if problems := list(wrong_options(options)):
        raise UsageError(problems, hint="docs/python.md has the options")
    if options.threads:
        torch.set_num_threads(options.threads)
    device = usable_device(options.device)
    return Run(options, device, make_budget(device, options.ram, options.vram), emit)
