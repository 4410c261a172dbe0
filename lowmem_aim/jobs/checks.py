"""The checks before work: `merge` and `plan` make them all, whatever the others raise.

A check is a function in `AT_ONCE` or `LATER`: it is given what is prepared, and raises. What is found out on the way
(models, plans, texts) is checked as far as it is there.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence, Sized
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar, get_args

from lowmem_aim.errors import LowmemAimError, MemoryBudgetError, ResumeError, noted, printable, raise_all, whose
from lowmem_aim.events import Notice, Phase
from lowmem_aim.jobs.finished import check_same, of_stage
from lowmem_aim.jobs.identity import with_unknown_of
from lowmem_aim.jobs.oddities import tell_oddities
from lowmem_aim.jobs.on_texts import making_to_compare
from lowmem_aim.jobs.prepared import ModelRun, Prepared
from lowmem_aim.jobs.resume import RESUME_HINT, activations_kept, check_same_job
from lowmem_aim.measuring.calibration import GivenActivations, Measurement, calibration_of
from lowmem_aim.measuring.texts import TextSettings
from lowmem_aim.merging.shares import GROWTH_BYTES
from lowmem_aim.methods import kernels
from lowmem_aim.output.copied import copied_files
from lowmem_aim.output.folder import PRIVATE, STAGES, check_disk, check_outputs, check_private, is_finished, stages_in
from lowmem_aim.output.journal import Journal
from lowmem_aim.output.layer_settings import restacked
from lowmem_aim.output.records import AcceptedEnvironments, Identity, KeptActivations, KeptComparison, Record
from lowmem_aim.output.tokenizer_files import with_tokenizer
from lowmem_aim.planning.modules import portions
from lowmem_aim.planning.sources import patterns
from lowmem_aim.recipe.words import PILE, is_here
from lowmem_aim.relaxing.relaxation import check_activations
from lowmem_aim.system.lock import PATIENCE_SECONDS, is_held, locked_error, owner_of
from lowmem_aim.system.memory import anonymous_bytes
from lowmem_aim.system.options import Options
from lowmem_aim.system.tensors import dtype_named
from lowmem_aim.units import shown

if TYPE_CHECKING:
    from lowmem_aim.blocks.shares import Needs
    from lowmem_aim.models.meta_model import MetaModel

R = TypeVar("R", bound=Record)

TORCH_BYTES = 50 << 20  # what importing torch takes at least; on Linux, torch 2 takes more than twice as much


def check_place(ready: Prepared) -> None:
    """Check that the output folders are free, lie in no input, and can be written. Raises UsageError, DiskError."""
    check_outputs(ready.out, [ready.folder(name) for name in ready.plans], ready.inputs.folders)
    ready.check_writable()


def check_small_files(ready: Prepared) -> None:
    """Read the files that the output takes from the models (tokenizer and the like). Raises ModelError."""
    copied = copied_files(ready.inputs.reference, ready.emit)
    ready.copied = with_tokenizer(copied, ready.recipe, ready.inputs, ready.emit)
    if ready.inputs.tokenizer:  # what is taken of it now takes megabytes
        ready.inputs.tokenizer = replace(ready.inputs.tokenizer, table="", added=())


def check_layers(ready: Prepared) -> None:
    """Make the config of the output; if its layers are chosen, check that they make a model. Raises ModelError."""
    recipe, inputs = ready.recipe, ready.inputs
    ready.config = inputs.reference.config
    for portion in portions(recipe, inputs) if recipe.sliced else ():
        if portion.sliced and portion.section.layers:
            layers = patterns(portion, recipe, inputs)
            ready.config = restacked(ready.config, inputs.reference, portion.section, layers, ready.reader.settings)
    if recipe.sliced:
        ready.reader.roles(ready.outline())


def check_calibration(ready: Prepared) -> None:
    """Check that AIM's activations fit the base, or that there are texts to measure them with.

    Raises ModelError, NetworkError, UsageError.
    """
    aims, base = ready.aims, ready.inputs.base
    if not aims or base is None:
        return
    if not _are_texts_here(ready, "calibrate", TextSettings.of(aims[0])):
        return
    calibration = ready.calibration = calibration_of(aims[0], base, ready.reader, ready.emit)
    if isinstance(calibration, GivenActivations):
        for aim in aims:
            check_activations(calibration.activations, base, aim)
        return
    _note_unreached(ready, calibration.meta_model)
    if not _is_measured(ready, calibration):
        _add(ready, _model_run(ready, "calibrate", calibration.meta_model, calibration.sequences))


def _note_unreached(ready: Prepared, meta_model: MetaModel) -> None:
    """Note the weights that no text reaches, so that AIM will leave them; `merge` tells of all that it has not seen."""
    from lowmem_aim.measuring.by_weight import left_as_merged, outside_decoder

    if names := outside_decoder(meta_model):
        ready.notes.append(left_as_merged(names, "they are outside the part of the model that reads text"))


def check_comparison(ready: Prepared) -> None:
    """Check that there are texts for ACM to compare base and merged model with.

    Raises ModelError, NetworkError, UsageError.
    """
    acm, base = ready.acm, ready.inputs.base
    if acm is None or base is None:
        return
    from lowmem_aim.measuring.comparison import Comparison, is_of, texts_of  # transformers: only where models are run

    if not _are_texts_here(ready, "compare", texts_of(acm)):
        return
    comparison = ready.comparison = Comparison.of(acm, base, ready.reader, ready.run)
    left = []
    for name in (name for name in ready.unfinished() if ready.recipes[name].acm):
        kept = _kept(ready, name, KeptComparison)
        if kept is None or not is_of(kept, ready.inputs):
            left.append(name)
    if left:  # each is compared by itself
        measurement = comparison.measurement
        run = _model_run(ready, "compare", measurement.meta_model, measurement.sequences)
        # What is run before it leaves code and caches behind.
        if len(left) > 1 or any(before.phase == "calibrate" for before in ready.model_runs):
            run = replace(run, needs=replace(run.needs, in_ram=run.needs.in_ram + GROWTH_BYTES))
        _add(ready, replace(run, models=2 * len(left), read=2 * len(left)))
        solved = [name for name in left if ready.recipes[name].texts]
        if ready.experts and solved:
            _add(ready, _experts_run(ready, "compare", run.needs, times=len(solved)))


def check_experts(ready: Prepared) -> None:
    """Check that there are texts to run the experts on. Raises ModelError, NetworkError, UsageError."""
    solve = ready.recipe.solve
    if solve is None:
        return
    from lowmem_aim.solving.experts import Experts  # transformers: only where models are run
    from lowmem_aim.solving.texts import read_texts

    entries = ready.recipe.slices[0].experts
    settings = TextSettings(**vars(solve))
    shared = [replace(settings, calibration=entry.calibration or solve.calibration) for entry in entries]
    if not all(_are_texts_here(ready, "merge", texts) for texts in shared):
        return
    models = [ready.inputs.opened[entry.reference] for entry in entries]
    measurements = read_texts(settings, [entry.calibration for entry in entries], models, ready.reader, ready.emit)
    outline = ready.outline() if ready.recipe.method.texts == "merged" else None
    ready.experts = Experts(measurements, outline)
    ready.experts.check_alike(ready.inputs)
    _add(ready, _experts_run(ready, "merge", ready.experts.needs()))


def check_device(ready: Prepared) -> None:
    """Check that the device is there; tell if compiled loops are not used, or not kept. Raises UsageError."""
    if ready.run.device.type != "cpu":
        return
    if why := kernels.unavailable():
        ready.emit(Notice(f"compiled loops are not used ({why}): torch does the same, several times slower"))
    elif trouble := kernels.cache_trouble():
        what = "compiled loops cannot be saved, so every run compiles them again"
        ready.emit(Notice(f"{what}: {trouble}", "warning"))


def check_certain_memory(options: Options) -> None:
    """Beside other problems, tell of a budget that is too small for any merge. Raises MemoryBudgetError.

    `check_merge_memory` has the figure that would do, which `plan` shows and the merge accepts. Most of it is what the
    program takes once torch and the compiled loops have run, which differs between versions and processors: it is
    measured, in the second round, and no figure that is known before could be that one.
    """
    least = anonymous_bytes() + TORCH_BYTES + GROWTH_BYTES
    if options.ram is not None and options.ram < least:
        raise MemoryBudgetError(
            f"any merge needs more than {shown(least)} of RAM, but the budget is {shown(options.ram)}",
            "allow more with `--ram`; once nothing else is wrong, `plan` says how much this merge needs",
        )


def check_merge_memory(ready: Prepared) -> None:
    """Check, before hours of calibration, that what the method holds, and slices worth while, fit the budget.

    Raises MemoryBudgetError, DiskError if what lies in files meanwhile has no space on the disk.
    """
    if ready.unfinished():
        ready.shares()
        if scratch := ready.scratch_bytes() + ready.taken_bytes():
            what = "the output, and what lies in files meanwhile,"
            check_disk(ready.out, ready.position.unmade_bytes + ready.bytes_to_write() + scratch, what)


def check_model_runs(ready: Prepared) -> None:
    """Check that one module of a block at a time, and one sequence's work, fit the budget, and hidden states the disk.

    Raises MemoryBudgetError, DiskError.
    """
    unfinished = ready.unfinished()
    if ready.model_runs and unfinished:
        from lowmem_aim.measuring.mean_activations import shares_for  # transformers: only where models are run

        errors: list[LowmemAimError] = []
        for model_run in ready.model_runs:  # each, since a later one may need more than the first that does not fit
            with noted(errors):
                shares_for(model_run.needs, ready.run.budget, ready.run.device, ready.folder(unfinished[0]) / PRIVATE)
        raise_all(errors)


def check_at_work(ready: Prepared) -> None:
    """Check that no other run is at work in the output folders. Raises LockedError, DiskError."""
    for name in ready.plans if not ready.position.held else ():
        folder = ready.folder(name)
        lock = folder / PRIVATE / "lock"
        check_private(folder)
        if is_held(lock, PATIENCE_SECONDS):  # others hold it for a moment when they ask
            raise locked_error(lock, owner_of(lock))


def check_begun(ready: Prepared) -> None:
    """Check that what lies in the output folders is of this very job, as far as that is known without torch.

    Raises ResumeError, UsageError, VerifyError, DiskError.
    """
    errors: list[LowmemAimError] = []
    for name, journal, finished in _begun(ready):
        folder = ready.folder(name)
        resumed = "holds an interrupted run, which is resumed: bytes and times are of the whole merge"
        state = "is finished already" if finished else resumed
        ready.notes.append(f"`{printable(str(folder))}` {state}")
        with noted(errors), _told_whose(ready, name):
            journal.check_version(finished=finished)
            if not ready.incomplete:  # what is missing would be reported as a difference
                before, known = journal.kept(Identity), ready.known(name)
                _check_same(ready, name, journal, finished, with_unknown_of(before, known) if before else known)
    raise_all(errors)


def check_begun_with(ready: Prepared) -> None:
    """Check the same of texts, activations and the environment. Raises ResumeError, UsageError, DiskError."""
    if ready.incomplete:
        return
    errors: list[LowmemAimError] = []
    for name, journal, finished in _begun(ready):
        if ready.unread:
            what = f"whether `{printable(str(ready.folder(name)))}` is of the same job"
            ready.notes.append(f"{what} is not known until the texts are fetched")
        else:
            with noted(errors), _told_whose(ready, name):
                _check_same(ready, name, journal, finished, ready.identity(name))
    raise_all(errors)


@contextlib.contextmanager
def _told_whose(ready: Prepared, name: str) -> Iterator[None]:
    """Say of errors which of several recipes they are of."""
    try:
        yield
    except LowmemAimError as error:
        if len(ready.plans) > 1:
            error.add_before_problems(whose([name]))
        raise


def _begun(ready: Prepared) -> Iterator[tuple[str, Journal, bool]]:
    """Yield the name, the journal, and whether it is finished, of each output that an earlier run has begun."""
    for name in ready.plans:
        folder = ready.folder(name)
        private, finished = folder / PRIVATE, is_finished(folder)
        # A stage is discarded with the rest of an interrupted run, finished or not.
        discarded = ready.options.fresh and (not finished or ready.position.stage)
        if os.path.isdir(private) and not discarded and os.listdir(private) != [STAGES]:
            with Journal(private, read_only=True) as journal:
                yield name, journal, finished


def _check_same(ready: Prepared, name: str, journal: Journal, finished: bool, now: Identity) -> None:
    folder = ready.folder(name)
    if not finished:
        accept = ready.options.accept_environment
        lost = () if activations_kept(folder / PRIVATE, journal) else (KeptActivations,)
        check_same_job(journal, now, accept_environment=accept, lost=lost)
        return
    with of_stage(ready.position.stage):
        moved = check_same(journal, now, folder)
    for number in moved:
        label = printable(str(now.inputs[number]["label"]))
        note = f"`{label}` has new or moved files: a merge reads them again, and refuses them if they differ"
        if note not in ready.notes:
            ready.notes.append(note)


def check_disk_space(ready: Prepared) -> None:
    """Check that the disk has space for the outputs, beside all that comes before them. Raises DiskError."""
    stages = ready.position.unmade_bytes
    if ready.unfinished():
        what = "the output, with the stages that it is made of," if stages else "the output"
        check_disk(ready.out, stages + ready.bytes_to_write(), what)


def check_stages(ready: Prepared) -> None:
    """Check that the stages that an interrupted run has left are the recipe's. Raises ResumeError, DiskError."""
    if ready.position.stage or ready.options.fresh or not ready.unfinished():
        return
    strange = [folder.name for folder in stages_in(ready.out) if folder.name not in ready.recipe.stages]
    if strange:
        problems = [f"stage `{printable(name)}`: the recipe no longer has it" for name in strange]
        raise ResumeError(["the interrupted run in this folder was a different one:", *problems], RESUME_HINT)


