"""What a sweep is asked to do, and all that is checked of it before work."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lowmem_aim.errors import LowmemAimError, UsageError, noted, raise_all
from lowmem_aim.evaluating import tasks
from lowmem_aim.evaluating.tasks import Asked, Loaded
from lowmem_aim.events import Emit
from lowmem_aim.jobs.evaluate import Forwards, check
from lowmem_aim.jobs.merge_many import ManyForecast, plan_many
from lowmem_aim.output.folder import existing_folder
from lowmem_aim.output.sweep_folder import MODELS, check_sweep_folder
from lowmem_aim.recipe.points import Point
from lowmem_aim.recipe.references import same_reference
from lowmem_aim.system.options import Options, wrong_options

Keep = Literal["best", "all", "none"]
OfTasks = Callable[[Loaded], Iterator[LowmemAimError]]
NEEDED = ("moocore", "matplotlib")  # packages of the extra `report`


@dataclass(frozen=True)
class Swept:
    """The merges of a sweep, and how they are scored."""

    points: Sequence[Point]
    asked: Asked
    forwards: Forwards = field(default_factory=Forwards)
    keep: Keep = "best"  # which merged models stay: the recommended ones, all, or none
    disk: int | None = None  # bytes of merged models at a time; None: half of what is free
    ray: str = ""  # the address of a Ray cluster whose workers make the points, or `local`; "": this process does

    @property
    def experts(self) -> list[str]:
        """The references of the models that are merged, each once, without the base."""
        base = self.points[0].recipe.base
        found = dict.fromkeys(model.reference for point in self.points for model in point.recipe.models)
        return [name for name in found if base is None or not same_reference(name, base)]


def checked(
    swept: Swept, out: Path, options: Options, emit: Emit, of_tasks: OfTasks = lambda loaded: iter(())
) -> tuple[dict[str, str], ManyForecast]:
    """Make all checks before work. Returns (name -> reference of each expert, the forecast of the merges).

    `of_tasks` makes further checks of the tasks. Raises every error that there is, at once.
    """
    errors: list[LowmemAimError] = [*_of_the_machine(swept, options)]
    with noted(errors):
        check_sweep_folder(out)
    loaded = None
    if not errors:
        tasks.quiet()
        with noted(errors):
            loaded = tasks.loaded(swept.asked)
            errors += of_tasks(loaded)
    forecast = None
    with noted(errors):
        recipes = {point.name: point.recipe for point in swept.points}
        forecast = plan_many(recipes, out / MODELS, options, emit, measure=False)
        if forecast.problems:
            raise forecast.error()
    experts: dict[str, str] = {}
    for reference in swept.experts if not errors else ():
        with noted(errors):
            assert loaded is not None
            aside = _unused_file(existing_folder(out) / f"{out.name}.json")
            label = check(reference, swept.asked, loaded, aside, swept.forwards, options)
            experts[_unused_name(label, experts)] = reference
    raise_all(errors)
    assert forecast is not None
    return experts, forecast


def _of_the_machine(swept: Swept, options: Options) -> Iterator[LowmemAimError]:
    if problems := list(wrong_options(options)):
        yield UsageError(problems, hint="docs/python.md has the options")
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        yield UsageError(f"`sweep` needs {' and '.join(missing)}", "`pip install 'lowmem-aim[eval,report]'`")
    if swept.ray and importlib.util.find_spec("ray") is None:
        yield UsageError("`sweep --ray` needs Ray, which is not installed", "`pip install 'lowmem-aim[ray]'`")
    yield from tasks.missing_harness()
    yield from tasks.wrong_requests(swept.asked)


def _unused_file(file: Path) -> Path:
    """A name like that of `file` that nothing has."""
    while os.path.lexists(file):
        file = file.with_name(f"_{file.name}")
    return file


def _unused_name(label: str, known: Collection[str]) -> str:
    """A model's label as the name of a file, with a number if another model has that name."""
    name = label.replace("/", "--").replace("\\", "--")
    number = 1 + sum(other.rpartition("#")[0] == name or other == name for other in known)
    return name if number == 1 else f"{name}#{number}"
