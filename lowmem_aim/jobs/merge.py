"""Whole jobs, from a recipe to a finished folder: open and check everything, calibrate, merge, finish."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import xxhash

from lowmem_aim.errors import printable
from lowmem_aim.events import Emit, Notice, Phase, PhaseEnded, PhaseStarted, Planned, silent
from lowmem_aim.jobs.options import DEFAULTS, Options, set_up
from lowmem_aim.jobs.resume import Identity, agree, check_same, differing_tensors
from lowmem_aim.measuring.calibration import Calibration, prepare
from lowmem_aim.merging.loop import merge_tensors
from lowmem_aim.merging.merged_weights import MergedWeights
from lowmem_aim.merging.shares import shares_of
from lowmem_aim.merging.targets import Target
from lowmem_aim.models.inputs import Inputs, open_inputs
from lowmem_aim.output.folder import (
    ACTIVATIONS,
    check_disk,
    check_outputs,
    is_finished,
)
from lowmem_aim.output.merged import Merged
from lowmem_aim.output.small_files import copied_files, output_files
from lowmem_aim.output.workspace import Workspace, publish, workspace
from lowmem_aim.planning.layout import make_plan
from lowmem_aim.planning.survey import survey
from lowmem_aim.planning.tasks import Plan
from lowmem_aim.recipe.recipe import Recipe, one_by_one
from lowmem_aim.relaxing.activations import Activations
from lowmem_aim.relaxing.relaxation import Consensus, Relaxation, check_activations, idle_exclusions
from lowmem_aim.system.memory import Budget
from lowmem_aim.view.feed import Feed, reported

if TYPE_CHECKING:
    from lowmem_aim.measuring.comparison import Comparison


def merge(recipe: Recipe, out: Path, options: Options = DEFAULTS, emit: Emit = silent) -> Path:
    """Merge by the recipe into the new folder `out`, or go on with a run that was interrupted there; returns `out`.

    Raises the errors of `errors`, before any work where that is possible; then `out` is as it was before. What a run
    had finished when it failed, or was killed, stays for the next.
    """
    with reported("merge", out, emit, options.command) as feed:
        return _merge(recipe, out, options, feed)


def _merge(recipe: Recipe, out: Path, options: Options, emit: Feed) -> Path:
    device, budget = set_up(options)
    for notice in recipe.notices:
        emit(Notice(notice, "warning"))
    folders = {out / name: one for name, one in one_by_one(recipe).items()}
    check_outputs(out, folders, [])
    with open_inputs(recipe, options.read, emit, options.use_cache) as inputs, contextlib.ExitStack() as stack:
        check_outputs(out, folders, [checkpoint.folder for checkpoint in inputs.checkpoints])
        plans = {
            folder: make_plan(
                one, inputs, seed=options.seed, shard_bytes=options.shard_bytes, nonfinite=options.nonfinite
            )
            for folder, one in folders.items()
        }
        copied = copied_files(inputs.reference)
        calibration = _calibration(recipe, inputs, emit)
        comparison = _comparison(recipe, inputs, device, emit)
        shares = partial(shares_of, [*plans.values()], inputs, budget, device)
        shares()  # a row that does not fit must show before hours of calibration
        unfinished: list[tuple[Workspace, Plan]] = []
        for folder, plan in plans.items():
            space = stack.enter_context(workspace(folder, fresh=options.fresh))
            compared = comparison.digest() if comparison else ""
            identity = Identity.of(plan, inputs, copied, calibration, device, compared)
            if _agreed(space, plan, identity, inputs, options, emit):
                unfinished.append((space, plan))
        if not unfinished:
            return out
        emit.record_in([space.private for space, _ in unfinished])
        named = {"" if space.out == out else space.out.name: plan for space, plan in unfinished}
        emit(_planned(named, inputs, calibration, device, budget))
        check_disk(out, sum(plan.output_bytes - space.staged_bytes() for space, plan in unfinished))
        activations = _activations(
            calibration, inputs, device, budget, [space for space, _ in unfinished], options.use_cache, emit
        )
        targets = [
            Target(
                plan,
                space.staging,
                space.journal,
                comparison.consensus(
                    plan,
                    inputs,
                    partial(MergedWeights, plan, inputs, Relaxation(plan.recipe.aim, activations, inputs)),
                    device=device,
                    budget=budget,
                    space=space,
                    emit=emit,
                )
                if comparison
                else None,
                "" if space.out == out else space.out.name,
            )
            for space, plan in unfinished
        ]
        merged = merge_tensors(
            targets,
            inputs,
            activations,
            device=device,
            shares=shares(),
            slice_rows=options.slice_rows,
            emit=emit,
        )
        consensuses = [target.consensus for target in targets]
        _finish(unfinished, merged, inputs, activations, consensuses, copied, emit)
    return out


def _planned(
    plans: Mapping[str, Plan], inputs: Inputs, calibration: Calibration | None, device: torch.device, budget: Budget
) -> Planned:
    recipe = next(iter(plans.values())).recipe
    phases: list[Phase] = ["calibrate"] if calibration and calibration.given is None else []
    phases += ["compare"] if recipe.acm else []
    layers = Counter("" if task.layer is None else str(task.layer) for plan in plans.values() for task in plan.tasks)
    return Planned(
        recipe.title,
        (*phases, "merge", "finish"),
        str(device),
        torch.get_num_threads(),
        budget.ram,
        budget.vram,
        tensors=sum(len(plan.tasks) for plan in plans.values()),
        layers={name: layers[name] for name in sorted(layers, key=lambda name: int(name or -1))},
        about=survey(plans, inputs).as_json(),
    )


def _agreed(space: Workspace, plan: Plan, identity: Identity, inputs: Inputs, options: Options, emit: Emit) -> bool:
    """Whether there is work to do in an output folder: made sure to be this job's. Raises ResumeError, UsageError."""
    if is_finished(space.out):
        check_same(space.journal, identity, space.out)
        emit(Notice(f"`{printable(str(space.out))}` is finished already"))
        return False
    _forget_lost(space)
    reread = partial(differing_tensors, plan, inputs, space.journal)
    agree(space.journal, identity, reread, accept_environment=options.accept_environment, emit=emit)
    space.journal.put("plan", "", plan.size())  # for `status`
    space.take_back()
    return True


