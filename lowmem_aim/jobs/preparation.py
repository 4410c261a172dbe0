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
from typing import TYPE_CHECKING

import torch

from lowmem_aim.errors import LowmemAimError, ModelError, joined, noted, printable, raise_all
from lowmem_aim.events import Emit
from lowmem_aim.jobs.resume import check_same, check_same_job, identity_of_merge
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
from lowmem_aim.output.records import Identity, KeptActivations, KeptComparison, Record
from lowmem_aim.output.small_files import copied_files
from lowmem_aim.planning.layout import make_plan
from lowmem_aim.planning.tasks import Plan
from lowmem_aim.recipe.recipe import Aim, Recipe, one_by_one
from lowmem_aim.recipe.words import BUILTIN, is_here
from lowmem_aim.relaxing.relaxation import check_activations
from lowmem_aim.system.lock import is_held, locked_error, owner_of
from lowmem_aim.system.run import Run
from lowmem_aim.system.tensors import dtype_name, dtype_named

if TYPE_CHECKING:
    from lowmem_aim.blocks.shares import Needs
    from lowmem_aim.measuring.comparison import Comparison
    from lowmem_aim.models.meta_model import MetaModel


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
            raise joined([*errors, error, *_missing_texts(recipe)]) from error
        ready = Prepared(recipe, out, run, sources, inputs, plans, errors)
        for check in CHECKS:
            with noted(errors):
                check(ready)
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
    check_writable(existing_folder(ready.out))


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
    elif not _is_measured(ready, calibration):
        ready.model_runs.append(_model_run("calibrate", calibration.meta_model, calibration.sequences))


def check_comparison(ready: Prepared) -> None:
    """Check that there are texts for ACM to compare base and merged model with.

    Raises ModelError, NetworkError, UsageError.
    """
    acm, base = ready.recipe.acm, ready.inputs.base
    if acm is None or base is None:
        return
    from lowmem_aim.measuring.comparison import Comparison, texts_of  # transformers: only where models are run

    if not _are_texts_here(ready, "compare", texts_of(acm)):
        return
    comparison = ready.comparison = Comparison.of(acm, base, ready.run)
    if not all(_holds(ready, name, KeptComparison) for name in ready.unfinished()):
        measurement = comparison.measurement
        ready.model_runs.append(_model_run("compare", measurement.meta_model, measurement.sequences))


def check_merge_memory(ready: Prepared) -> None:
    """Check, before hours of calibration, that single rows of the widest tensor fit the budget.

    Raises MemoryBudgetError.
    """
    ready.shares()


def check_model_run_memory(ready: Prepared) -> None:
    """Check that one module of a block at a time, and one sequence's work, fit the budget. Raises MemoryBudgetError."""
    if ready.model_runs:
        from lowmem_aim.blocks.shares import share_out  # transformers: only where models are run

        for model_run in ready.model_runs:
            share_out(ready.run.budget, ready.run.device, model_run.needs)


def check_begun(ready: Prepared) -> None:
    """Check that what lies in the output folders is of this very job, and that no other run is at work there.

    Raises LockedError, ResumeError, UsageError, DiskError.
    """
    for name in ready.plans:
        folder = ready.folder(name)
        private, finished = folder / PRIVATE, is_finished(folder)
        if is_held(private / "lock"):
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
    if ready.unread:
        ready.notes.append(f"whether `{printable(str(folder))}` is of the same job shows once the texts are fetched")
    elif finished:
        check_same(journal, ready.identity(name), folder)
    else:
        accept = ready.run.options.accept_environment
        check_same_job(journal, ready.identity(name), accept_environment=accept)


def check_disk_space(ready: Prepared) -> None:
    """Check that the disk has space for the outputs, and before them for hidden states. Raises DiskError."""
    if ready.unfinished():
        check_disk(ready.out, max(ready.bytes_to_write(), ready.bytes_to_spill()))


Check = Callable[[Prepared], None]

# In the order in which their problems are listed; the first problem sets the exit code.
CHECKS: list[Check] = [
    check_place,
    check_small_files,
    check_calibration,
    check_comparison,
    check_merge_memory,
    check_begun,
    check_disk_space,
    check_model_run_memory,
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
    ready.model_runs.append(_model_run(phase, meta_model, [range(aim.block_size)] * aim.samples))
    return False


def _is_measured(ready: Prepared, measurement: Measurement) -> bool:
    """Whether the activations of the base are at hand, from the cache or from an interrupted run."""
    unfinished = ready.unfinished()
    if not unfinished or any(_holds(ready, name, KeptActivations) for name in unfinished):
        return True
    if ready.run.options.use_cache and measurement.cached(ready.run.device).is_file():
        ready.notes.append("the activations were measured before, and are reused")
        return True
    return False


def _holds(ready: Prepared, name: str, kind: type[Record]) -> bool:
    """Whether an interrupted run of this output has left a record of this kind to resume from."""
    private = ready.folder(name) / PRIVATE
    if ready.run.options.fresh or not private.is_dir():
        return False
    with Journal(private, read_only=True) as journal:
        return journal.kept(kind) is not None


def _model_run(phase: str, meta_model: MetaModel, sequences: Sequence[Sized]) -> ModelRun:
    from lowmem_aim.blocks.shares import Needs

    compared = phase == "compare"
    # Three sets of states: both models' hidden states, and the base's outputs that wait for the merged model's.
    needs = Needs.of(meta_model, [*sequences] * (3 if compared else 1))
    tokens = sum(map(len, sequences))
    return ModelRun(phase, needs, tokens, -(-tokens // len(sequences)), meta_model.dtype, 2 if compared else 1)
