"""A running job: its options, its device, its memory budget, and the receiver of its events."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

from lowmem_aim.errors import UsageError
from lowmem_aim.events import Emit, Notice
from lowmem_aim.system.devices import usable_device
from lowmem_aim.system.memory import Budget, make_budget, most_bytes
from lowmem_aim.system.on_demand import torch
from lowmem_aim.system.options import Options, wrong_options
from lowmem_aim.units import shown


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
    budget = make_budget(device, options.ram, options.vram)
    for notice in _more_than_there_is(options, budget):
        emit(Notice(notice, "warning"))
    return Run(options, device, budget, emit)


def _more_than_there_is(options: Options, budget: Budget) -> Iterator[str]:
    """Yield a notice for each option that asks for more than this machine has."""
    ram, cores = most_bytes(), usable_cores()
    if options.ram is not None and options.ram > ram:
        yield f"the RAM budget of {shown(options.ram)} is more than there is ({shown(ram)}): it protects nothing"
    if options.vram is not None and budget.vram is not None and options.vram > budget.vram:
        yield f"the VRAM budget of {shown(options.vram)} is more than the device has: {shown(budget.vram)} are used"
    if options.threads and cores and options.threads > cores:
        yield f"{options.threads} threads are more than the {cores} cores there are: this is slower, not faster"


def usable_cores() -> int | None:
    """The number of cores that this process may use; None where the system does not say."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
