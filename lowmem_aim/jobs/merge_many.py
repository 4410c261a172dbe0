"""The merges by several recipes of the same models, whose inputs are read once for all of them where that is possible.

Each output is what `merge` makes of its recipe alone, byte for byte, and may be resumed by `merge`. Which recipes share
a reading: `recipe.readings`. A merge of many is the five steps of one, for each reading: all are prepared before any is
agreed on; activations are measured before anything is merged, so that they are kept beside every output.
"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from lowmem_aim.errors import DiskError, LowmemAimError, UsageError, noted, of_some, printable, raise_all
from lowmem_aim.events import Emit, Event, Notice, Planned, of_stage
from lowmem_aim.jobs.held import HeldOutput, agreed, holding, planned, planned_in_all
from lowmem_aim.jobs.merge import calibrated, finish, merge_outputs
from lowmem_aim.jobs.preparation import prepared
from lowmem_aim.jobs.prepared import Prepared
from lowmem_aim.models.opening import FETCHED, Finder
from lowmem_aim.output.folder import check_disk
from lowmem_aim.output.workspace import Workspace
from lowmem_aim.planning.survey import all_told
from lowmem_aim.recipe.readings import measured_for, readings
from lowmem_aim.recipe.recipe import Recipe
from lowmem_aim.relaxing.activations import Activations
from lowmem_aim.system.memory import trim
from lowmem_aim.system.options import Options
from lowmem_aim.view.feed import AnyFeed


def merge_many(recipes: Mapping[str, Recipe], out: Path, options: Options, feed: AnyFeed) -> None:
    """Make the folder out/NAME for each recipe, or resume it; the inputs are read once for all of them.

    They are read once for each group of `recipe.readings`. `out` must hold no run of its own; events are recorded
    beside each output, unless the feed records them elsewhere already. All checks of `merge` are made for all recipes
    before any work, and all problems are raised at once, with the names of the recipes in front if they are not of all.
    Raises the errors of `merge`, and MemoryBudgetError before any work if the budget is too small for so many outputs
    at a time. What is finished when a run fails, or is killed, stays for the next one.
    """
    for notice in dict.fromkeys(notice for recipe in recipes.values() for notice in recipe.notices):
        feed(Notice(notice, "warning"))
    with prepared_together(recipes, out, options, feed) as (found, errors):
        raise_all(errors)
        for reading in found:
            reading.hold()
        for reading in found:
            reading.outputs = agreed(reading.ready, reading.spaces)
        if left := [reading for reading in found if reading.outputs]:
            if not feed.recorded:
                feed.record_in([output.space.private for reading in left for output in reading.outputs])
            feed(_planned(left))
            _make(left)


@contextlib.contextmanager
def prepared_together(
    recipes: Mapping[str, Recipe],
    out: Path,
    options: Options,
    emit: Emit,
    finder: Finder = FETCHED,
    *,
    together: bool = True,
) -> Iterator[tuple[list[Reading], list[LowmemAimError]]]:
    """Prepare a merge for each reading of the models; beside them comes everything that is wrong with any.

    Unless all outputs are made `together`, it is enough if each has the memory and the disk to itself. Raises
    UsageError for recipes that cannot be among several.
    """
    _check(recipes)
    found, errors, told = list[Reading](), dict[str, list[LowmemAimError]](), set[Event]()
    with contextlib.ExitStack() as stack:
        for group in readings(recipes):
            labelled, own = _Labelled(emit, told), list[LowmemAimError]()
            with noted(own):
                ready = stack.enter_context(prepared(group, out, options, labelled, finder, together=together))
                found.append(Reading(ready, labelled, stack.enter_context(contextlib.ExitStack())))
                own += ready.errors
            errors |= dict.fromkeys(group, own)
        _measure_once([reading.ready for reading in found])
        listed = of_some(errors)
        if together and not any(isinstance(error, DiskError) for error in listed):
            with noted(listed):
                check_disk(out, sum(one.ready.bytes_to_write() for one in found), "all outputs together")
        yield found, listed


def _measure_once(all_ready: Sequence[Prepared]) -> None:
    """Leave out the calibrations that an earlier reading makes already."""
    made: set[tuple[str | None, Hashable]] = set()
    for ready in all_ready:
        what = {(ready.recipe.base, measured_for(aim)) for aim in ready.aims}
        if what & made:
            ready.model_runs = [model_run for model_run in ready.model_runs if model_run.phase != "calibrate"]
        made |= what


def _check(recipes: Mapping[str, Recipe]) -> None:
    wrong: dict[str, list[LowmemAimError]] = {}
    for name, recipe in recipes.items():
        own = wrong[name] = []
        if Path(name).name != name or name.startswith("."):
            own.append(UsageError(f"`{printable(name)}` is no name of a folder", "name each merge in a word"))
        if recipe.stages:
            hint = "merge the stages first, and name their folders in the recipe"
            own.append(UsageError("a recipe with named stages cannot be one of several merges", hint))
        if recipe.aim and recipe.aim.omegas:
            hint = "give a recipe for each of them"
            own.append(UsageError("a recipe with several omegas cannot be one of several merges", hint))
    raise_all(of_some(wrong))


class _Labelled:
    """An Emit that passes on the phases of a reading as those of a stage of the run, and each notice once.

    What one reading tells of the models, the others would tell again: all have the same set of what was told.
    """

    def __init__(self, emit: Emit, told: set[Event]) -> None:
        self._emit, self._told = emit, told
        self.label = ""  # of the stage; "": the last of the run

    def __call__(self, event: Event) -> None:
        if isinstance(event, Notice):
            if event in self._told:
                return
            self._told.add(event)
        of_stage(self._emit, self.label)(event)


@dataclass
class Reading:
    """One reading of the models: a prepared merge, and the outputs that it makes while this run holds their folders."""

    ready: Prepared
    emit: _Labelled
    folders: contextlib.ExitStack  # closed when the outputs are made
    spaces: Mapping[str, Workspace] = field(default_factory=dict)
    outputs: Sequence[HeldOutput] = ()  # those that are left

    def hold(self) -> None:
        """Hold the output folders. Raises LockedError, DiskError, UsageError."""
        ready = self.ready
        self.spaces = self.folders.enter_context(holding(ready.out, ready.plans, fresh=ready.options.fresh))


def _planned(left: Sequence[Reading]) -> Planned:
    """The event that says what the readings do, all but the last as stages of the run."""
    for number, reading in enumerate(left[:-1], start=1):
        reading.emit.label = f"reading {number}"
    *parts, last = [planned(one.ready, [output.name for output in one.outputs]) for one in left]
    if not parts:
        return last
    whole = planned_in_all({one.emit.label: part for one, part in zip(left, parts, strict=False)}, last)
    return replace(whole, title=all_told([output.plan.recipe.title for one in left for output in one.outputs]))


def _make(left: Sequence[Reading]) -> None:
    """Make all outputs, reading after reading. Raises the errors of `merge`."""
    measured: dict[str, Activations] = {}
    activations = [calibrated(reading.ready, reading.outputs, measured) for reading in left]
    for reading, own in zip(left, activations, strict=True):
        merged = merge_outputs(reading.ready, reading.outputs, own)
        finish(reading.ready, reading.outputs, own, merged)
        reading.folders.close()  # finished for good, whatever becomes of the next
        trim()
