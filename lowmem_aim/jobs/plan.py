"""`plan`: what a merge would do and need here, found without doing it.

All that the merge checks before it works is checked, and all problems are reported at once. Of models on the Hub only
headers and small files are fetched. Nothing is written but, for two seconds, a file without a name where the output
would lie, and stand-ins of Hub models in the cache, which are removed again.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from lowmem_aim.errors import MemoryBudgetError, noted, printable, raise_all
from lowmem_aim.events import Emit, Event, Notice, silent
from lowmem_aim.jobs.forecast import MERGE, Forecast, Requirement, Step, in_all
from lowmem_aim.jobs.headers import Headers
from lowmem_aim.jobs.prepared import Prepared
from lowmem_aim.jobs.speed import disk_speed, matmul_speed, merge_speed
from lowmem_aim.jobs.stages import Stages
from lowmem_aim.methods.linears import ROWS
from lowmem_aim.methods.solved import operations
from lowmem_aim.models.opening import Finder
from lowmem_aim.output.folder import SMALL_FILES_BYTES, existing_folder
from lowmem_aim.planning.layout import subject_of
from lowmem_aim.planning.survey import survey
from lowmem_aim.planning.tasks import Plan
from lowmem_aim.recipe.recipe import Recipe
from lowmem_aim.system.memory import Kind, enough
from lowmem_aim.system.on_demand import torch
from lowmem_aim.system.options import DEFAULTS, Options
from lowmem_aim.units import clock, shown

MEASURED_SECONDS = 1.0  # for the disk; half of it for each of the others
SOLVE = "matrix products"  # their speed's name
LONG_SECONDS = 3600.0
GPU_SPEED = 2e13  # operations per second in float32, of a GPU that many have


def plan(
    recipe: Recipe,
    out: Path,
    options: Options = DEFAULTS,
    emit: Emit = silent,
    *,
    measure: bool = True,
) -> Forecast:
    """Forecast what `merge` with the same arguments would do; `measure`: also how long it would take.

    Raises the errors of models that cannot be opened, and of options that cannot be used here; every other problem is
    among the forecast's.
    """
    warnings: list[str] = []
    told = noting(emit, warnings)
    for notice in (notice for part in recipe.in_order.values() for notice in part.notices):
        told(Notice(notice, "warning"))
    with contextlib.ExitStack() as stack:
        hub = Headers(stack)
        finder = Finder(hub.find, has_weights=lambda folder: not hub.stands_in(folder), fetches=False)
        stages = stack.enter_context(Stages(recipe, out, options, told, finder))
        forecasts: dict[str, Forecast] = {}

        def visit(name: str, ready: Prepared) -> None:
            forecasts[name] = Estimate(ready, hub).forecast(measure)

        errors = stages.check(visit, reread=False)
        if "" not in forecasts:  # of an output that cannot be planned, or without the device, nothing can be told
            raise_all(errors)
        found = in_all(forecasts, errors)
    return replace(found, warnings=tuple(dict.fromkeys(warnings)))


def noting(emit: Emit, warnings: list[str]) -> Emit:
    """An Emit that passes events on, and adds to `warnings` what was warned of."""

    def noted_too(event: Event) -> None:
        if isinstance(event, Notice) and event.level == "warning":
            warnings.append(event.text)
        emit(event)

    return noted_too


@dataclass(frozen=True)
class Estimate:
    """The needs of a prepared merge on this machine, and the time that it would take."""

    ready: Prepared
    hub: Headers

    def forecast(self, measure: bool) -> Forecast:
        """The forecast of the merge; `measure`: also how long it would take. Problems stay in `Prepared.errors`."""
        ready = self.ready
        surveyed = survey(ready.plans, ready.inputs, self.hub.missing)
        is_left = bool(ready.unfinished())
        needs = (*self._memory(), self._disk()) if is_left else ()
        self._tell_of_downloads()
        speeds = self._speeds() if measure and is_left and not ready.errors else {}
        return Forecast(
            survey=surveyed.as_json(),
            device=str(ready.run.device) if is_left else ready.options.device,
            needs=needs,
            steps=tuple(self._steps(surveyed.read_bytes, surveyed.write_bytes, speeds)) if speeds else (),
            speeds=speeds,
            notes=tuple(ready.notes),
        )

    # -- memory and disk

    def _memory(self) -> Iterator[Requirement]:
        budget, model_runs = self.ready.run.budget, self.ready.model_runs
        used, on_host = budget.ram_used(), budget.vram is None
        reached = self.ready.reached - budget.ram_used()
        merged = "the program, what the method holds, and slices of each model"
        wants = [(self.ready.needs().least_ram(on_host, reached), merged)]
        for model_run in model_runs:
            what = f"{model_run.step}: one module of a block at a time, and one sequence's work"
            wants.append((model_run.needs.least_ram(on_host), what))
        least, why = max(wants)
        # The run's own check has the last word: what the program itself takes differs from moment to moment.
        yield Requirement("RAM", self._asked_for("RAM") or min(enough(used, least), budget.ram), budget.ram, why)
        if budget.vram is not None:
            wants = [(self.ready.needs().least_vram(), "slices")]
            wants += [(model_run.needs.least, "one module of a block at a time") for model_run in model_runs]
            least, why = max(wants)
            yield Requirement("VRAM", self._asked_for("VRAM") or enough(0, least), budget.vram, why)

    def _asked_for(self, kind: Kind) -> int:
        """The bytes that the checks have asked for where the budget was too small; 0 if it was not."""
        refused = [error for error in self.ready.errors if isinstance(error, MemoryBudgetError) and error.kind == kind]
        return max((error.enough for error in refused), default=0)

    def _disk(self) -> Requirement:
        """The need of disk space: hidden states, at worst all and two snapshots, go before the output is written."""
        ready = self.ready
        written, spilled, scratch = ready.bytes_to_write(), ready.bytes_to_spill(), self._scratch()
        taken = ready.taken_bytes()
        stages, missing = ready.position.unmade_bytes, sum(self.hub.missing.values())
        parts = [f"the output {shown(written)}, and {shown(SMALL_FILES_BYTES)} to spare"]
        parts += [f"the stages {shown(stages)}, until it is finished"] if stages else []
        parts += [f"hidden states before that, at most {shown(spilled)}"] if spilled else []
        parts += [f"matrices {shown(scratch)} meanwhile"] if scratch else []
        parts += [f"a merged block {shown(taken)} meanwhile"] if taken else []
        parts += [f"downloads of {shown(missing)} besides, in the Hub's cache"] if missing else []
        free = shutil.disk_usage(existing_folder(ready.out)).free
        at_once = written + spilled if ready.experts else max(written, spilled)  # experts run while it is written
        return Requirement("disk", stages + at_once + scratch + taken + SMALL_FILES_BYTES, free, "; ".join(parts))

    def _scratch(self) -> int:
        """Bytes of matrices in a file; 0 where a budget is too small, which is told."""
        with contextlib.suppress(MemoryBudgetError):
            return self.ready.scratch_bytes()
        return 0

    def _tell_of_downloads(self) -> None:
        missing = [f"{printable(label)} {shown(count)}" for label, count in self.hub.missing.items() if count]
        if missing:
            self.ready.notes.append(f"the time does not include downloads, which come first: {', '.join(missing)}")

    # -- time

    def _speeds(self) -> dict[str, float]:
        """Bytes, elements of the output and floating-point operations per second, by name."""
        ready, run = self.ready, self.ready.run
        real = [folder for folder in ready.inputs.folders if ready.finder.has_weights(folder)]
        files = [file for folder in real for file in sorted(folder.glob("*.safetensors"))]
        with noted(ready.errors):
            disk = disk_speed(existing_folder(ready.out), files, MEASURED_SECONDS)
            speeds = ({"read": disk.read} if disk.read else {}) | {"write": disk.write}
            speeds |= self._merge_speeds()
            if self._solving(ready.plans.values()):
                speeds[SOLVE] = matmul_speed(run.device, torch.float32, MEASURED_SECONDS / 4, tokens=ROWS)
            for model_run in ready.model_runs:
                seconds = MEASURED_SECONDS / 2
                speeds[model_run.speed] = matmul_speed(run.device, model_run.dtype, seconds, tokens=model_run.length)
            return speeds
        return {}

    def _merge_speeds(self) -> dict[str, float]:
        """Elements of the output per second, by `_compute` of each method."""
        shares, by_method = self.ready.shares(), dict[str, list[Plan]]()
        for plan in self.ready.plans.values():
            by_method.setdefault(self._compute(plan), []).append(plan)
        speeds = {}
        for name, plans in by_method.items():
            merged = [task for task in plans[0].tasks if task.action == "merge"]
            if merged:
                task = max(merged, key=lambda task: task.numel)
                speeds[name] = merge_speed(
                    plans[0].recipe.method,
                    task.parameters,
                    len(task.experts),
                    device=self.ready.run.device,
                    relaxed=any(plan.recipe.relaxed for plan in plans),
                    dtype=task.dtype.torch,
                    threads=shares.workers,
                    seconds=MEASURED_SECONDS / 2 / len(by_method),
                    slice_elements=shares.slice_elements,
                )
        return speeds

    def _solving(self, plans: Iterable[Plan]) -> float:
        """Floating-point operations of methods that solve, each way of merging a tensor once."""
        experts, ways = self.ready.experts, dict[Hashable, float]()
        for plan in plans:
            tokens = sum(map(len, experts.sequences)) if experts and plan.recipe.texts else 0
            for task in plan.tasks if plan.recipe.method.rows_of_linears else ():
                subject = subject_of(task, plan.recipe, plan.seed)
                ways[task.name, plan.way(task)] = operations(subject, tokens=tokens)
        return sum(ways.values())

    def _tell_of_solving(self, seconds: float) -> None:
        """Tell what solving costs; where that is hours, what a GPU would take."""
        operations, there = self._solving(self.ready.plans.values()), f", here {clock(seconds)}"
        if self.ready.run.device.type == "cpu" and seconds > LONG_SECONDS:
            elsewhere = clock(operations / GPU_SPEED)
            there += f"; a GPU of {GPU_SPEED / 1e12:g} TFLOP/s in float32 would take {elsewhere}"
        again = "; as many again for each output that ACM compares" if self._solving(self._compared()) else ""
        self.ready.notes.append(f"solving takes {operations:.1e} operations{there}{again}")
        scratch, matrices = self._scratch(), shown(self.ready.matrix_bytes())
        there = f", {shown(scratch)} in a file" if scratch else ""
        self.ready.notes.append(f"the matrices of what is solved at a time take {matrices}{there}")

    def _compared(self) -> list[Plan]:
        """The plans of outputs whose weights are made once before the merge, for ACM."""
        compared = any(model_run.phase == "compare" for model_run in self.ready.model_runs)
        return [plan for plan in self.ready.plans.values() if plan.recipe.acm and compared]

    def _compute(self, plan: Plan) -> str:
        """The name of a method's arithmetic among the speeds."""
        methods = {other.recipe.method.name for other in self.ready.plans.values()}
        return "compute" if len(methods) == 1 else f"compute by {plan.recipe.method.name}"

    def _steps(self, read: int, write: int, speeds: Mapping[str, float]) -> Iterator[Step]:
        plans = self.ready.plans
        first = next(iter(plans.values()))
        blocks = [task for task in first.tasks if task.layer is not None]
        operations = 2.0 * sum(task.numel for task in blocks)  # of a token's forward
        # What the texts of RegMean++ go through is made besides.
        times = [(plan, 2 if plan.recipe.texts == "merged" else 1) for plan in self._compared()]
        solved_before = sum(self._solving([plan]) * count for plan, count in times)
        for model_run in self.ready.model_runs:
            limits = {"compute": model_run.models * operations * model_run.tokens / speeds[model_run.speed]}
            if model_run.phase == "compare" and solved_before:
                limits["compute"] += solved_before / speeds[SOLVE]
                solved_before = 0.0  # in one of its steps
            if "read" in speeds:
                limits["read"] = model_run.read * sum(task.nbytes for task in blocks) / speeds["read"]
            yield Step(model_run.step, limits)
        computing = [
            sum(task.numel for task in plan.tasks if task.action == "merge") / speeds[self._compute(plan)]
            for plan in plans.values()
            if self._compute(plan) in speeds
        ]
        if SOLVE in speeds:
            computing.append(self._solving(plans.values()) / speeds[SOLVE])
            self._tell_of_solving(computing[-1])
        limits = {"write": write / speeds["write"]}
        limits |= {"compute": sum(computing)} if computing else {}
        limits |= {"read": read / speeds["read"]} if "read" in speeds else {}
        yield Step(MERGE, limits)
