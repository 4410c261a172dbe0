"""`plan`: what a merge would do and need here, found without doing it.

All that the merge itself checks before it works is checked, and all problems are told at once. Of models on the Hub
only headers and small files are fetched. Nothing is written but, for two seconds, a file without a name where the
output would lie, and stand-ins of Hub models in the cache, which go again.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from lowmem_aim.durable import cache_folder
from lowmem_aim.errors import LowmemAimError, noted, printable
from lowmem_aim.events import Emit, silent
from lowmem_aim.forecast import Forecast, Need, Step, Work, steps_of
from lowmem_aim.hub import Located
from lowmem_aim.inputs import Inputs, open_inputs
from lowmem_aim.job import DEFAULTS, Options, least_ram_of, set_up, shares_of
from lowmem_aim.memory import Budget
from lowmem_aim.output import SMALL_FILES_BYTES, check_disk, existing_folder
from lowmem_aim.plan import Plan, make_plan
from lowmem_aim.recipe import Recipe, one_by_one
from lowmem_aim.remote import stand_in
from lowmem_aim.rooms import Needs, divide
from lowmem_aim.run import check_outputs
from lowmem_aim.speed import disk_speed, matmul_speed, merge_speed
from lowmem_aim.surveyor import survey_of
from lowmem_aim.texts import is_activations_file
from lowmem_aim.units import shown

MEASURED_SECONDS = 1.0  # for the disk; half of it for each of the others


def foresee(
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
    with tempfile.TemporaryDirectory(prefix="stand-ins-", dir=cache_folder()) as scratch:
        hub = _Hub(Path(scratch))
        with open_inputs(recipe, options.read, emit, options.use_cache, find=hub.find, headers_only=True) as inputs:
            plans = {
                name: make_plan(
                    one, inputs, seed=options.seed, shard_bytes=options.shard_bytes, nonfinite=options.nonfinite
                )
                for name, one in one_by_one(recipe).items()
            }
            return _Foreseen(recipe, out, plans, inputs, hub, device, budget).forecast(measure)


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


@dataclass
class _Foreseen:
    recipe: Recipe
    out: Path
    plans: Mapping[str, Plan]
    inputs: Inputs
    hub: _Hub
    device: torch.device
    budget: Budget

    def forecast(self, measure: bool) -> Forecast:
        survey = survey_of(self.plans, self.inputs, self.hub.missing)
        errors: list[LowmemAimError] = []
        calibration = self._calibration()
        needs = tuple(self._needs(calibration, errors))
        work = self._work(survey.read_bytes, survey.write_bytes, calibration)
        speeds = self._speeds(calibration is not None) if measure else {}
        return Forecast(
            survey=survey.as_json(),
            device=str(self.device),
            needs=needs,
            problems=tuple(problem for error in errors for problem in error.problems),
            hints=tuple(dict.fromkeys(error.hint for error in errors if error.hint)),
            exit_code=errors[0].exit_code if errors else 0,
            steps=tuple(self._steps(work, speeds)) if speeds else (),
            speeds=speeds,
            notes=tuple(self._notes()),
        )

    # -- memory and disk

    def _needs(self, calibration: Needs | None, errors: list[LowmemAimError]) -> Iterator[Need]:
        used, plans = self.budget.ram_used(), [*self.plans.values()]
        least, why = least_ram_of(plans, self.inputs, self.budget, self.device), "single rows of the widest tensor"
        with noted(errors):
            shares_of(plans, self.inputs, self.budget, self.device)
        if calibration:
            on_host = calibration.read + (calibration.least if self.budget.vram is None else calibration.module)
            least, why = max((least, why), (on_host, "one module of a block at a time, and one sequence's work"))
            with noted(errors):
                divide(self.budget, self.device, calibration)
        yield Need("RAM", used + least, self.budget.ram, why)
        if self.budget.vram is not None:
            on_device = calibration.least if calibration else 0
            yield Need("VRAM", on_device, self.budget.vram, "one module of a block at a time")
        with noted(errors):
            check_outputs(self.out, [self.out / name for name in self.plans], self.inputs.folders)
        yield self._disk(calibration, errors)

    def _disk(self, calibration: Needs | None, errors: list[LowmemAimError]) -> Need:
        """Output and downloads are taken to share a disk where they may."""
        written = sum(plan.output_bytes for plan in self.plans.values())
        spilled = 3 * calibration.states if calibration else 0  # at worst: all of them, and two snapshots
        missing = sum(self.hub.missing.values())
        with noted(errors):
            check_disk(self.out, max(written, spilled))
        parts = [f"the output {shown(written)}"]
        parts += [f"calibration at most {shown(spilled)}, before it"] if spilled else []
        parts += [f"downloads {shown(missing)}, in the Hub's cache"] if missing else []
        free = shutil.disk_usage(existing_folder(self.out)).free
        return Need("disk", max(written, spilled) + SMALL_FILES_BYTES, free, ", ".join(parts))

    def _calibration(self) -> Needs | None:
        """Of as many tokens as the recipe asks for: texts are not read."""
        aim, acm, base = self.recipe.aim, self.recipe.acm, self.inputs.base
        measured = aim if aim and not is_activations_file(aim.calibration) else None
        if base is None or not (measured or acm):
            return None
        from lowmem_aim.skeleton import load_skeleton  # transformers: only where a model is to be run

        dtype = (measured.dtype if measured else acm.dtype if acm else "") or None
        skeleton = load_skeleton(base, getattr(torch, dtype) if dtype else None)
        samples, length = (measured.samples, measured.block_size) if measured else (acm.samples, 512) if acm else (0, 0)
        self._tokens, self._skeleton_dtype = samples * length, skeleton.dtype
        return Needs.of(skeleton, [range(length)] * samples)

    # -- time

    def _work(self, read: int, write: int, calibration: Needs | None) -> Work:
        elements = sum(task.numel for plan in self.plans.values() for task in plan.tasks if task.action == "merge")
        if calibration is None:
            return Work(read, write, elements)
        first = next(iter(self.plans.values()))
        blocks = [task for task in first.tasks if task.layer is not None]
        operations = 2.0 * sum(task.numel for task in blocks)  # a token
        measured = self.recipe.aim is not None and not is_activations_file(self.recipe.aim.calibration)
        compared = 2.0 * operations * self.recipe.acm.samples * 512 if self.recipe.acm else 0.0
        return Work(
            read,
            write,
            elements,
            sum(task.nbytes for task in blocks) if measured else 0,
            operations * self._tokens if measured else 0.0,
            compared,
        )

    def _speeds(self, calibrates: bool) -> dict[str, float]:
        """Bytes, elements of the output and floating-point operations per second."""
        real = [folder for folder in self.inputs.folders if not self.hub.stands_in(folder)]
        files = [file for folder in real for file in sorted(folder.glob("*.safetensors"))]
        disk = disk_speed(existing_folder(self.out), files, MEASURED_SECONDS)
        first = next(iter(self.plans.values()))
        task = max((task for task in first.tasks if task.action == "merge"), key=lambda task: task.numel)
        shares = shares_of([first], self.inputs, self.budget, self.device)
        speeds = {"read": disk.read} if disk.read else {}
        speeds |= {"write": disk.write}
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
        if calibrates:
            speeds["forward"] = matmul_speed(self.device, self._skeleton_dtype, MEASURED_SECONDS / 2)
        return speeds

    def _steps(self, work: Work, speeds: Mapping[str, float]) -> Iterator[Step]:
        yield from steps_of(work, speeds.get("read"), speeds["write"], speeds["compute"], speeds.get("forward"))

    def _notes(self) -> Iterator[str]:
        missing = {label: count for label, count in self.hub.missing.items() if count}
        if missing:
            yield "downloads come first, and their time is not in it: " + ", ".join(
                f"{printable(label)} {shown(count)}" for label, count in missing.items()
            )
        if self.recipe.aim and not is_activations_file(self.recipe.aim.calibration):
            yield "activations that were measured before are reused, and cost no time"
