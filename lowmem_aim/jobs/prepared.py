"""A merge that could begin: its models, its plans, and what the checks have found out."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowmem_aim.errors import LowmemAimError, raise_all
from lowmem_aim.events import Emit
from lowmem_aim.jobs.identity import identity_of_merge, known_of_merge
from lowmem_aim.measuring.calibration import Calibration
from lowmem_aim.merging import shares
from lowmem_aim.merging.merged_weights import ELEMENTS
from lowmem_aim.merging.rehearsal import rehearse
from lowmem_aim.models.checkpoint import Checkpoint
from lowmem_aim.models.inputs import Inputs
from lowmem_aim.models.opening import Finder
from lowmem_aim.models.reader import Reader
from lowmem_aim.output.folder import PRIVATE, check_writable, existing_folder, is_finished, staged_bytes
from lowmem_aim.output.records import Identity
from lowmem_aim.planning.tasks import Plan
from lowmem_aim.recipe.recipe import Acm, Aim, Recipe
from lowmem_aim.system.on_demand import torch
from lowmem_aim.system.options import Options
from lowmem_aim.system.run import Run, start
from lowmem_aim.system.tensors import dtype_name

if TYPE_CHECKING:
    from lowmem_aim.blocks.shares import Needs
    from lowmem_aim.measuring.comparison import Comparison, Making
    from lowmem_aim.solving.experts import Experts


@dataclass(frozen=True)
class ModelRun:
    """A run of models over texts: of the base for AIM, of base and merged model for ACM, of the experts."""

    phase: str
    needs: Needs
    tokens: int  # of all sequences
    length: int  # of a sequence, on the mean
    dtype: torch.dtype
    models: int = 1  # that each text is run through
    read: int = 1  # models whose weights are read

    @property
    def step(self) -> str:
        """The name of the step in a forecast: experts are run on texts within the merge."""
        return "texts" if self.phase == "merge" else self.phase

    @property
    def speed(self) -> str:
        """The forward's name among the speeds, which depend on the length of sequences and on the dtype."""
        return f"forward of {self.length} tokens in {dtype_name(self.dtype)}"


@dataclass(frozen=True)
class Behind:
    """A named stage that a merge is made of, by itself or further back."""

    name: str
    folder: Path
    local: tuple[str, ...]  # labels of models and files that were on this machine


@dataclass(frozen=True)
class Position:
    """The position of a merge among the stages of its recipe; that of a recipe without stages is the default."""

    stage: str = ""  # its name; "": it makes the output
    made_of: Mapping[str, str] = field(default_factory=dict)  # name -> digest of the stages that it uses
    behind: tuple[Behind, ...] = ()  # these stages, and those that they were made of, in their order
    unmade_bytes: int = 0  # that the stages before it are yet to take of the disk
    known: bool = True  # nothing is wrong with the stages that it uses
    held: bool = False  # this run holds the output folder already
    over: bool = False  # the output that it is a stage of is finished: whatever is left in its folder does not matter


ALONE = Position()