def _finish(
    outputs: Sequence[tuple[Workspace, Plan]],
    merged: Sequence[Merged],
    inputs: Inputs,
    activations: Activations | None,
    consensuses: Sequence[Consensus | None],
    copied: dict[str, bytes],
    emit: Emit,
) -> None:
    # Before cards and pictures are made: that takes a second, and belongs to no other phase.
    emit(PhaseStarted("finish", sum(len(found.shards) for found in merged), "files"))
    files = [
        output_files(plan, inputs, activations, found, copied, space.journal.get("accepted"), consensus)
        for (space, plan), found, consensus in zip(outputs, merged, consensuses, strict=True)
    ]
    for (space, _), found, own in zip(outputs, merged, files, strict=True):
        publish(space, found.shards, own)
    emit(PhaseEnded("finish"))


def _calibration(recipe: Recipe, inputs: Inputs, emit: Emit) -> Calibration | None:
    if recipe.aim is None or inputs.base is None:
        return None
    calibration = prepare(recipe.aim, inputs.base, emit)
    if calibration.given:
        check_activations(calibration.given, inputs, recipe.aim)
    return calibration


def _comparison(recipe: Recipe, inputs: Inputs, device: torch.device, emit: Emit) -> Comparison | None:
    if recipe.acm is None or inputs.base is None:
        return None
    from lowmem_aim.measuring.comparison import Comparison  # transformers: only where models are run

    return Comparison.prepare(recipe.acm, inputs.base, device, emit)


def _activations(
    calibration: Calibration | None,
    inputs: Inputs,
    device: torch.device,
    budget: Budget,
    spaces: Sequence[Workspace],
    use_cache: bool,
    emit: Emit,
) -> Activations | None:
    """Measured ones are kept beside each output until it is finished, whatever becomes of the cache."""
    if calibration is None:
        return None
    activations = calibration.given
    lacking = [space for space in spaces if not _is_kept(space)]
    if activations is None and len(lacking) < len(spaces):
        activations = Activations.load(next(space for space in spaces if space not in lacking).private / ACTIVATIONS)
    if activations is None:
        first = spaces[0]
        activations = calibration.activations(
            device=device,
            budget=budget,
            folder=first.private,
            journal=first.journal,
            # What was measured in two environments is nobody else's.
            use_cache=use_cache and not any(space.journal.get("accepted") for space in spaces),
            emit=emit,
        )
    if calibration.given is None and lacking:
        weights = calibration.weights(activations)
        for space in lacking:
            kept = space.private / ACTIVATIONS
            activations.save(kept)
            space.journal.put("activations", "", {"file": _digest_of(kept), "weights": weights})
    for space in spaces:
        space.forget_calibration()
    check_activations(activations, inputs, calibration.aim)
    for part in idle_exclusions(activations, inputs, calibration.aim):
        emit(Notice(f"`aim.exclude`: `{printable(part)}` is part of no weight that AIM relaxes", "warning"))
    return activations


def _is_kept(space: Workspace) -> bool:
    """Whether an output has what an interrupted run had measured."""
    file, row = space.private / ACTIVATIONS, space.journal.get("activations")
    return row is not None and file.is_file() and row["file"] == _digest_of(file)


def _forget_lost(space: Workspace) -> None:
    """Activations that are no longer there are measured again, which must then be in the same environment."""
    if space.journal.holds("activations") and not _is_kept(space):
        space.journal.drop("activations")


def _digest_of(file: Path) -> str:
    return xxhash.xxh3_128_hexdigest(file.read_bytes())
