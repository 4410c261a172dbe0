"""All that a merge finds out and checks before it works. `merge` and `plan` prepare here, with the same checks.

A check is a function in `CHECKS`: it is given what is prepared, and raises. All checks are made, whatever the others
raise, so that the user hears of all problems at once. What is found out on the way (models, plans, texts) is checked as
far as it is there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch

from lowmem_aim.errors import LowmemAimError, ModelError, noted, printable, raise_all
from lowmem_aim.events import Emit
from lowmem_aim.jobs.resume import activations_kept, check_same, check_same_job, identity_of_merge
from lowmem_aim.measuring.calibration import Calibration, GivenActivations, Measurement, calibration_of
from lowmem_aim.merging import shares
from lowmem_aim.models.hub import Located, locate
from lowmem_aim.models.inputs import Inputs
from lowmem_aim.models.opening import open_inputs
from lowmem_aim.output.folder import (
    PRIVATE,
    check_disk,
    check_outputs,
    check_writable,
    existing_folder,
    is_finished,
    staged_bytes,
)
from lowmem_aim.output.journal import Journal
from lowmem_aim.output.records import AcceptedEnvironments, Identity, KeptActivations, KeptComparison, Record
from lowmem_aim.output.small_files import copied_files
from lowmem_aim.planning.layout import make_plan
from lowmem_aim.planning.tasks import Plan
from lowmem_aim.recipe.recipe import Aim, Recipe, one_by_one
from lowmem_aim.recipe.words import BUILTIN, is_here
from lowmem_aim.relaxing.relaxation import check_activations
from lowmem_aim.system.lock import PATIENCE_SECONDS, is_held, locked_error, owner_of
from lowmem_aim.system.run import Run
from lowmem_aim.system.tensors import dtype_name, dtype_named

if TYPE_CHECKING:
    from lowmem_aim.blocks.shares import Needs
    from lowmem_aim.measuring.comparison import Comparison
    from lowmem_aim.models.meta_model import MetaModel


R = TypeVar("R", bound=Record)


@dataclass(frozen=True)
class Sources:
    """The sources of models and texts."""

    find: Callable[[str, Emit], Located] = locate  # a model reference -> its folder
    has_weights: Callable[[Path], bool] = lambda folder: True  # False: a folder holds headers and small files only
    fetches: bool = True  # models and texts that are on the Hub are downloaded


FETCHED = Sources()


@dataclass(frozen=True)
class ModelRun:
    """A phase in which a model is run: the base for AIM, base and merged model for ACM."""

    phase: str
    needs: Needs
    tokens: int  # of all sequences
    length: int  # of a sequence, on the mean
    dtype: torch.dtype
    models: int = 1

    @property
    def speed(self) -> str:
        """The forward's name among the speeds, which depend on the length of sequences and on the dtype."""
        return f"forward of {self.length} tokens in {dtype_name(self.dtype)}"


