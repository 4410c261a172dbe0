"""The merge, from a recipe to a finished folder: prepare, agree, calibrate, merge, finish."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from lowmem_aim.errors import DiskError, printable, raise_all
from lowmem_aim.events import Emit, Notice, PhaseEnded, PhaseStarted, Planned, silent
from lowmem_aim.jobs.held import HeldOutput, Output, agreed, holding, planned, planned_in_all
from lowmem_aim.jobs.on_texts import consensus_of, moments_of
from lowmem_aim.jobs.preparation import prepared
from lowmem_aim.jobs.prepared import Behind, Prepared
from lowmem_aim.jobs.resume import activations_kept, digest_of_file, digests_read
from lowmem_aim.jobs.stages import Stages
from lowmem_aim.measuring.calibration import GivenActivations, Measurement
from lowmem_aim.merging.given import BlockMoments, Given
from lowmem_aim.merging.loop import matrix_space, merge_tensors
from lowmem_aim.merging.reads import ReadLog
from lowmem_aim.merging.shares import Shares
from lowmem_aim.merging.targets import SummedProgress, Target
from lowmem_aim.methods.moments import MatrixSpace
from lowmem_aim.models.opening import FETCHED
from lowmem_aim.output.folder import ACTIVATIONS, PRIVATE, is_finished
from lowmem_aim.output.journal import Journal
from lowmem_aim.output.merged import Merged
from lowmem_aim.output.portable import StageFacts
from lowmem_aim.output.records import AcceptedEnvironments, Identity, KeptActivations, MadeStage, PlanSize
from lowmem_aim.output.small_files import PROVENANCE, output_files
from lowmem_aim.output.stages import put_away, remove_stages
from lowmem_aim.output.workspace import Workspace, publish
from lowmem_aim.recipe.recipe import Recipe, one_by_one
from lowmem_aim.relaxing.activations import Activations
from lowmem_aim.relaxing.relaxation import (
    ByChannel,
    ByLayer,
    Relaxation,
    check_activations,
    idle_exclusions,
)
from lowmem_aim.system.files import input_errors, read_file
from lowmem_aim.system.options import DEFAULTS, Options
from lowmem_aim.system.run import Run
from lowmem_aim.units import counted
from lowmem_aim.view.feed import Feed, reported


def merge(recipe: Recipe, out: Path, options: Options = DEFAULTS, emit: Emit = silent) -> Path:
    """Merge by the recipe into the new folder `out`, or resume a run that was interrupted there; return `out`.

    Raises the errors of `errors`, before any work where that is possible; `out` is then as it was before. What a run
    had finished when it failed, or was killed, stays for the next run.
    """
    with reported("merge", out, emit, options.command) as feed:
        return _merge(recipe, out, options, feed)


def _merge(recipe: Recipe, out: Path, options: Options, feed: Feed) -> Path:
    for notice in (notice for part in recipe.in_order.values() for notice in part.notices):
        feed(Notice(notice, "warning"))
    if recipe.stages:
        return _merge_stages(recipe, out, options, feed)
    with prepared(one_by_one(recipe), out, options, feed) as ready:
        ready.refuse()
        with holding(out, ready.plans, fresh=options.fresh) as spaces:
            if outputs := agreed(ready, spaces):
                feed.record_in([output.space.private for output in outputs])
                feed(planned(ready, [output.name for output in outputs]))
                make(ready, outputs)
    return out


def make(ready: Prepared, outputs: Sequence[HeldOutput]) -> None:
    """Make the outputs, which this run holds. Raises the errors of `merge`."""
    activations = calibrated(ready, outputs)
    merged = merge_outputs(ready, outputs, activations)
    finish(ready, outputs, activations, merged)


# --- stages -----------------------------------------------------------------------------------------------------------


def _merge_stages(recipe: Recipe, out: Path, options: Options, feed: Feed) -> Path:
    """Make the named stages of a recipe, in their order, and then its output; all is checked before the first."""
    with Stages(recipe, out, options, feed, FETCHED) as stages:
        parts: dict[str, Planned] = {}

        def visit(name: str, ready: Prepared) -> None:
            if not ready.errors and (left := ready.unfinished()):
                parts[name] = planned(ready, left)

        raise_all(stages.check(visit, reread=True))
        with holding(out, one_by_one(recipe), fresh=options.fresh) as spaces:
            if not stages.over:
                feed.record_in([space.private for space in spaces.values() if not is_finished(space.out)])
                feed(planned_in_all({name: parts[name] for name in recipe.stages if name in parts}, parts[""]))
                _make_stages(stages, fresh=options.fresh)
            with stages.prepared("", held=True) as ready:
                ready.refuse()
                if outputs := agreed(ready, spaces):
                    _note_stages(stages, outputs)
                    make(ready, outputs)
    put_away(out, options.keep_stages)
    return out


def _make_stages(stages: Stages, *, fresh: bool) -> None:
    """Make the stages that are not finished. `fresh`: make all anew."""
    if fresh:
        remove_stages(stages.out)
    for name in stages.recipe.stages:
        with stages.prepared(name, held=True) as ready:
            ready.refuse()
            with holding(stages.folder(name), ready.plans, fresh=False) as spaces:
                if outputs := agreed(ready, spaces):
                    make(ready, outputs)
        stages.made(name)


def _note_stages(stages: Stages, outputs: Sequence[HeldOutput]) -> None:
    """Keep in the journal of each output what its stages were: their folders are gone when it is finished."""
    for name in stages.recipe.stages:
        with Journal(stages.folder(name) / PRIVATE, read_only=True) as journal:
            identity, size = journal.kept(Identity), journal.kept(PlanSize)
            if identity and size:  # else a damaged journal, of which nothing can be said later
                made = MadeStage(name, identity.job, identity.inputs, digests_read(size.shards, journal))
                for output in outputs:
                    output.space.journal.keep(made, name)


# --- calibrate --------------------------------------------------------------------------------------------------------


def calibrated(
    ready: Prepared, outputs: Sequence[HeldOutput], measured: dict[str, Activations] | None = None
) -> Activations | None:
    """The base's activations, for AIM: given, kept by an interrupted run, from the cache, or measured now.

    Measured activations are kept beside each output until the output is finished, whatever becomes of the cache.
    `measured` has those that this run has measured for other outputs, and gets these. Raises ModelError,
    MemoryBudgetError, DiskError.
    """
    calibration, run = ready.calibration, ready.run
    relaxed = [output for output in outputs if output.plan.recipe.aim]
    if calibration is None or not relaxed:
        return None
    spaces = [output.space for output in relaxed]
    if isinstance(calibration, GivenActivations):
        activations = calibration.activations
    else:
        activations = _measured(calibration, run, spaces, {} if measured is None else measured)
        calibration.tell_unseen(activations, run.emit)
    for space in spaces:
        space.forget_calibration()
    check_measured(ready, activations)
    return activations


def check_measured(ready: Prepared, activations: Activations) -> None:
    """Check that activations fit the base, and tell of parts of names that exclude nothing. Raises ModelError."""
    calibration = ready.calibration
    assert calibration is not None
    idle = dict[str, None]()
    for aim in ready.aims:
        check_activations(activations, calibration.base, aim)
        idle |= dict.fromkeys(idle_exclusions(activations, calibration.base, aim))
    for part in idle:
        ready.run.emit(Notice(f"`aim.exclude`: `{printable(part)}` matches no weight that AIM relaxes", "warning"))


def _measured(
    measurement: Measurement, run: Run, spaces: Sequence[Workspace], known: dict[str, Activations]
) -> Activations:
    what = measurement.digest()
    lacking = [space for space in spaces if not activations_kept(space.private, space.journal)]
    kept = next((space for space in spaces if space not in lacking), None)
    if kept:
        run.emit(Notice("resuming: the activations are already measured"))
        activations = Activations.load(kept.private / ACTIVATIONS)
    elif what in known:
        activations = known[what]
    else:
        # What was measured in two environments must not reach the cache, from which other merges take.
        mixed = any(space.journal.kept(AcceptedEnvironments) for space in spaces)
        use_cache = run.options.use_cache and not mixed
        activations = measurement.activations(run, spaces[0].private, spaces[0].journal, use_cache=use_cache)
    known[what] = activations
    if lacking:
        weights = measurement.weights(activations)
        for space in lacking:
            file = space.private / ACTIVATIONS
            activations.save(file)
            with input_errors(file, DiskError):
                digest = digest_of_file(file)
            space.journal.keep(KeptActivations(digest, weights))
    return activations


# --- merge ------------------------------------------------------------------------------------------------------------


def merge_outputs(ready: Prepared, outputs: Sequence[Output], activations: Activations | None) -> list[Merged]:
    """Merge all tensors of every output into its sink. With ACM, first compare base and merged model.

    Raises ModelError, ResumeError, MemoryBudgetError, DiskError.
    """
    inputs, run = ready.inputs, ready.run
    progress = SummedProgress(run.emit)
    targets = []
    for number, output in enumerate(outputs):
        relaxation = _relaxation(ready, output, activations)
        targets.append(Target(output.plan, output.sink(progress.of(number)), relaxation, ReadLog(inputs)))
    shares, scratch = ready.shares(grown=True), outputs[0].scratch
    with matrix_space(run, shares, scratch) as matrices, _moments(ready, outputs, shares, matrices) as moments:
        return merge_tensors(targets, inputs, run, shares, Given(matrices, moments))


@contextlib.contextmanager
def _moments(
    ready: Prepared, outputs: Sequence[Output], shares: Shares, space: MatrixSpace
) -> Iterator[BlockMoments | None]:
    """The moments of the experts' texts, in the memory that the merge's shares leave; None if the method takes none."""
    if ready.experts is None:
        yield None
        return
    from lowmem_aim.solving.kept_states import KeptStates  # transformers: only where models are run

    own = outputs[0]
    kept = KeptStates(own.scratch, own.journal) if own.journal else None
    with moments_of(ready, own, shares, space, kept) as moments:
        yield moments
    if kept:
        kept.forget()


def _relaxation(ready: Prepared, output: Output, activations: Activations | None) -> Relaxation:
    """AIM and then ACM, as the recipe asks for them; ACM is measured here, on the merged model as AIM leaves it."""
    aim, relaxation = output.plan.recipe.aim, Relaxation()
    if ready.calibration and activations and aim:
        by_channel = ByChannel(aim, activations, ready.calibration.base)
        output.weaker = by_channel.weaker(output.plan.tasks)
        if output.weaker:
            what = f"{counted(len(output.weaker), 'weight')}, such as `{printable(output.weaker[0])}`"
            ready.run.emit(Notice(f"{aim.title}: it takes back less than AIM in {what}"))
        relaxation = relaxation.then(by_channel)
    if ready.comparison and output.plan.recipe.acm:
        output.consensus = consensus_of(ready, output, relaxation)
        relaxation = relaxation.then(ByLayer(output.consensus))
    return relaxation


# --- finish -----------------------------------------------------------------------------------------------------------


def finish(
    ready: Prepared, outputs: Sequence[HeldOutput], activations: Activations | None, merged: Sequence[Merged]
) -> None:
    """Make the small files of every output, and give all its files their names. Raises DiskError."""
    # Emitted before cards and pictures are made: making them takes a second, which belongs to no other phase.
    ready.emit(PhaseStarted("finish", sum(len(found.shards) for found in merged), "files"))
    for output, found in zip(outputs, merged, strict=True):
        files = _small_files(ready, output, activations if output.plan.recipe.aim else None, found)
        publish(output.space, found.shards, {shard.name: shard.nbytes for shard in output.plan.shards}, files)
    ready.emit(PhaseEnded("finish"))


def _small_files(
    ready: Prepared, output: HeldOutput, activations: Activations | None, found: Merged
) -> dict[str, bytes]:
    accepted = output.space.journal.kept(AcceptedEnvironments)
    environments = accepted.environments if accepted else None
    return output_files(
        output.plan,
        ready.inputs,
        activations,
        found,
        ready.copied,
        ready.config,
        environments,
        output.consensus,
        output.weaker,
        [_facts_of(stage) for stage in ready.position.behind],
    )


def _facts_of(stage: Behind) -> StageFacts:
    """The facts in a finished stage's lowmem_aim.json that its output repeats. Raises DiskError."""
    file = stage.folder / PROVENANCE
    with input_errors(file, DiskError):
        facts = json.loads(read_file(file, follow=False))
    keys = ("recipe", "inputs", "outputs", "calibration", "acm", "control", "kept")
    return StageFacts(stage.name, {key: facts[key] for key in keys if key in facts}, stage.local)
