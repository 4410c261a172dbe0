"""The calibration by itself: a base's activations are measured into a file, which merges can be given."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

from lowmem_aim.errors import LowmemAimError, UsageError, joined, noted, printable
from lowmem_aim.events import Emit, Planned, silent
from lowmem_aim.jobs.identity import identity_of_calibration
from lowmem_aim.jobs.new_file import check_absent, check_new_file
from lowmem_aim.jobs.preparation import missing_texts
from lowmem_aim.jobs.resume import agree, differing_weights
from lowmem_aim.measuring.calibration import Measurement, calibration_of
from lowmem_aim.models.checkpoint import Checkpoint
from lowmem_aim.models.hub import local_model, locate
from lowmem_aim.models.opening import opened, parts_found
from lowmem_aim.models.reader import Reader
from lowmem_aim.output.folder import ACTIVATIONS
from lowmem_aim.output.workspace import workspace
from lowmem_aim.recipe.recipe import Aim
from lowmem_aim.recipe.words import is_activations_file
from lowmem_aim.system.files import disk_errors, partial_folder, real, sync_folder
from lowmem_aim.system.on_demand import torch
from lowmem_aim.system.options import DEFAULTS, Options, wrong_options
from lowmem_aim.system.run import start
from lowmem_aim.view.feed import Feed, reported


def calibrate(
    base: str,
    aim: Aim,
    output: Path,
    options: Options = DEFAULTS,
    emit: Emit = silent,
) -> Path:
    """Measure the activations of a base model into the file `output`, whatever the cache holds; return `output`.

    Until the file is there, what a killed run resumes from lies in the folder `output`.partial. Raises UsageError,
    ModelError, DiskError, MemoryBudgetError, LockedError, ResumeError, NetworkError.
    """
    with reported("calibrate", output, emit, options.command) as feed:
        return _calibrate(base, aim, output, options, feed)


def _calibrate(base: str, aim: Aim, output: Path, options: Options, feed: Feed) -> Path:
    unfinished = partial_folder(output)
    with _opened(base, aim, output, options, feed) as checkpoint:
        run = start(options, feed)
        for notice in checkpoint.oddities:
            run.emit(notice)
        with Reader(run.options.use_cache) as reader:
            calibration = calibration_of(aim, checkpoint, reader, run.emit)
        assert isinstance(calibration, Measurement)  # `_opened` has refused a file of activations
        with workspace(unfinished, fresh=run.options.fresh) as space:
            identity = identity_of_calibration(calibration, run.device)
            reread = partial(differing_weights, checkpoint, space.journal)
            accept = run.options.accept_environment
            agree(space.journal, identity, reread, accept_environment=accept, emit=run.emit)
            feed.record_in([space.private])
            threads, budget = torch.get_num_threads(), run.budget
            layers = {str(number): 1 for number in range(len(calibration.meta_model.blocks))}
            device = str(run.device)
            run.emit(Planned("activations", ("calibrate",), device, threads, budget.ram, budget.vram, layers=layers))
            made = space.private / ACTIVATIONS
            measured = calibration.measure(run, space.private, space.journal)
            calibration.tell_unseen(measured, run.emit)
            measured.save(made)
            check_absent(output)  # again: another run may have made the file meanwhile
            with disk_errors(output):
                os.replace(made, output)
                sync_folder(output.absolute().parent)
            space.spent = True
    return output


def _opened(base: str, aim: Aim, output: Path, options: Options, emit: Emit) -> Checkpoint:
    """The base, once all that can be checked without torch is right. Raises every error that there is."""
    errors: list[LowmemAimError] = []
    with noted(errors):
        if problems := list(wrong_options(options)):
            raise UsageError(problems, hint="docs/python.md has the options")
    with noted(errors):
        check_new_file(output, ".safetensors", "activations.safetensors")
    errors += missing_texts(aim.calibration)
    if is_activations_file(aim.calibration):
        errors.append(UsageError("calibrate needs texts, not activations", hint="pass `--calibration file.jsonl`"))
    with noted(errors), Reader(options.use_cache) as reader:
        if None not in parts_found(base, local_model) or not errors:
            checkpoint = opened(base, lambda part, is_adapter: locate(part, emit, is_adapter), options.read, reader)
            if set(map(real, checkpoint.place)) & set(real(output).parents):
                checkpoint.close()
                raise UsageError(
                    f"the output `{printable(str(output))}` lies inside the input model", hint="name a file elsewhere"
                )
            if not errors:
                return checkpoint
            checkpoint.close()
    raise joined(errors)