@dataclass
class Prepared:
    """A merge that could begin, unless there are `errors`. Nothing has been written."""

    recipe: Recipe
    out: Path
    run: Run
    sources: Sources
    inputs: Inputs
    plans: Mapping[str, Plan]  # by the output's folder in `out`; "" where the output is `out` itself
    errors: list[LowmemAimError]
    copied: Mapping[str, bytes] = field(default_factory=dict)  # small files that the output takes from the reference
    calibration: Calibration | None = None
    comparison: Comparison | None = None
    model_runs: list[ModelRun] = field(default_factory=list)  # the model runs that are still to be made
    notes: list[str] = field(default_factory=list)  # what `plan` reports beside the figures
    unread: bool = False  # some texts are on the Hub, and were not fetched
    incomplete: bool = False  # something that tells this job from others could not be had

    def folder(self, name: str) -> Path:
        """The folder of one output."""
        return self.out / name

    def identity(self, name: str) -> Identity:
        """The identity of one output's merge, for its journal."""
        plan = self.plans[name]
        return identity_of_merge(plan, self.inputs, self.copied, self.calibration, self.comparison, self.run.device)

    def unfinished(self) -> list[str]:
        """The names of the outputs that are still to be made."""
        return [name for name in self.plans if not is_finished(self.folder(name))]

    def needs(self) -> shares.Needs:
        """The memory that the merge itself takes."""
        return shares.Needs.of([*self.plans.values()], self.inputs, self.run.device)

    def shares(self) -> shares.Shares:
        """Divide what is left of the budget now, for the merge itself. Raises MemoryBudgetError."""
        return shares.share_out(self.run.budget, self.run.device, self.needs())

    def bytes_to_write(self) -> int:
        """Bytes of the outputs that earlier runs have not yet taken of the disk."""
        return sum(self.plans[name].output_bytes - staged_bytes(self.folder(name)) for name in self.unfinished())

    def bytes_to_spill(self) -> int:
        """Bytes of hidden states that may go to the disk at worst: all of them, and two snapshots."""
        return max((3 * model_run.needs.states for model_run in self.model_runs), default=0)

    def check_writable(self) -> None:
        """Raise DiskError if an output that is still to be made cannot be written."""
        for name in self.unfinished():
            check_writable(existing_folder(self.folder(name)))
            check_writable(existing_folder(self.folder(name) / PRIVATE))

    def refuse(self) -> None:
        """Raise all errors as one, with the exit code of the first; do nothing if there are none."""
        raise_all(self.errors)


@contextlib.contextmanager
def prepared(recipe: Recipe, out: Path, run: Run, sources: Sources = FETCHED) -> Iterator[Prepared]:
    """Open, plan and check everything; the errors of single checks are kept in the result.

    Raises the errors of models that cannot be opened or planned, together with all that can be checked without them.
    """
    recipes = one_by_one(recipe)
    folders = [out / name for name in recipes]
    errors: list[LowmemAimError] = []
    with noted(errors):
        check_outputs(out, folders, [])
        if not all(map(is_finished, folders)):
            check_writable(existing_folder(out))
    if errors and sources.fetches:
        raise_all(errors)  # nothing is downloaded for an output that cannot be made
    options = run.options
    with contextlib.ExitStack() as stack:
        try:
            inputs = stack.enter_context(
                open_inputs(
                    recipe,
                    options.read,
                    run.emit,
                    options.use_cache,
                    find=sources.find,
                    has_weights=sources.has_weights,
                )
            )
            plans = {
                name: make_plan(
                    one, inputs, seed=options.seed, shard_bytes=options.shard_bytes, nonfinite=options.nonfinite
                )
                for name, one in recipes.items()
            }
        except LowmemAimError as error:
            raise_all([*errors, error, *_missing_texts(recipe)])
            raise
        ready = Prepared(recipe, out, run, sources, inputs, plans, errors)
        for check in CHECKS:
            known = len(errors)
            with noted(errors):
                check(ready)
            ready.incomplete |= len(errors) > known and check in OF_THE_IDENTITY
        yield ready


def _missing_texts(recipe: Recipe) -> Iterator[ModelError]:
    """Yield an error for every file of texts or activations that is not there."""
    tables = [table for table in (recipe.aim, recipe.acm) if table is not None]
    for name in dict.fromkeys(table.calibration for table in tables):
        if name and name != BUILTIN and is_here(name) and not Path(name).expanduser().is_file():
            yield ModelError(f"there is no calibration file `{printable(name)}`")


# --- the checks -------------------------------------------------------------------------------------------------------


def check_place(ready: Prepared) -> None:
    """Check that the output folders are free, lie in no input, and can be written. Raises UsageError, DiskError."""
    check_outputs(ready.out, [ready.folder(name) for name in ready.plans], ready.inputs.folders)
    ready.check_writable()


