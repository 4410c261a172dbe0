"""The merge, from a recipe to a finished folder: prepare, agree, calibrate, merge, finish."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lowmem_aim.errors import DiskError, printable
from lowmem_aim.events import Emit, Notice, Phase, PhaseEnded, PhaseStarted, Planned, silent
from lowmem_aim.jobs.finished import check_content
from lowmem_aim.jobs.preparation import prepared
from lowmem_aim.jobs.prepared import Prepared
from lowmem_aim.jobs.resume import activations_kept, agree, differing_tensors, digest_of_file
from lowmem_aim.measuring.calibration import GivenActivations, Measurement
from lowmem_aim.merging.loop import merge_tensors
from lowmem_aim.merging.merged_weights import MergedWeights
from lowmem_aim.merging.targets import SummedProgress, Target
from lowmem_aim.output.folder import ACTIVATIONS, check_disk, is_finished
from lowmem_aim.output.merged import Merged
from lowmem_aim.output.records import AcceptedEnvironments, KeptActivations, PlanSize
from lowmem_aim.output.shards import Shards
from lowmem_aim.output.small_files import output_files
from lowmem_aim.output.workspace import Workspace, publish, workspace
from lowmem_aim.planning.survey import survey
from lowmem_aim.planning.tasks import Plan
from lowmem_aim.recipe.recipe import Recipe
from lowmem_aim.relaxing.activations import Activations
from lowmem_aim.relaxing.relaxation import (
    ByChannel,
    ByLayer,
    Consensus,
    Relaxation,
    check_activations,
    idle_exclusions,
)
from lowmem_aim.system.files import input_errors
from lowmem_aim.system.on_demand import torch
from lowmem_aim.system.options import DEFAULTS, Options
from lowmem_aim.system.run import Run
from lowmem_aim.view.feed import Feed, reported


def merge(recipe: Recipe, out: Path, options: Options = DEFAULTS, emit: Emit = silent) -> Path:
    """Merge by the recipe into the new folder `out`, or resume a run that was interrupted there; return `out`.

    Raises the errors of `errors`, before any work where that is possible; `out` is then as it was before. What a run
    had finished when it failed, or was killed, stays for the next run.
    """
    with reported("merge", out, emit, options.command) as feed:
        return _merge(recipe, out, options, feed)


def _merge(recipe: Recipe, out: Path, options: Options, feed: Feed) -> Path:
    for notice in recipe.notices:
        feed(Notice(notice, "warning"))
    with prepared(recipe, out, options, feed) as ready, agreed(ready, feed) as outputs:
        if outputs:
            activations = calibrated(ready, outputs)
            merged = merge_outputs(ready, outputs, activations)
            finish(ready, outputs, activations, merged)
    return out


@dataclass
class HeldOutput:
    """One output while it is made: its plan, its folder, which this run holds, and the result of ACM for it."""

    name: str  # of its folder, where there are several; else empty
    plan: Plan
    space: Workspace
    consensus: Consensus | None = None


# --- agree ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def agreed(ready: Prepared, feed: Feed) -> Iterator[list[HeldOutput]]:
    """Hold every output folder that is still to be made, once it is sure to be this job's, and begin its log.

    Raises all errors of the preparation, LockedError, ResumeError, UsageError, DiskError.
    """
    ready.refuse()
    with contextlib.ExitStack() as stack:
        outputs = []
        for name, plan in ready.plans.items():
            space = stack.enter_context(workspace(ready.folder(name), fresh=ready.options.fresh))
            if _is_left(ready, name, space):
                outputs.append(HeldOutput(name, plan, space))
        if outputs:
            feed.record_in([output.space.private for output in outputs])
            feed(_planned(ready, outputs))
            check_disk(ready.out, ready.bytes_to_write())
        yield outputs


def _is_left(ready: Prepared, name: str, space: Workspace) -> bool:
    """Whether an output is still to be made; its folder is checked to be this job's. Raises ResumeError, UsageError."""
    plan = ready.plans[name]
    reread = partial(differing_tensors, plan, ready.inputs, space.journal)
    if is_finished(space.out):
        now = ready.identity(name) if ready.measures else ready.known(name)
        check_content(space.journal, now, space.out, reread, ready.emit)
        ready.emit(Notice(f"`{printable(str(space.out))}` is finished already"))
        return False
    _forget_lost(space)
    accept = ready.options.accept_environment
    agree(space.journal, ready.identity(name), reread, accept_environment=accept, emit=ready.emit)
    space.journal.keep(PlanSize(**plan.size()))
    space.take_back()
    return True


def _planned(ready: Prepared, outputs: Sequence[HeldOutput]) -> Planned:
    plans: Mapping[str, Plan] = {output.name: output.plan for output in outputs}
    recipe, budget = outputs[0].plan.recipe, ready.run.budget
    phases: list[Phase] = ["calibrate"] if isinstance(ready.calibration, Measurement) else []
    phases += ["compare"] if recipe.acm else []
    layers = Counter("" if task.layer is None else str(task.layer) for plan in plans.values() for task in plan.tasks)
    return Planned(
        recipe.title,
        (*phases, "merge", "finish"),
        str(ready.run.device),
        torch.get_num_threads(),
        budget.ram,
        budget.vram,
        tensors=sum(len(plan.tasks) for plan in plans.values()),
        layers={name: layers[name] for name in sorted(layers, key=lambda name: int(name or -1))},
        about=survey(plans, ready.inputs).as_json(),
    )