Check = Callable[[Prepared], None]

# Checks that find out what tells this job from others: without that, an interrupted run cannot be compared.
OF_THE_IDENTITY: tuple[Check, ...] = (check_small_files, check_calibration, check_comparison, check_experts)

# Checks of the folder that a merge writes to.
OF_THE_FOLDER: tuple[Check, ...] = (check_place, check_at_work, check_disk_space, check_begun, check_begun_with)

# In the order in which their problems are listed; the first problem sets the exit code. These need no torch:
AT_ONCE: tuple[Check, ...] = (
    check_place,
    check_at_work,
    check_small_files,
    check_layers,
    tell_oddities,
    check_stages,
    check_begun,
    check_disk_space,
)
# These do, or run what reads tokenizers and texts; they are made if nothing else is wrong.
LATER: tuple[Check, ...] = (
    check_device,
    check_calibration,
    check_experts,
    check_comparison,
    check_merge_memory,
    check_begun_with,
    check_model_runs,
)


# --- what is to be run ------------------------------------------------------------------------------------------------


def _are_texts_here(ready: Prepared, phase: str, texts: TextSettings) -> bool:
    """Whether texts can be read; if they are on the Hub and not to be fetched, reckon with full sequences instead."""
    base = ready.inputs.base
    if ready.finder.fetches or is_here(texts.calibration or PILE) or base is None:
        return True
    from lowmem_aim.models.meta_model import load_meta_model  # transformers: only where a model is to be run

    ready.reader.roles(base)  # under limits, as before every building of a model in this process
    ready.unread = True
    ready.notes.append(f"{phase}: the texts are on the Hub, and were not fetched: full blocks are assumed")
    meta_model = load_meta_model(base, dtype_named(texts.dtype) if texts.dtype else None)
    if phase == "calibrate":
        _note_unreached(ready, meta_model)
    _add(ready, _model_run(ready, phase, meta_model, [range(texts.block_size)] * texts.samples))
    return False


