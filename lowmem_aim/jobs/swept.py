"""The request for a sweep, and all that is checked of it before work."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lowmem_aim.errors import DiskError, LowmemAimError, UsageError, noted, raise_all
from lowmem_aim.evaluating import tasks
from lowmem_aim.evaluating.tasks import Asked, Loaded
from lowmem_aim.events import Emit
from lowmem_aim.jobs.evaluate import Find, Forwards, check
from lowmem_aim.jobs.forecast import Forecast, Pass, read_more_often
from lowmem_aim.jobs.plan_many import plan_many
from lowmem_aim.models.hub import locate
from lowmem_aim.output.folder import existing_folder
from lowmem_aim.output.sweep_folder import MODELS, check_sweep_folder, is_scored
from lowmem_aim.recipe.points import Point
from lowmem_aim.recipe.references import same_reference
from lowmem_aim.system.files import disk_errors
from lowmem_aim.system.options import Options, wrong_options
from lowmem_aim.units import counted, shown

Keep = Literal["best", "all", "none"]
OfTasks = Callable[[Loaded], Iterator[LowmemAimError]]
NEEDED = ("moocore", "matplotlib")  # packages of the extra `report`
MOST_RECOMMENDED = 2  # points
FREE_SHARE = 0.5  # of the disk's free bytes, for merged models


@dataclass(frozen=True)
class Swept:
    """The merges of a sweep, and how they are scored."""

    points: Sequence[Point]
    asked: Asked
    forwards: Forwards = field(default_factory=Forwards)
    keep: Keep = "best"  # which merged models stay: the recommended ones, all, or none
    disk: int | None = None  # bytes of merged models at a time; None: half of what is free
    ray: str = ""  # the address of a Ray cluster whose workers make the points, or `local`; "": this process does
    trials: int = 0  # of a search, whose points are not known yet: `points` are samples of them; 0: no search

    @property
    def count(self) -> int:
        """The number of points."""
        return self.trials or len(self.points)

    @property
    def staying(self) -> int:
        """The merged models that stay beside those that are being scored."""
        return MOST_RECOMMENDED if self.keep == "best" and self.count > MOST_RECOMMENDED else 0

    @property
    def at_once(self) -> int:
        """The merged models that must have room on the disk."""
        return self.count if self.keep == "all" else min(self.staying + 1, self.count)

    def room(self, out: Path) -> int:
        """Bytes of disk for merged models. Raises DiskError."""
        if self.disk is not None:
            return self.disk
        with disk_errors(out):
            return int(shutil.disk_usage(existing_folder(out)).free * FREE_SHARE)

    @property
    def experts(self) -> list[str]:
        """The references of the models that are merged, each once, without the base."""
        base = self.points[0].recipe.base
        found = dict.fromkeys(model.reference for point in self.points for model in point.recipe.models)
        return [name for name in found if base is None or not same_reference(name, base)]


@dataclass(frozen=True)
class Merges:
    """The merges that a sweep has yet to make."""

    batches: Sequence[Pass]  # as many at a time as disk and memory hold
    together: Forecast | None  # None: nothing is left


@dataclass(frozen=True)
class Checked:
    """A sweep that may begin."""

    experts: Mapping[str, str]  # name -> reference
    merges: Merges


def checked(
    swept: Swept,
    out: Path,
    options: Options,
    emit: Emit,
    *,
    measure: bool = False,
    of_tasks: OfTasks | None = None,
    find: Find = locate,
) -> Checked:
    """Make all checks before work; `measure`: also find out how long the merges would take.

    `of_tasks` makes further checks of the tasks; `find` gives the folder of an expert. Raises every error that there
    is, at once.
    """
    errors: list[LowmemAimError] = [*_of_the_machine(swept, options)]
    with noted(errors):
        check_sweep_folder(out)
    loaded, merges = None, Merges((), None)
    if not errors:
        tasks.quiet()
        with noted(errors):
            loaded = tasks.loaded(swept.asked)
            errors += of_tasks(loaded) if of_tasks else ()
    with noted(errors):
        merges = _merges(swept, out, options, emit, measure=measure)
    experts: dict[str, str] = {}
    for reference in swept.experts if not errors else ():
        with noted(errors):
            assert loaded is not None
            label = check(reference, swept.asked, loaded, unused_file(out), swept.forwards, options, find)
            experts[_unused_name(label, experts)] = reference
    raise_all(errors)
    return Checked(experts, merges)


def _merges(swept: Swept, out: Path, options: Options, emit: Emit, *, measure: bool) -> Merges:
    """Plan the merges of the points that are not scored. Raises everything that is wrong with them."""
    # What `--fresh` discards is there until all is checked: the merges are planned as if it were not.
    scored = [] if options.fresh else [point for point in swept.points if is_scored(out, point.name)]
    recipes = {point.name: point.recipe for point in swept.points if point not in scored}
    if not recipes:
        return Merges((), None)
    room, models = swept.room(out), out / (f"{MODELS}.fresh" if options.fresh else MODELS)
    found = plan_many(recipes, models, options, emit, disk=room, measure=measure)
    if found.together.problems:
        raise found.together.error()
    one = largest(found.passes)
    _check_disk(swept, out, one, room)
    in_a_batch = 0 if swept.ray else room - swept.staying * one  # each of Ray's tasks reads for itself
    batches = [batch for whole in found.passes for batch in in_batches(whole, in_a_batch)]
    return Merges(batches, read_more_often(found.together, len(batches) / max(1, len(found.passes))))


def largest(passes: Iterable[Pass]) -> int:
    """Bytes of the largest output of any pass; 0 without passes."""
    return max((nbytes for one in passes for nbytes in one.output_bytes.values()), default=0)


def in_batches(one: Pass, room: int) -> Iterator[Pass]:
    """Divide a pass into several whose outputs take no more than `room` bytes, unless a single one takes more."""
    batch: dict[str, int] = {}
    for name, nbytes in one.output_bytes.items():
        if batch and sum(batch.values()) + nbytes > room:
            yield Pass(one.read_bytes, batch)
            batch = {}
        batch[name] = nbytes
    if batch:
        yield Pass(one.read_bytes, batch)


def _of_the_machine(swept: Swept, options: Options) -> Iterator[LowmemAimError]:
    if problems := list(wrong_options(options)):
        yield UsageError(problems, hint="docs/python.md has the options")
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        yield UsageError(f"`sweep` needs {' and '.join(missing)}", "`pip install 'lowmem-aim[eval,report]'`")
    if swept.ray and importlib.util.find_spec("ray") is None:
        yield UsageError("`sweep --ray` needs Ray, which is not installed", "`pip install 'lowmem-aim[ray]'`")
    yield from tasks.missing_harness()
    yield from tasks.wrong_requests(swept.asked)


def _check_disk(swept: Swept, out: Path, nbytes: int, room: int) -> None:
    """Raise DiskError if there is no room for the models that are there at a time; `nbytes`: of one."""
    if any((out / MODELS).glob("*")):
        return  # an interrupted sweep, whose models take some of it already
    if (least := swept.at_once * nbytes) > room:
        what = "half of what is free" if swept.disk is None else "`--disk`"
        text = f"{counted(swept.at_once, 'merged model')} at a time take {shown(least)}, and {what} is {shown(room)}"
        raise DiskError(text, hint="free some space, give a larger `--disk`, or keep fewer models (`--keep`)")


def unused_file(out: Path) -> Path:
    """A name beside the folder `out` that nothing has, as of a file of scores."""
    file = existing_folder(out) / f"{out.name}.json"
    while os.path.lexists(file):
        file = file.with_name(f"_{file.name}")
    return file


def _unused_name(label: str, known: Collection[str]) -> str:
    """A model's label as the name of a file, with a number if another model has that name."""
    name = label.replace("/", "--").replace("\\", "--")
    number = 1 + sum(other.rpartition("#")[0] == name or other == name for other in known)
    return name if number == 1 else f"{name}#{number}"
