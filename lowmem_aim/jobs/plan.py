"""`plan`: what a merge would do and need here, found without doing it.

All that the merge itself checks before it works is checked, and all problems are told at once. Of models on the Hub
only headers and small files are fetched. Nothing is written but, for two seconds, a file without a name where the
output would lie, and stand-ins of Hub models in the cache, which go again.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lowmem_aim.blocks.shares import Needs, share_out
from lowmem_aim.errors import LowmemAimError, ModelError, noted, printable, raise_all
from lowmem_aim.events import Emit, silent
from lowmem_aim.jobs.forecast import Forecast, Requirement, Step
from lowmem_aim.jobs.options import DEFAULTS, Options, set_up
from lowmem_aim.jobs.resume import Identity, check_same, check_same_job
from lowmem_aim.jobs.speed import disk_speed, matmul_speed, merge_speed
from lowmem_aim.measuring.calibration import Calibration, prepare
from lowmem_aim.merging.shares import least_ram_of, shares_of
from lowmem_aim.models.hub import Located
from lowmem_aim.models.inputs import Inputs, open_inputs
from lowmem_aim.models.stand_in import stand_in
from lowmem_aim.output.folder import (
    PRIVATE,
    SMALL_FILES_BYTES,
    check_disk,
    check_outputs,
    check_writable,
    existing_folder,
    is_finished,
)
from lowmem_aim.output.journal import Journal
from lowmem_aim.output.small_files import copied_files
from lowmem_aim.planning.layout import make_plan
from lowmem_aim.planning.survey import survey
from lowmem_aim.planning.tasks import Plan
from lowmem_aim.recipe.recipe import Aim, Recipe, one_by_one
from lowmem_aim.recipe.words import BUILTIN, is_here
from lowmem_aim.relaxing.relaxation import check_activations
from lowmem_aim.system.files import cache_folder
from lowmem_aim.system.lock import is_held, locked_error, owner_of
from lowmem_aim.system.memory import Budget
from lowmem_aim.units import shown

if TYPE_CHECKING:
    from lowmem_aim.measuring.comparison import Comparison
    from lowmem_aim.models.meta_model import MetaModel

MEASURED_SECONDS = 1.0  # for the disk; half of it for each of the others


def plan(
    recipe: Recipe,
    out: Path,
    options: Options = DEFAULTS,
    emit: Emit = silent,
    *,
    measure: bool = True,
) -> Forecast:
    """What `merge` with the same arguments would do. `measure`: also how long it would take.

    Raises the errors of `merge` where there is nothing to be told for them; what only does not fit is among the
    forecast's problems.
    """
    device, budget = set_up(options)
    cache_folder().mkdir(parents=True, exist_ok=True)
    recipes = one_by_one(recipe)
    with tempfile.TemporaryDirectory(prefix="stand-ins-", dir=cache_folder()) as scratch:
        hub, opened = _Hub(Path(scratch)), False
        try:
            with open_inputs(recipe, options.read, emit, options.use_cache, find=hub.find, headers_only=True) as inputs:
                opened = True
                plans = {name: _plan_of(one, inputs, options) for name, one in recipes.items()}
                return _Foreseen(recipe, out, plans, inputs, hub, device, budget, emit, options).forecast(measure)
        except LowmemAimError as error:
            errors = [error]
            if not opened:  # what does not need the models is checked all the same
                check_place(out, [out / name for name in recipes], [], errors)
                _check_files(recipe, errors)
            raise_all(errors)
            raise


def _plan_of(recipe: Recipe, inputs: Inputs, options: Options) -> Plan:
    return make_plan(recipe, inputs, seed=options.seed, shard_bytes=options.shard_bytes, nonfinite=options.nonfinite)


def check_place(out: Path, folders: Sequence[Path], inputs: Sequence[Path], errors: list[LowmemAimError]) -> None:
    """What is in the way of the output itself."""
    known = len(errors)
    with noted(errors):
        check_outputs(out, folders, inputs)
    if len(errors) == known:
        with noted(errors):
            check_writable(existing_folder(out))


def _check_files(recipe: Recipe, errors: list[LowmemAimError]) -> None:
    """That the texts or activations of the recipe are there."""
    tables = [table for table in (recipe.aim, recipe.acm) if table is not None]
    for name in dict.fromkeys(table.calibration for table in tables):
        if name and name != BUILTIN and is_here(name) and not Path(name).expanduser().is_file():
            errors.append(ModelError(f"there is no calibration file `{printable(name)}`"))


class _Hub:
    """Models that are not here are stood in for."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self.missing: dict[str, int] = {}  # label -> bytes to download

    def find(self, reference: str, emit: Emit) -> Located:
        folder = self._scratch / f"{len(self.missing)}" / reference.replace("/", "--")[:100]
        found = stand_in(reference, folder, emit)
        self.missing[found.located.label] = found.missing_bytes
        return found.located

    def stands_in(self, folder: Path) -> bool:
        return self._scratch.resolve() in folder.resolve().parents


