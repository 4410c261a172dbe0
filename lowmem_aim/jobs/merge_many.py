"""The merges by several recipes of the same models, whose inputs are read once for all of them where that is possible.

Each output is what `merge` makes of its recipe alone, byte for byte, and may be resumed by `merge`. Which recipes share
a reading: `recipe.readings`. A merge of many is the five steps of one, for each reading: all are prepared before any is
agreed on; activations are measured before anything is merged, so that they are kept beside every output.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from lowmem_aim.errors import DiskError, LowmemAimError, UsageError, noted, printable, raise_all
from lowmem_aim.events import Emit, Event, Notice, Planned, of_stage
from lowmem_aim.jobs.held import HeldOutput, agreed, holding, planned, planned_in_all
from lowmem_aim.jobs.merge import calibrated, finish, merge_outputs
from lowmem_aim.jobs.preparation import of_some, prepared
from lowmem_aim.jobs.prepared import Prepared
from lowmem_aim.models.opening import FETCHED, Finder
from lowmem_aim.output.folder import check_disk
from lowmem_aim.output.workspace import Workspace
from lowmem_aim.recipe.readings import readings
from lowmem_aim.recipe.recipe import Recipe
from lowmem_aim.relaxing.activations import Activations
from lowmem_aim.system.memory import trim
from lowmem_aim.system.options import Options
from lowmem_aim.view.feed import AnyFeed


def merge_many(recipes: Mapping[str, Recipe], out: Path, options: Options, feed: AnyFeed) -> None:
    """Make the folder out/NAME for each recipe, or resume it; the inputs are read once for all of them.

    They are read once for each group of `recipe.readings`. `out` must hold no run of its own. All checks of `merge` are
    made for all recipes before any work, and all problems are raised at once, with the names of the recipes in front if
    they are not of all. Raises the errors of `merge`, and MemoryBudgetError before any work if the budget is too small
    for so many outputs at a time. What is finished when a run fails, or is killed, stays for the next one.
    """
    for notice in dict.fromkeys(notice for recipe in recipes.values() for notice in recipe.notices):
        feed(Notice(notice, "warning"))
    with prepared_together(recipes, out, options, feed, FETCHED) as (together, errors):
        raise_all(errors)
        with contextlib.ExitStack() as stack:
            held = [_Held.of(label, ready, stack) for label, ready in together.items()]
            for reading in held:
                reading.outputs = agreed(reading.ready, reading.spaces)
            if left := [reading for reading in held if reading.outputs]:
                feed.record_in([output.space.private for reading in left for output in reading.outputs])
                feed(_planned(left))
                _make(left)


@contextlib.contextmanager
def prepared_together(
    recipes: Mapping[str, Recipe], out: Path, options: Options, emit: Emit, finder: Finder
) -> Iterator[tuple[dict[str, Prepared], list[LowmemAimError]]]:
    """Prepare a merge for each reading of the models, by its label in events: "" if there is only one.

    Beside them comes everything that is wrong with any. Raises UsageError for recipes that cannot be among several.
    """
    _check(recipes)
    groups, found = readings(recipes), dict[str, Prepared]()
    errors: dict[str, list[LowmemAimError]] = {}
    once = _Once(emit)
    with contextlib.ExitStack() as stack:
        for number, group in enumerate(groups, start=1):
            label, own = f"reading {number}" * (len(groups) > 1), list[LowmemAimError]()
            with noted(own):
                ready = stack.enter_context(prepared(group, out, options, of_stage(once, label), finder))
                found[label] = ready
                own += ready.errors
            errors |= dict.fromkeys(group, own)
        told = of_some(errors)
        if not any(isinstance(error, DiskError) for error in told):
            with noted(told):
                check_disk(out, sum(ready.bytes_to_write() for ready in found.values()), "all outputs together")
        yield found, told


def _check(recipes: Mapping[str, Recipe]) -> None:
    wrong: dict[str, list[LowmemAimError]] = {}
    for name, recipe in recipes.items():
        wrong[name] = []
        if not name or Path(name).name != name:
            wrong[name].append(UsageError(f"`{printable(name)}` is no name of a folder", "name each merge in a word"))
        if recipe.stages:
            hint = "merge the stages first, and name their folders in the recipe"
            wrong[name].append(UsageError("a recipe with named stages cannot be one of several merges", hint))
        if recipe.aim and recipe.aim.omegas:
            hint = "give a recipe for each of them"
            wrong[name].append(UsageError("a recipe with several omegas cannot be one of several merges", hint))
    raise_all(of_some(wrong))


class _Once:
    """An Emit that passes on each notice once: what one reading tells of the models, the others would tell again."""

    def __init__(self, emit: Emit) -> None:
        self._emit = emit
        self._told: set[Event] = set()

    def __call__(self, event: Event) -> None:
        if isinstance(event, Notice):
            if event in self._told:
                return
            self._told.add(event)
        self._emit(event)


@dataclass
class _Held:
    """One reading of the models, and the outputs that are made of it, while this run holds their folders."""

    label: str
    ready: Prepared
    spaces: dict[str, Workspace]
    folders: contextlib.ExitStack  # closed when the outputs are made
    outputs: Sequence[HeldOutput] = field(default_factory=list)  # those that are left

    @classmethod
    def of(cls, label: str, ready: Prepared, stack: contextlib.ExitStack) -> _Held:
        """Hold the folders; they are released with `stack` at the latest. Raises LockedError, DiskError, UsageError."""
        folders = stack.enter_context(contextlib.ExitStack())
        spaces = folders.enter_context(holding(ready.out, ready.plans, fresh=ready.options.fresh))
        return cls(label, ready, spaces, folders)


def _planned(held: Sequence[_Held]) -> Planned:
    """The event that says what the readings do, each as a stage of the run if there are several."""
    parts = {reading.label: planned(reading.ready, [output.name for output in reading.outputs]) for reading in held}
    label, last = parts.popitem()
    if not label:
        return last
    whole = planned_in_all(parts, last)
    return replace(whole, phases=(), stages=(*whole.stages, *((label, phase) for phase in last.phases)))


def _make(held: Sequence[_Held]) -> None:
    """Make all outputs, reading after reading. Raises the errors of `merge`."""
    measured: dict[str, Activations] = {}
    activations = [calibrated(reading.ready, reading.outputs, measured) for reading in held]
    for reading, own in zip(held, activations, strict=True):
        merged = merge_outputs(reading.ready, reading.outputs, own)
        finish(reading.ready, reading.outputs, own, merged)
        reading.folders.close()  # finished for good, whatever becomes of the next
        trim()