def check_small_files(ready: Prepared) -> None:
    """Read the small files that the output takes from the reference (tokenizer and the like). Raises ModelError."""
    ready.copied = copied_files(ready.inputs.reference, ready.run.emit)


def check_calibration(ready: Prepared) -> None:
    """Check that AIM's activations fit the base, or that there are texts to measure them with.

    Raises ModelError, NetworkError, UsageError.
    """
    aim, base = ready.recipe.aim, ready.inputs.base
    if aim is None or base is None:
        return
    if not _are_texts_here(ready, "calibrate", aim):
        return
    calibration = ready.calibration = calibration_of(aim, base, ready.run.emit)
    if isinstance(calibration, GivenActivations):
        check_activations(calibration.activations, base, aim)
        return
    _note_unreached(ready, calibration.meta_model)
    if not _is_measured(ready, calibration):
        ready.model_runs.append(_model_run(ready, "calibrate", calibration.meta_model, calibration.sequences))


def _note_unreached(ready: Prepared, meta_model: MetaModel) -> None:
    """Note the weights that no text reaches, so that AIM will leave them; `merge` tells of all that it has not seen."""
    from lowmem_aim.measuring.by_weight import left_as_merged, outside_decoder

    if names := outside_decoder(meta_model):
        ready.notes.append(left_as_merged(names, "they are outside the part of the model that reads text"))


def check_comparison(ready: Prepared) -> None:
    """Check that there are texts for ACM to compare base and merged model with.

    Raises ModelError, NetworkError, UsageError.
    """
    acm, base = ready.recipe.acm, ready.inputs.base
    if acm is None or base is None:
        return
    from lowmem_aim.measuring.comparison import Comparison, is_of, texts_of  # transformers: only where models are run

    if not _are_texts_here(ready, "compare", texts_of(acm)):
        return
    comparison = ready.comparison = Comparison.of(acm, base, ready.run)
    kept = [_kept(ready, name, KeptComparison) for name in ready.unfinished()]
    if not all(found is not None and is_of(found, ready.inputs) for found in kept):
        measurement = comparison.measurement
        ready.model_runs.append(_model_run(ready, "compare", measurement.meta_model, measurement.sequences))


def check_merge_memory(ready: Prepared) -> None:
    """Check, before hours of calibration, that single rows of the widest tensor fit the budget.

    Raises MemoryBudgetError.
    """
    ready.shares()


def check_model_runs(ready: Prepared) -> None:
    """Check that one module of a block at a time, and one sequence's work, fit the budget, and hidden states the disk.

    Raises MemoryBudgetError, DiskError.
    """
    unfinished = ready.unfinished()
    if ready.model_runs and unfinished:
        from lowmem_aim.measuring.mean_activations import shares_for  # transformers: only where models are run

        for model_run in ready.model_runs:
            shares_for(model_run.needs, ready.run.budget, ready.run.device, ready.folder(unfinished[0]) / PRIVATE)


def check_begun(ready: Prepared) -> None:
    """Check that what lies in the output folders is of this very job, and that no other run is at work there.

    Raises LockedError, ResumeError, UsageError, DiskError.
    """
    for name in ready.plans:
        folder = ready.folder(name)
        private, finished = folder / PRIVATE, is_finished(folder)
        if is_held(private / "lock", PATIENCE_SECONDS):  # others hold it for a moment when they ask
            raise locked_error(private / "lock", owner_of(private / "lock"))
        if not private.is_dir() or (ready.run.options.fresh and not finished):
            continue
        state = "is finished already" if finished else "holds an interrupted run, which goes on"
        ready.notes.append(f"`{printable(str(folder))}` {state}")
        with Journal(private, read_only=True) as journal:
            journal.check_version()
            _check_same(ready, name, journal, finished)