@dataclass(frozen=True)
class _Forward:
    """A phase in which a model is run: the base for AIM, base and merged model for ACM."""

    phase: str
    needs: Needs
    tokens: int
    length: int  # of a sequence, on the mean
    dtype: torch.dtype
    models: int = 1

    @property
    def speed(self) -> str:
        """Its name among the speeds: short sequences are slower, and 16-bit floats on some processors."""
        return f"forward of {self.length} tokens in {str(self.dtype).removeprefix('torch.')}"


@dataclass
class _Foreseen:
    recipe: Recipe
    out: Path
    plans: Mapping[str, Plan]
    inputs: Inputs
    hub: _Hub
    device: torch.device
    budget: Budget
    emit: Emit
    options: Options
    errors: list[LowmemAimError] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    calibration: Calibration | None = None
    compared: Comparison | None = None
    unread: bool = False  # some texts are on the Hub

    def forecast(self, measure: bool) -> Forecast:
        surveyed = survey(self.plans, self.inputs, self.hub.missing)
        self._check()
        forwards = [*self._calibration(), *self._comparison()]
        self._check_begun()
        needs = (*self._memory(forwards), self._disk(forwards))
        self._tell_of_downloads()
        speeds = self._speeds(forwards) if measure and not self.errors else {}
        errors = self.errors
        return Forecast(
            survey=surveyed.as_json(),
            device=str(self.device),
            needs=needs,
            problems=tuple(dict.fromkeys(problem for error in errors for problem in error.problems)),
            hints=tuple(dict.fromkeys(error.hint for error in errors if error.hint)),
            exit_code=errors[0].exit_code if errors else 0,
            steps=tuple(self._steps(surveyed.read_bytes, surveyed.write_bytes, forwards, speeds)) if speeds else (),
            speeds=speeds,
            notes=tuple(self.notes),
        )

    def _check(self) -> None:
        """What `merge` checks of the output and of small files."""
        check_place(self.out, [self.out / name for name in self.plans], self.inputs.folders, self.errors)
        with noted(self.errors):
            copied_files(self.inputs.reference)

    def _check_begun(self) -> None:
        """What is in the output folder already: another run at work, another job's, or this one's."""
        for name, plan in self.plans.items():
            folder = self.out / name
            lock = folder / PRIVATE / "lock"
            if not (folder / PRIVATE).is_dir() or self.options.fresh:
                continue
            with noted(self.errors):
                if is_held(lock):
                    raise locked_error(lock, owner_of(lock))
                with Journal(folder / PRIVATE, read_only=True) as journal:
                    self._check_same(journal, plan, folder)
            state = "is finished already" if is_finished(folder) else "holds an interrupted run, which goes on"
            self.notes.append(f"`{printable(str(folder))}` {state}")

    def _check_same(self, journal: Journal, plan: Plan, folder: Path) -> None:
        if self.unread:
            self.notes.append(f"whether `{printable(str(folder))}` is of the same job is seen when texts are there")
            return
        copied = copied_files(self.inputs.reference)
        compared = self.compared.digest() if self.compared else ""
        identity = Identity.of(plan, self.inputs, copied, self.calibration, self.device, compared)
        if is_finished(folder):
            check_same(journal, identity, folder)
        else:
            check_same_job(journal, identity, accept_environment=self.options.accept_environment)

    # -- what is run

    def _calibration(self) -> Iterator[_Forward]:
        aim, base = self.recipe.aim, self.inputs.base
        if aim is None or base is None:
            return
        if not is_here(aim.calibration):
            yield self._unread("calibrate", aim)
            return
        with noted(self.errors):
            calibration = self.calibration = prepare(aim, base, self.emit)
            if calibration.given:
                check_activations(calibration.given, self.inputs, aim)
            elif self.options.use_cache and calibration.cached(self.device).is_file():
                self.notes.append("the activations were measured before, and are reused")
            else:
                assert calibration.meta_model is not None
                yield self._forward("calibrate", calibration.meta_model, calibration.sequences)

    def _comparison(self) -> Iterator[_Forward]:
        acm, base = self.recipe.acm, self.inputs.base
        if acm is None or base is None:
            return
        from lowmem_aim.measuring.comparison import Comparison, texts_of

        if not is_here(acm.calibration):
            yield self._unread("compare", texts_of(acm))
            return
        with noted(self.errors):
            self.compared = Comparison.prepare(acm, base, self.device, self.emit)
            found = self.compared.calibration
            assert found.meta_model is not None
            yield self._forward("compare", found.meta_model, found.sequences)

    def _unread(self, phase: str, aim: Aim) -> _Forward:
        """Of texts that are on the Hub: as many tokens as the recipe asks for."""
        from lowmem_aim.models.meta_model import load_meta_model  # transformers: only where a model is to be run

        assert self.inputs.base is not None
        self.unread = True
        self.notes.append(f"{phase}: the texts are on the Hub, and were not fetched: reckoned with full blocks")
        meta_model = load_meta_model(self.inputs.base, getattr(torch, aim.dtype) if aim.dtype else None)
        return self._forward(phase, meta_model, [range(aim.block_size)] * aim.samples)

    @staticmethod
    def _forward(phase: str, meta_model: MetaModel, sequences: Sequence[Sized]) -> _Forward:
        compared = phase == "compare"
        # Hidden states of both models, and what of the one waits for the other's.
        needs = Needs.of(meta_model, [*sequences] * (3 if compared else 1))
        tokens = sum(map(len, sequences))
        return _Forward(phase, needs, tokens, -(-tokens // len(sequences)), meta_model.dtype, 2 if compared else 1)

    # -- memory and disk

    def _memory(self, forwards: Sequence[_Forward]) -> Iterator[Requirement]:
        used, plans = self.budget.ram_used(), [*self.plans.values()]
        on_host = self.budget.vram is None
        wants = [(least_ram_of(plans, self.inputs, self.budget, self.device), "single rows of the widest tensor")]
        known = len(self.errors)
        with noted(self.errors):
            shares_of(plans, self.inputs, self.budget, self.device)
        for forward in forwards:
            needs = forward.needs
            least = needs.read + (needs.least if on_host else needs.module)
            wants.append((least, f"{forward.phase}: one module of a block at a time, and one sequence's work"))
            with noted(self.errors):
                share_out(self.budget, self.device, needs)
        least, why = max(wants)
        # The run's own check has the last word: what the program itself takes differs from moment to moment.
        refused = len(self.errors) > known and on_host
        yield Requirement(
            "RAM", max(used + least, self.budget.ram + 1) if refused else used + least, self.budget.ram, why
        )
        if self.budget.vram is not None:
            least = max((forward.needs.least for forward in forwards), default=0)
            yield Requirement(
                "VRAM", least, self.budget.vram, "one module of a block at a time" if forwards else "slices"
            )

    def _disk(self, forwards: Sequence[_Forward]) -> Requirement:
        """Hidden states, at worst all of them and two snapshots, are gone before the output is written."""
        written = sum(plan.output_bytes for plan in self.plans.values())
        spilled = max((3 * forward.needs.states for forward in forwards), default=0)
        missing = sum(self.hub.missing.values())
        with noted(self.errors):
            check_disk(self.out, max(written, spilled))
        parts = [f"the output {shown(written)}"]
        parts += [f"before it hidden states, at most {shown(spilled)}"] if spilled else []
        parts += [f"besides downloads of {shown(missing)}, in the Hub's cache"] if missing else []
        free = shutil.disk_usage(existing_folder(self.out)).free
        return Requirement("disk", max(written, spilled) + SMALL_FILES_BYTES, free, ", ".join(parts))

    def _tell_of_downloads(self) -> None:
        missing = [f"{printable(label)} {shown(count)}" for label, count in self.hub.missing.items() if count]
        if missing:
            self.notes.append(f"downloads come first, and their time is not in it: {', '.join(missing)}")

    # -- time

    def _speeds(self, forwards: Sequence[_Forward]) -> dict[str, float]:
        """Bytes, elements of the output and floating-point operations per second."""
        real = [folder for folder in self.inputs.folders if not self.hub.stands_in(folder)]
        files = [file for folder in real for file in sorted(folder.glob("*.safetensors"))]
        first = next(iter(self.plans.values()))
        merged = [task for task in first.tasks if task.action == "merge"]
        shares = shares_of([first], self.inputs, self.budget, self.device)
        with noted(self.errors):
            disk = disk_speed(existing_folder(self.out), files, MEASURED_SECONDS)
            speeds = ({"read": disk.read} if disk.read else {}) | {"write": disk.write}
            if merged:
                task = max(merged, key=lambda task: task.numel)
                speeds["compute"] = merge_speed(
                    first.recipe.method,
                    task.parameters,
                    len(self.inputs.experts),
                    device=self.device,
                    relaxed=self.recipe.relaxed,
                    dtype=task.dtype,
                    threads=shares.workers,
                    seconds=MEASURED_SECONDS / 2,
                    slice_elements=shares.slice_elements,
                )
            for forward in forwards:
                seconds = MEASURED_SECONDS / 2
                speeds[forward.speed] = matmul_speed(self.device, forward.dtype, seconds, tokens=forward.length)
            return speeds
        return {}

    def _steps(
        self, read: int, write: int, forwards: Sequence[_Forward], speeds: Mapping[str, float]
    ) -> Iterator[Step]:
        first = next(iter(self.plans.values()))
        blocks = [task for task in first.tasks if task.layer is not None]
        operations = 2.0 * sum(task.numel for task in blocks)  # of a token's forward
        for forward in forwards:
            limits = {"compute": forward.models * operations * forward.tokens / speeds[forward.speed]}
            if "read" in speeds:
                limits["read"] = forward.models * sum(task.nbytes for task in blocks) / speeds["read"]
            yield Step(forward.phase, limits)
        elements = sum(task.numel for plan in self.plans.values() for task in plan.tasks if task.action == "merge")
        limits = {"write": write / speeds["write"]}
        limits |= {"compute": elements / speeds["compute"]} if "compute" in speeds else {}
        limits |= {"read": read / speeds["read"]} if "read" in speeds else {}
        yield Step("merge", limits)