def _is_measured(ready: Prepared, measurement: Measurement) -> bool:
    """Whether the activations of the base are at hand, from the cache or from an interrupted run."""
    unfinished = [name for name in ready.unfinished() if ready.recipes[name].aim]
    if not unfinished or any(_has_activations(ready, name) for name in unfinished):
        return True
    mixed = any(_kept(ready, name, AcceptedEnvironments) for name in unfinished)  # then the cache is not used
    if ready.options.use_cache and not mixed and os.path.isfile(measurement.cached(ready.run.device)):
        ready.notes.append("the activations were measured before, and are reused")
        return True
    return False


def _kept(ready: Prepared, name: str, kind: type[R]) -> R | None:
    """The record of this kind that an interrupted run of this output has left to resume from."""
    private = ready.folder(name) / PRIVATE
    if ready.options.fresh or not os.path.isdir(private):
        return None
    with Journal(private, read_only=True) as journal:
        return journal.kept(kind)


def _has_activations(ready: Prepared, name: str) -> bool:
    private = ready.folder(name) / PRIVATE
    if ready.options.fresh or not os.path.isdir(private):
        return False
    with Journal(private, read_only=True) as journal:
        return activations_kept(private, journal)


def _add(ready: Prepared, model_run: ModelRun) -> None:
    """Add a run of models to those that are to be made, which stand in the order of the phases."""
    order = get_args(Phase)
    ready.model_runs = sorted([*ready.model_runs, model_run], key=lambda run: order.index(run.phase))


