"""Carried here from run.py."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import torch

from lowmem_aim.errors import UsageError, printable
from lowmem_aim.events import Emit, Planned, silent
from lowmem_aim.jobs.options import DEFAULTS, Options, set_up
from lowmem_aim.jobs.resume import Identity, agree, differing_weights
from lowmem_aim.measuring.calibration import prepare
from lowmem_aim.models.checkpoint import Checkpoint
from lowmem_aim.models.hub import locate
from lowmem_aim.output.folder import ACTIVATIONS, check_output, check_writable
from lowmem_aim.output.workspace import discard, workspace
from lowmem_aim.recipe.recipe import Aim
from lowmem_aim.system.files import disk_errors, partial_folder, sync_folder
from lowmem_aim.view.feed import Feed, reported


def calibrate_base(
    base: str,
    aim: Aim,
    output: Path,
    options: Options = DEFAULTS,
    emit: Emit = silent,
) -> Path:
    """Measure the activations of a base model into the file `output`; returns it. Always measures, never the cache.

    Until it is done, what a killed run goes on from lies in the folder `output`.partial.
    """
    with reported("calibrate", output, emit, options.command) as feed:
        return _calibrate(base, aim, output, options, feed)


def _calibrate(base: str, aim: Aim, output: Path, options: Options, emit: Feed) -> Path:
    device, budget = set_up(options)
    unfinished = partial_folder(output)
    if output.suffix != ".safetensors":
        raise UsageError(f"the output `{output}` must end in .safetensors")
    _check_new(output, unfinished)
    if not output.absolute().parent.is_dir():
        raise UsageError(f"there is no folder `{output.absolute().parent}`")
    located = locate(base, emit)
    if located.folder.resolve() in output.resolve().parents:
        raise UsageError(f"the output `{output}` lies inside the input model", hint="name a file elsewhere")
    check_writable(output.absolute().parent)
    check_output(unfinished, [])
    with Checkpoint.open(located.folder, located.label, options.read) as checkpoint:
        calibration = prepare(aim, checkpoint, emit)
        if calibration.given:
            raise UsageError("calibrate needs texts, not an activations file", hint="pass `--calibration file.jsonl`")
        with workspace(unfinished, fresh=options.fresh) as space:
            identity = Identity.of_calibration(calibration, device)
            reread = partial(differing_weights, checkpoint, space.journal)
            agree(space.journal, identity, reread, accept_environment=options.accept_environment, emit=emit)
            emit.record_in([space.private])
            threads = torch.get_num_threads()
            emit(Planned("activations", ("calibrate",), str(device), threads, budget.ram, budget.vram))
            measured = calibration.measure(
                device=device, budget=budget, folder=space.private, journal=space.journal, emit=emit
            )
            made = space.private / ACTIVATIONS
            measured.save(made)
            _check_new(output, unfinished)  # another run may have been quicker
            with disk_errors(output):
                os.replace(made, output)
                sync_folder(output.absolute().parent)
    discard(unfinished)
    return output


def _check_new(output: Path, unfinished: Path) -> None:
    if output.exists():
        left = f"; `{printable(str(unfinished))}` is what an interrupted run has left" if unfinished.exists() else ""
        raise UsageError(
            f"`{printable(str(output))}` exists already", hint=f"name a new file, or remove that one{left}"
        )