@dataclass
class Prepared:
    """A merge that could begin, unless there are `errors`. Nothing has been written.

    It may have several outputs, each with a recipe of its own, of which one reading of the models serves all.
    """

    recipes: Mapping[str, Recipe]  # by the output's folder in `out`; "" where the output is `out` itself
    out: Path
    options: Options
    emit: Emit
    finder: Finder
    reader: Reader  # closed before the work begins
    inputs: Inputs
    plans: Mapping[str, Plan]  # by name, as the recipes
    errors: list[LowmemAimError]
    copied: Mapping[str, bytes] = field(default_factory=dict)  # small files that the output takes from the reference
    config: Mapping[str, Any] = field(default_factory=dict)  # of the output
    calibration: Calibration | None = None
    comparison: Comparison | None = None
    experts: Experts | None = None  # that are run on texts of their own
    model_runs: list[ModelRun] = field(default_factory=list)  # the model runs that are still to be made
    notes: list[str] = field(default_factory=list)  # what `plan` reports beside the figures
    unread: bool = False  # some texts are on the Hub, and were not fetched
    incomplete: bool = False  # something that tells this job from others could not be had
    position: Position = ALONE
    together: bool = True  # the outputs are made at once; else so many at a time as fit, and one does at least

    @property
    def recipe(self) -> Recipe:
        """The first of the recipes, for all that they have in common: models, slices, dtype and tokenizer."""
        return next(iter(self.recipes.values()))

    @property
    def aims(self) -> list[Aim]:
        """AIM's tables, each once; they are measured for alike."""
        return list(dict.fromkeys(recipe.aim for recipe in self.recipes.values() if recipe.aim))

    @property
    def acm(self) -> Acm | None:
        """The table of ACM, if any output has it: all that do have the same."""
        return next((recipe.acm for recipe in self.recipes.values() if recipe.acm), None)

    @functools.cached_property
    def run(self) -> Run:
        """The device and its budget; asking for it imports torch. Raises UsageError for a device that is not there."""
        return start(self.options, self.emit)

    def folder(self, name: str) -> Path:
        """The folder of one output."""
        return self.out / name

    def identity(self, name: str) -> Identity:
        """The identity of one output's merge, for its journal."""
        plan = self.plans[name]
        return identity_of_merge(
            plan,
            self.inputs,
            self.copied,
            self.calibration if plan.recipe.aim else None,
            self.comparison if plan.recipe.acm else None,
            self.experts,
            self.run.device,
            self.position.made_of,
            self.finder.planned,
        )

    def known(self, name: str) -> Identity:
        """The part of that identity which is known at once, without torch."""
        made_of, planned = self.position.made_of, self.finder.planned
        return known_of_merge(self.plans[name], self.inputs, self.copied, made_of, planned)

    def lasting(self, name: str) -> Identity:
        """The part of that identity which a finished output is compared with; torch only for what was measured."""
        recipe = self.plans[name].recipe
        return self.identity(name) if recipe.relaxed or recipe.solve else self.known(name)

    @property
    def measures(self) -> bool:
        """Whether any output depends on activations or texts, which only torch or the tokenizer can read."""
        return any(recipe.relaxed or recipe.solve for recipe in self.recipes.values())

    def unfinished(self) -> list[str]:
        """The names of the outputs that are still to be made: none is for an output that is finished."""
        return [] if self.position.over else [name for name in self.plans if not is_finished(self.folder(name))]

    def outline(self) -> Checkpoint:
        """The output as a checkpoint of which only config and headers are there."""
        if not self.recipe.sliced:
            return self.inputs.reference
        plan = next(iter(self.plans.values()))
        own = self.inputs.reference.tensors  # with the vocabulary that they have there
        shapes = {task.name: own[task.name].shape if task.filling else task.shape for task in plan.tasks}
        infos = {
            task.name: replace(task.experts[0].info, name=task.name, shape=shapes[task.name]) for task in plan.tasks
        }
        return Checkpoint(self.out, "the output", self.config, infos)

    def is_settled(self) -> bool:
        """Whether every output is finished, and known to be of this job without torch: no run, and no device, follows.

        A device that is asked for by name is looked for even then.
        """
        return not self.unfinished() and not self.measures and self.options.device in ("auto", "cpu")

    def needs(self) -> shares.Needs:
        """The memory that the merge itself takes: of all outputs that are left, or of the one that takes the most."""
        left = [self.plans[name] for name in self.unfinished()] or [*self.plans.values()]
        on_host = self.run.budget.vram is None
        each = [left] if self.together else [[plan] for plan in left]
        needs = [
            replace(shares.Needs.of(plans, self.inputs, self.run.device), running=self.running()) for plans in each
        ]
        return max(needs, key=lambda need: need.least_ram(on_host))

    def running(self) -> shares.Running | None:
        """The memory that running experts between tensors takes; None if the method measures no texts."""
        if self.experts is None:
            return None
        needs, on_host = self.experts.needs(), self.run.budget.vram is None
        least, block = needs.least_ram(on_host), needs.block - needs.module if on_host else 0
        vram = 0 if on_host else needs.least
        if self.experts.outline is not None:  # a merged model is run, too, and its weights solved on demand
            plan = next(iter(self.plans.values()))
            making = self.making(plan)
            least, vram = least + making.ram, vram + making.vram
        return shares.Running(least, block, vram, self.experts.moments_bytes())

    def making(self, plan: Plan) -> Making:
        """The memory that making an output's weights one after another takes, in a merge that writes none of them."""
        from lowmem_aim.measuring.comparison import Making  # transformers: only where models are run

        needs = shares.Needs.of([plan], self.inputs, self.run.device)
        made = needs.one_by_one(ELEMENTS)
        on_device = self.run.budget.vram is not None and any(task.tile for task in plan.tasks)
        return Making(made, made if on_device else 0)

    @functools.cached_property
    def reached(self) -> int:
        """The most bytes of RAM that were in use while the code of the merge was compiled and loaded, once for all."""
        return rehearse([*self.plans.values()], self.run.budget)

    def shares(self, *, grown: bool = False) -> shares.Shares:
        """Divide what is left of the budget now, for the merge itself; `grown`: the merge has begun.

        Raises MemoryBudgetError.
        """
        reached = self.reached  # before the budget is looked at
        return shares.share_out(self.run.budget, self.run.device, self.needs(), reached, grown=grown)

    def scratch_bytes(self) -> int:
        """Bytes of matrices that lie in a file meanwhile, since they do not fit in memory. Raises MemoryBudgetError."""
        matrices = self.matrix_bytes()
        shares = self.shares() if matrices else None
        return max(0, matrices - shares.matrices - shares.device_matrices) if shares else 0

    def taken_bytes(self) -> int:
        """Bytes of merged weights that lie in a file until the texts have gone through them: those of a block."""
        merged = [plan for plan in self.plans.values() if plan.recipe.texts == "merged"]
        layers = Counter[int | None]()
        for task in merged[0].tasks if merged else ():  # the others differ in how they are relaxed
            layers[task.layer] += task.nbytes if task.tile else 0
        return max(layers.values(), default=0)

    def matrix_bytes(self) -> int:
        """Bytes of the matrices of methods that solve, at a time, wherever they lie."""
        needs = self.needs()
        return needs.footprint.matrices + (needs.running.moments if needs.running else 0)

    def bytes_to_write(self) -> int:
        """Bytes of the outputs that earlier runs have not yet taken of the disk; if not `together`, of the largest."""
        copied = sum(map(len, self.copied.values()))
        sizes = [self.plans[name].output_bytes + copied - staged_bytes(self.folder(name)) for name in self.unfinished()]
        return sum(sizes) if self.together else max(sizes, default=0)

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