def _model_run(ready: Prepared, phase: str, meta_model: MetaModel, sequences: Sequence[Sized]) -> ModelRun:
    from lowmem_aim.measuring.comparison import needs_of_comparison  # transformers: only where models are run
    from lowmem_aim.measuring.mean_activations import needs_of

    compared = phase == "compare"
    if compared:
        plans, on_host = [plan for plan in ready.plans.values() if plan.recipe.acm], ready.run.budget.vram is None
        each = [needs_of_comparison(meta_model, sequences, plan, making_to_compare(ready, plan)) for plan in plans]
        needs = max(each, key=lambda needs: needs.least_ram(on_host))
    else:
        needs = needs_of(meta_model, sequences)
    tokens = sum(map(len, sequences))
    models = 2 if compared else 1
    return ModelRun(phase, needs, tokens, -(-tokens // len(sequences)), meta_model.dtype, models, models)


def _experts_run(ready: Prepared, phase: Phase, needs: Needs, times: int = 1) -> ModelRun:
    """The run of all experts on their texts, so many times; RegMean++ runs the merged model on all of them, too."""
    assert ready.experts is not None
    sequences, models = ready.experts.sequences, times if ready.experts.outline is None else 2 * times
    tokens, read = sum(map(len, sequences)), times * len(ready.recipe.slices[0].experts)
    return ModelRun(phase, needs, tokens, -(-tokens // len(sequences)), ready.experts.dtype, models, read)
