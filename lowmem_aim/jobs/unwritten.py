"""The shares that a merge would keep of each expert's effect on its own texts, found by making it without writing it.

The experts are run on their texts, and every tensor is merged, relaxed and rounded as `merge` does it, within the same
budget; then the rows are let go. What does not fit in memory lies in files without a name in the place where the output
would be: however the run ends, nothing is left of it but activations of the base, which go to the cache as ever. So a
run that is interrupted starts over.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lowmem_aim.errors import UsageError
from lowmem_aim.events import Emit, Event, Notice, Planned, silent
from lowmem_aim.jobs.held import planned
from lowmem_aim.jobs.merge import check_measured, merge_outputs
from lowmem_aim.jobs.preparation import prepared, with_all_else
from lowmem_aim.jobs.prepared import Prepared
from lowmem_aim.measuring.calibration import GivenActivations
from lowmem_aim.models.inputs import Inputs
from lowmem_aim.output.folder import existing_folder
from lowmem_aim.output.merged import Merged
from lowmem_aim.output.provenance import effects_by_tensor, effects_of
from lowmem_aim.output.unwritten import Unwritten
from lowmem_aim.planning.tasks import Plan
from lowmem_aim.recipe.recipe import Recipe, one_by_one
from lowmem_aim.relaxing.activations import Activations
from lowmem_aim.relaxing.relaxation import Consensus
from lowmem_aim.system.options import DEFAULTS, Options
from lowmem_aim.view.feed import reported


@dataclass
class UnwrittenOutput:
    """One output of which nothing is written (`held.Output`): its plan, and what its relaxations have found."""

    name: str  # of its folder, where there are several; else empty
    plan: Plan
    scratch: Path  # the folder for what does not fit in memory, in files without a name
    journal: None = None  # nothing is kept for another run
    consensus: Consensus | None = None
    weaker: Sequence[str] = ()

    def sink(self, emit: Emit) -> Unwritten:
        """Finished rows go nowhere."""
        return Unwritten(self.plan, emit, self.name)

    def effects(self, inputs: Inputs, merged: Merged) -> dict[str, Any]:
        """The shares that are kept, as JSON: by expert and layer as in lowmem_aim.json, and by tensor."""
        experts, tensors = effects_of(self.plan, inputs, merged), effects_by_tensor(self.plan, merged)
        return {"output": self.name, "experts": experts, "tensors": tensors}


def effects(
    recipe: Recipe, out: Path, options: Options = DEFAULTS, emit: Emit = silent, *, told: Collection[Event] = ()
) -> tuple[dict[str, Any], ...]:
    """The shares of the experts' effects that each output of a recipe in `out` would keep, as the merge itself tells.

    Models of the Hub are downloaded. Notices in `told` are not told again. Raises UsageError for a recipe without texts
    of experts, and the errors of `merge`.
    """
    check_texts(recipe, out, options)
    with (
        reported("plan", out, _without(told, emit), options.command) as feed,
        prepared(one_by_one(recipe), out, options, feed) as ready,
    ):
        ready.refuse()
        scratch = existing_folder(out)
        outputs = [UnwrittenOutput(name, plan, scratch) for name, plan in ready.plans.items()]
        feed(_planned(ready))
        merged = merge_outputs(ready, outputs, _activations(ready, scratch))
        return tuple(output.effects(ready.inputs, found) for output, found in zip(outputs, merged, strict=True))


def check_texts(recipe: Recipe, out: Path, options: Options) -> None:
    """Raise UsageError if a recipe has no texts of experts to measure effects on, with all else that is wrong."""
    if told := dict(_in_the_way(recipe)):
        raise with_all_else([UsageError(told, [*told.values()])], recipe, out, options)


def _in_the_way(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Yield what stops experts from being run, each with what to do."""
    if recipe.stages:
        yield (
            "`--activations`: the recipe has named stages, which are not made yet",
            "merge the stages first, and name their folders in a recipe of one document",
        )
    elif recipe.solve is None:
        yield (
            "`--activations` runs the experts on texts of their own, and the recipe names none",
            "write `calibration: texts.jsonl` beside each `model:`, or `--expert FOLDER=texts.jsonl` for each, "
            "or `--solve-calibration texts.jsonl` for all",
        )
        if any(part.sliced or part.module for part in recipe.slices):
            yield (
                "`--activations` runs whole models, and the recipe takes layers or modules of them",
                "leave it out: what such a merge keeps is not measured",
            )
        if not recipe.slices[0].base:
            yield (
                "`--activations` compares what each expert adds to a base, and the recipe has no `base_model`",
                "name the model that the experts were tuned from, as `base_model` or with `--base`",
            )


def _planned(ready: Prepared) -> Planned:
    """The event that says what is done; the plan itself has been shown."""
    found = planned(ready, [*ready.plans])
    shown = {key: found.about[key] for key in ("experts", "outputs")}
    phases = tuple(phase for phase in found.phases if phase != "finish")
    return replace(found, title=f"plan: {found.title}", phases=phases, about=shown)


def _activations(ready: Prepared, scratch: Path) -> Activations | None:
    """The base's activations, for AIM: given, from the cache, or measured now. Raises the errors of `merge`."""
    calibration, run = ready.calibration, ready.run
    if calibration is None:
        return None
    if isinstance(calibration, GivenActivations):
        activations = calibration.activations
    else:
        activations = calibration.activations(run, scratch, None, use_cache=run.options.use_cache)
        calibration.tell_unseen(activations, run.emit)
    check_measured(ready, activations)
    return activations


def _without(told: Collection[Event], emit: Emit) -> Emit:
    """An Emit that leaves out notices that were told before."""

    def new(event: Event) -> None:
        if not (isinstance(event, Notice) and event in told):
            emit(event)

    return new
