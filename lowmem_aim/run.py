"""Whole jobs, from a recipe to a finished folder: open and check everything, calibrate, merge, finish."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from lowmem_aim.activation_cache import Calibration, prepare
from lowmem_aim.activations import Activations
from lowmem_aim.card import copied_files, output_files
from lowmem_aim.checkpoint import Checkpoint, ReadMode
from lowmem_aim.errors import UsageError, printable
from lowmem_aim.events import Emit, Notice, PhaseEnded, PhaseStarted, silent
from lowmem_aim.hub import locate
from lowmem_aim.inputs import Inputs, open_inputs
from lowmem_aim.merge import check_activations, merge_tensors
from lowmem_aim.output import check_disk, check_output, check_writable, publish, staged
from lowmem_aim.plan import make_plan
from lowmem_aim.recipe import Aim, Recipe
from lowmem_aim.skeleton import load_skeleton

DEFAULT_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class Options:
    """How to do a job; none of it, but `seed` and `shard_bytes`, changes a byte of the merge."""

    seed: int = 0
    shard_bytes: int = DEFAULT_SHARD_BYTES
    read: ReadMode = "mmap"
    device: str = "auto"
    threads: int | None = None
    use_cache: bool = True
    slice_rows: int | None = None  # rows in work at a time; None: what fits the processor's cache


def merge(recipe: Recipe, out: Path, options: Options = Options(), emit: Emit = silent) -> Path:
    """Merge by the recipe into the new folder `out`; returns it.

    Raises the errors of `errors`, before any work where that is possible; then `out` is as it was before.
    """
    device = _set_up(options)
    for notice in recipe.notices:
        emit(Notice(notice, "warning"))
    check_output(out, [])
    with open_inputs(recipe, options.read, emit) as inputs:
        check_output(out, [checkpoint.folder for checkpoint in inputs.checkpoints])
        plan = make_plan(recipe, inputs, seed=options.seed, shard_bytes=options.shard_bytes)
        check_disk(out, plan.output_bytes)
        copied = copied_files(inputs.reference)
        calibration = _calibration(recipe, inputs, emit)
        with staged(out) as staging:
            activations = _activations(calibration, inputs, device, options.use_cache, emit)
            merged = merge_tensors(
                plan,
                inputs,
                activations,
                staging,
                device=device,
                slice_rows=options.slice_rows,
                emit=emit,
            )
            files = output_files(plan, inputs, activations, merged, copied)
            emit(PhaseStarted("finish", len(plan.shards) + len(files), "files"))
            publish(out, staging, [shard.name for shard in plan.shards], files)
            emit(PhaseEnded("finish"))
    return out


def calibrate_base(
    base: str,
    aim: Aim,
    output: Path,
    options: Options = Options(),
    emit: Emit = silent,
) -> Path:
    """Measure the activations of a base model into the file `output`; returns it. Always measures, never the cache."""
    device = _set_up(options)
    if output.suffix != ".safetensors":
        raise UsageError(f"the output `{output}` must end in .safetensors")
    if output.exists():
        raise UsageError(f"`{output}` exists already", hint="name a new file, or remove that one")
    if not output.absolute().parent.is_dir():
        raise UsageError(f"there is no folder `{output.absolute().parent}`")
    located = locate(base, emit)
    if located.folder.resolve() in output.resolve().parents:
        raise UsageError(f"the output `{output}` lies inside the input model", hint="name a file elsewhere")
    check_writable(output.absolute().parent)
    with Checkpoint.open(located.folder, located.label, options.read) as checkpoint:
        calibration = prepare(aim, checkpoint, load_skeleton(checkpoint), emit)
        if calibration.given:
            raise UsageError("calibrate needs texts, not an activations file", hint="pass `--calibration file.jsonl`")
        calibration.measure(device=device, emit=emit).save(output)
    return output


def _set_up(options: Options) -> str:
    """Process-wide settings; returns the device to work on."""
    transformers.utils.logging.set_verbosity_error()  # what users should know comes as a Notice
    if options.threads:
        torch.set_num_threads(options.threads)
    return _usable(options.device)


def _usable(device: str) -> str:
    """The device that is meant. Raises UsageError if this machine has no such device."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch: unknown names, no driver, no such number
        raise UsageError(
            f"the device `{printable(device)}` cannot be used here: {printable(str(error).splitlines()[0])}",
            hint="`--device cpu` always works",
        ) from error
    return device


def _calibration(recipe: Recipe, inputs: Inputs, emit: Emit) -> Calibration | None:
    if recipe.aim is None or inputs.base is None:
        return None
    skeleton = inputs.skeleton if inputs.base is inputs.reference else load_skeleton(inputs.base)
    calibration = prepare(recipe.aim, inputs.base, skeleton, emit)
    if calibration.given:
        check_activations(calibration.given, inputs, recipe.aim)
    return calibration


def _activations(
    calibration: Calibration | None, inputs: Inputs, device: str, use_cache: bool, emit: Emit
) -> Activations | None:
    if calibration is None:
        return None
    activations = calibration.activations(device=device, use_cache=use_cache, emit=emit)
    check_activations(activations, inputs, calibration.aim)
    return activations