# --- calibrate --------------------------------------------------------------------------------------------------------


def calibrated(ready: Prepared, outputs: Sequence[HeldOutput]) -> Activations | None:
    """The base's activations, for AIM: given, kept by an interrupted run, from the cache, or measured now.

    Measured activations are kept beside each output until the output is finished, whatever becomes of the cache. Raises
    ModelError, MemoryBudgetError, DiskError.
    """
    calibration, run = ready.calibration, ready.run
    if calibration is None:
        return None
    spaces = [output.space for output in outputs]
    if isinstance(calibration, GivenActivations):
        activations = calibration.activations
    else:
        activations = _measured(calibration, run, spaces)
        calibration.tell_unseen(activations, run.emit)
    for space in spaces:
        space.forget_calibration()
    check_activations(activations, calibration.base, calibration.aim)
    for part in idle_exclusions(activations, calibration.base, calibration.aim):
        run.emit(Notice(f"`aim.exclude`: `{printable(part)}` matches no weight that AIM relaxes", "warning"))
    return activations


def _measured(measurement: Measurement, run: Run, spaces: Sequence[Workspace]) -> Activations:
    lacking = [space for space in spaces if not activations_kept(space.private, space.journal)]
    kept = next((space for space in spaces if space not in lacking), None)
    if kept:
        run.emit(Notice("resuming: the activations are already measured"))
        activations = Activations.load(kept.private / ACTIVATIONS)
    else:
        # What was measured in two environments must not reach the cache, from which other merges take.
        mixed = any(space.journal.kept(AcceptedEnvironments) for space in spaces)
        use_cache = run.options.use_cache and not mixed
        activations = measurement.activations(run, spaces[0].private, spaces[0].journal, use_cache=use_cache)
    if lacking:
        weights = measurement.weights(activations)
        for space in lacking:
            file = space.private / ACTIVATIONS
            activations.save(file)
            with input_errors(file, DiskError):
                digest = digest_of_file(file)
            space.journal.keep(KeptActivations(digest, weights))
    return activations


def _forget_lost(space: Workspace) -> None:
    """Forget kept activations whose file is gone: measuring them again then requires the same environment."""
    if space.journal.holds(KeptActivations) and not activations_kept(space.private, space.journal):
        space.journal.forget(KeptActivations)


# --- merge ------------------------------------------------------------------------------------------------------------


def merge_outputs(ready: Prepared, outputs: Sequence[HeldOutput], activations: Activations | None) -> list[Merged]:
    """Write the shards of every output into its staging folder. With ACM, first compare base and merged model.

    Raises ModelError, ResumeError, MemoryBudgetError, DiskError.
    """
    inputs, run = ready.inputs, ready.run
    progress = SummedProgress(run.emit)
    targets = []
    for number, output in enumerate(outputs):
        relaxation = _relaxation(ready, output, activations)
        space = output.space
        shards = Shards(output.plan, space.staging, space.journal, progress.of(number), output.name)
        targets.append(Target(output.plan, shards, relaxation))
    return merge_tensors(targets, inputs, run, ready.shares(grown=True))


def _relaxation(ready: Prepared, output: HeldOutput, activations: Activations | None) -> Relaxation:
    """AIM and then ACM, as the recipe asks for them; ACM is measured here, on the merged model as AIM leaves it."""
    inputs, aim, relaxation = ready.inputs, output.plan.recipe.aim, Relaxation()
    if ready.calibration and activations and aim:
        relaxation = relaxation.then(ByChannel(aim, activations, ready.calibration.base))
    if ready.comparison:
        merged = partial(MergedWeights, output.plan, inputs, relaxation)
        output.consensus = ready.comparison.consensus(
            output.plan, inputs, merged, ready.outline(), ready.run, output.space
        )
        relaxation = relaxation.then(ByLayer(output.consensus))
    return relaxation


# --- finish -----------------------------------------------------------------------------------------------------------


def finish(
    ready: Prepared, outputs: Sequence[HeldOutput], activations: Activations | None, merged: Sequence[Merged]
) -> None:
    """Make the small files of every output, then give all its files their names. Raises DiskError."""
    # Emitted before cards and pictures are made: making them takes a second, which belongs to no other phase.
    ready.emit(PhaseStarted("finish", sum(len(found.shards) for found in merged), "files"))
    files = [_small_files(ready, output, activations, found) for output, found in zip(outputs, merged, strict=True)]
    for output, found, own in zip(outputs, merged, files, strict=True):
        publish(output.space, found.shards, {shard.name: shard.nbytes for shard in output.plan.shards}, own)
    ready.emit(PhaseEnded("finish"))


def _small_files(
    ready: Prepared, output: HeldOutput, activations: Activations | None, found: Merged
) -> dict[str, bytes]:
    accepted = output.space.journal.kept(AcceptedEnvironments)
    environments = accepted.environments if accepted else None
    return output_files(
        output.plan, ready.inputs, activations, found, ready.copied, ready.config, environments, output.consensus
    )
