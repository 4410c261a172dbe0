"""The jobs as functions for scripts and notebooks: what `import lowmem_aim` offers.

Every function raises the errors of `lowmem_aim.errors`, prints nothing, and leaves signals alone. `on_event` is called
with each event of `lowmem_aim.events`, from any thread of the run; an exception that it raises ends the run, which can
then be resumed like any other. In one process, jobs that are called from several threads run one after another. A run
that is interrupted (KeyboardInterrupt too) is resumed by the same call.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from lowmem_aim.errors import RecipeError, UsageError, printable
from lowmem_aim.events import Emit, Event, silent
from lowmem_aim.jobs import calibrate as calibrate_job
from lowmem_aim.jobs import compare as compare_job
from lowmem_aim.jobs import evaluate as evaluate_job
from lowmem_aim.jobs import merge as merge_job
from lowmem_aim.jobs import plan as plan_job
from lowmem_aim.jobs import unwritten
from lowmem_aim.jobs.asked import asked_for
from lowmem_aim.jobs.forecast import Forecast
from lowmem_aim.jobs.preparation import sound_recipe
from lowmem_aim.jobs.swept import Swept
from lowmem_aim.output.verify import verify_outputs
from lowmem_aim.recipe import reader
from lowmem_aim.recipe.points import Grid, points_of
from lowmem_aim.recipe.recipe import Recipe
from lowmem_aim.recipe.yaml_tree import Node, load_tree, one_of, parse, tree_of
from lowmem_aim.system.on_demand import torch
from lowmem_aim.system.options import DEFAULTS, Options

OnEvent = Callable[[Event], None]
Written = str | Path | Mapping[str, Any] | Sequence[Mapping[str, Any]]
AnyRecipe = Recipe | Written


def read_recipe(recipe: Written) -> Recipe:
    """Read a recipe: the path of a YAML file, YAML text with a line break, or its keys and values as a mapping.

    A list of mappings is a recipe of several documents, with named stages (see docs/recipe.md).

    Relative paths start at the current folder, and those of a file that lead nowhere there at the file's own folder.
    Raises RecipeError with every problem, each with its line and column, or, of a mapping, with its key.
    """
    return reader.read_recipe(_tree(recipe))


def merge(recipe: AnyRecipe, out: str | Path, options: Options = DEFAULTS, on_event: OnEvent | None = None) -> Path:
    """Merge by a recipe into the new folder `out`, or resume a run that was interrupted there; returns `out`.

    `recipe` is a Recipe, or what `read_recipe` reads. A finished output of the same job is left
    as it is. Raises RecipeError, UsageError, ModelError, DiskError, MemoryBudgetError, LockedError, ResumeError and
    NetworkError, before any work where that is possible; what was finished before an error stays for the next call.
    """
    with _alone():
        return merge_job.merge(_read(recipe, _path(out), options), _path(out), options, _emit(on_event))


def relax(
    merged: str | Path,
    base: str | Path,
    out: str | Path,
    *,
    aim: Mapping[str, Any] | None = None,
    acm: Mapping[str, Any] | None = None,
    options: Options = DEFAULTS,
    on_event: OnEvent | None = None,
) -> Path:
    """Apply AIM, ACM, or ACM after AIM, to a model that any tool has merged; write the new folder `out`, returned.

    `merged` and `base` are model folders or Hub ids. `aim` and `acm` hold the keys of these tables in a recipe; an
    empty mapping means the authors' defaults, and without either it is AIM by these. Raises the errors of `merge`.
    """
    if aim is None and acm is None:
        aim = {}
    table: dict[str, Any] = {
        "merge_method": "passthrough",
        "base_model": str(base),
        "models": [{"model": str(merged)}],
    }
    table |= {key: value for key, value in (("aim", aim), ("acm", acm)) if value is not None}
    return merge(table, out, options, on_event)


def calibrate(
    base: str | Path,
    out: str | Path,
    settings: Mapping[str, Any] | None = None,
    *,
    options: Options = DEFAULTS,
    on_event: OnEvent | None = None,
) -> Path:
    """Measure the activations of a base model into the new file `out` (.safetensors); returns `out`.

    `settings` holds the keys of a recipe's `aim` table that say what is measured: `calibration`, `samples`,
    `block_size`, `seed`, `pack`, `dtype`. Merges take the file as their `calibration`. Raises the errors of `merge`.
    """
    aim = reader.read_aim(tree_of(settings or {}, "settings"))
    with _alone():
        return calibrate_job.calibrate(str(base), aim, _path(out), options, _emit(on_event))


def plan(
    recipe: AnyRecipe,
    out: str | Path,
    options: Options = DEFAULTS,
    on_event: OnEvent | None = None,
    *,
    measure: bool = True,
    activations: bool = False,
) -> Forecast:
    """Return what `merge` with the same arguments would do, what it needs here, and every problem that it would meet.

    Nothing is merged and nothing is downloaded but headers. `measure`: spend two seconds on an estimate of the time.
    `activations`: if the merge would run, compute it from whole models without writing it, to find what it would keep
    of each expert on its own texts (`Forecast.effects`). Raises the errors of models that cannot be opened, UsageError
    for `activations` without such texts, and then the errors of `merge`; all else is among `Forecast.problems`.
    """
    with _alone():
        found = _read(recipe, _path(out), options)
        if activations:
            unwritten.check_texts(found, _path(out), options)
        told: list[Event] = []

        def emit(event: Event) -> None:
            told.append(event)
            _emit(on_event)(event)

        forecast = plan_job.plan(found, _path(out), options, emit, measure=measure)
        if activations and forecast.fits:
            effects = unwritten.effects(found, _path(out), options, _emit(on_event), told=told)
            forecast = replace(forecast, effects=effects)
        return forecast


def verify(out: str | Path, on_event: OnEvent | None = None) -> Path:
    """Read every file of a finished output again and compare it with what was written; returns `out`.

    Raises VerifyError naming all files that differ, UsageError if there is no finished output.
    """
    return verify_outputs(_path(out), _emit(on_event))


def evaluate(
    model: str | Path,
    tasks: Sequence[str],
    out: str | Path,
    settings: Mapping[str, Any] | None = None,
    *,
    options: Options = DEFAULTS,
    on_event: OnEvent | None = None,
) -> Path:
    """Score a model on tasks of lm-evaluation-harness, into the new file `out` (.json); returns `out`.

    `model` is a model folder or Hub id. `settings` holds the flags of `lowmem-aim evaluate` that say how: `limit`,
    `num_fewshot`, `include_path` (a list), `metric` (a mapping), `dtype`, ... Raises the errors of `merge`.
    """
    asked, forwards = asked_for(tasks, settings or {})
    with _alone():
        return evaluate_job.evaluate(str(model), asked, _path(out), forwards, options, _emit(on_event))


def compare(
    scores: Sequence[str | Path],
    against: Sequence[str | Path] = (),
    out: str | Path | None = None,
    *,
    tasks: Sequence[str] = (),
    pairs: Sequence[str] = (),
    sort: str = "family",
    force: bool = False,
) -> dict[str, Any]:
    """Compare models by their files of scores; return the population and the models, as `compare --json` prints them.

    The hypervolume gain is that over the models of `against`. `out`: a new folder for the report; `tasks`: those to
    compare; `pairs` of tasks, such as `gsm8k,humaneval`, to draw; `force`: compare even what was evaluated otherwise.
    Raises UsageError, with all that forbids it, and DiskError.
    """
    report = None if out is None else _path(out)
    files, others = list(map(_path, scores)), list(map(_path, against))
    from lowmem_aim.evaluating.report import as_json

    found, _ = compare_job.compare(files, others, report, tasks=tasks, pairs=pairs, sort=sort, force=force)
    return as_json(found)


def sweep(
    recipe: Written,
    out: str | Path,
    tasks: Sequence[str],
    settings: Mapping[str, Any] | None = None,
    *,
    methods: Sequence[str] = (),
    omegas: Sequence[float] = (),
    parameters: Mapping[str, Sequence[float]] | None = None,
    controls: bool = True,
    keep: Literal["best", "all", "none"] = "best",
    disk: int | None = None,
    options: Options = DEFAULTS,
    on_event: OnEvent | None = None,
) -> dict[str, Any]:
    """Merge by a recipe in many ways into the new folder `out`, score and compare all, or go on with such a sweep.

    The points are all combinations of `methods`, `omegas` and the values of `parameters`; those that are not given are
    the recipe's. `tasks` and `settings` are those of `evaluate`, `keep` and `disk` (bytes) those of `lowmem-aim sweep`.
    Returns the population and the models as `compare` does, and under `recommended` the names of the two best. Raises
    the errors of `merge` and `evaluate`.
    """
    asked, forwards = asked_for(tasks, settings or {})
    texts = [f"{name}={','.join(map(str, values))}" for name, values in (parameters or {}).items()]
    grid = Grid(methods, texts, ",".join(map(str, omegas)) or None, controls)
    swept = Swept(points_of(_tree(recipe), grid), asked, forwards, keep, disk)
    from lowmem_aim.evaluating.report import as_json
    from lowmem_aim.jobs.sweep import sweep as run_sweep

    with _alone():
        found = run_sweep(swept, _path(out), options, _emit(on_event))
    return {**as_json(found.comparison), "recommended": dict(found.recommended)}


def _path(out: str | Path) -> Path:
    """The path of an output. Raises UsageError for a name that no system takes, which a command line cannot hold."""
    if "\0" in str(out):
        raise UsageError(f"the output `{printable(str(out))}` holds a NUL character", hint="choose another name")
    return Path(out)


def _read(recipe: AnyRecipe, out: Path, options: Options) -> Recipe:
    return recipe if isinstance(recipe, Recipe) else sound_recipe(_tree(recipe), out, options)


def _tree(recipe: Written) -> Node:
    if isinstance(recipe, Mapping):
        return tree_of(recipe, "recipe")
    if isinstance(recipe, str | Path):
        return parse(recipe, "recipe") if isinstance(recipe, str) and "\n" in recipe else load_tree(Path(recipe))
    if not recipe:
        raise RecipeError("recipe: there is no document in the list")
    return one_of([tree_of(document, f"recipe[{place}]") for place, document in enumerate(recipe)])


def _emit(on_event: OnEvent | None) -> Emit:
    return silent if on_event is None else on_event


_ONE_AT_A_TIME = threading.RLock()


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Run the jobs of one process one after another, and give torch back the number of threads that it had.

    Jobs set torch's threads, and measure the memory of the whole process: two at a time would disturb each other.
    """
    with _ONE_AT_A_TIME:
        before = torch.get_num_threads()
        try:
            yield
        finally:
            torch.set_num_threads(before)