def _check_same(ready: Prepared, name: str, journal: Journal, finished: bool) -> None:
    folder = ready.folder(name)
    if ready.incomplete:
        return  # what is missing would be reported as a difference
    if ready.unread:
        ready.notes.append(f"whether `{printable(str(folder))}` is of the same job shows once the texts are fetched")
    elif finished:
        check_same(journal, ready.identity(name), folder)
    else:
        accept = ready.run.options.accept_environment
        lost = () if activations_kept(folder / PRIVATE, journal) else (KeptActivations,)
        check_same_job(journal, ready.identity(name), accept_environment=accept, lost=lost)


def check_disk_space(ready: Prepared) -> None:
    """Check that the disk has space for the outputs. Raises DiskError."""
    if ready.unfinished():
        check_disk(ready.out, ready.bytes_to_write())


Check = Callable[[Prepared], None]

# Checks that find out what tells this job from others: without that, an interrupted run cannot be compared.
OF_THE_IDENTITY: tuple[Check, ...] = (check_small_files, check_calibration, check_comparison)

# In the order in which their problems are listed; the first problem sets the exit code.
CHECKS: list[Check] = [
    check_place,
    check_small_files,
    check_calibration,
    check_comparison,
    check_merge_memory,
    check_begun,
    check_disk_space,
    check_model_runs,
]


# --- what is to be run ------------------------------------------------------------------------------------------------


def _are_texts_here(ready: Prepared, phase: str, aim: Aim) -> bool:
    """Whether texts can be read; if they are on the Hub and not to be fetched, reckon with full sequences instead."""
    base = ready.inputs.base
    if ready.sources.fetches or is_here(aim.calibration) or base is None:
        return True
    from lowmem_aim.models.meta_model import load_meta_model  # transformers: only where a model is to be run

    ready.unread = True
    ready.notes.append(f"{phase}: the texts are on the Hub, and were not fetched: reckoned with full blocks")
    meta_model = load_meta_model(base, dtype_named(aim.dtype) if aim.dtype else None)
    if phase == "calibrate":
        _note_unreached(ready, meta_model)
    ready.model_runs.append(_model_run(ready, phase, meta_model, [range(aim.block_size)] * aim.samples))
    return False


def _is_measured(ready: Prepared, measurement: Measurement) -> bool:
    """Whether the activations of the base are at hand, from the cache or from an interrupted run."""
    unfinished = ready.unfinished()
    if not unfinished or any(_has_activations(ready, name) for name in unfinished):
        return True
    mixed = any(_kept(ready, name, AcceptedEnvironments) for name in unfinished)  # then the cache is not used
    if ready.run.options.use_cache and not mixed and measurement.cached(ready.run.device).is_file():
        ready.notes.append("the activations were measured before, and are reused")
        return True
    return False


def _kept(ready: Prepared, name: str, kind: type[R]) -> R | None:
    """The record of this kind that an interrupted run of this output has left to resume from."""
    private = ready.folder(name) / PRIVATE
    if ready.run.options.fresh or not private.is_dir():
        return None
    with Journal(private, read_only=True) as journal:
        return journal.kept(kind)


def _has_activations(ready: Prepared, name: str) -> bool:
    private = ready.folder(name) / PRIVATE
    if ready.run.options.fresh or not private.is_dir():
        return False
    with Journal(private, read_only=True) as journal:
        return activations_kept(private, journal)


def _model_run(ready: Prepared, phase: str, meta_model: MetaModel, sequences: Sequence[Sized]) -> ModelRun:
    from lowmem_aim.measuring.comparison import needs_of_comparison  # transformers: only where models are run
    from lowmem_aim.measuring.mean_activations import needs_of

    compared = phase == "compare"
    if compared:
        needs = needs_of_comparison(meta_model, sequences, next(iter(ready.plans.values())), ready.inputs)
    else:
        needs = needs_of(meta_model, sequences)
    tokens = sum(map(len, sequences))
    return ModelRun(phase, needs, tokens, -(-tokens // len(sequences)), meta_model.dtype, 2 if compared else 1)
