"""All that a merge finds out and checks before it works. `merge` and `plan` prepare here, with the same checks.

All checks are made, so that the user hears of all problems at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from lowmem_aim.errors import LowmemAimError, noted, printable, raise_all
from lowmem_aim.events import Notice
from lowmem_aim.jobs.checks import CHECKS, OF_THE_IDENTITY, check_there
from lowmem_aim.jobs.prepared import FETCHED, Prepared, Sources
from lowmem_aim.methods import kernels
from lowmem_aim.models.opening import open_inputs
from lowmem_aim.models.reader import Reader
from lowmem_aim.output.folder import check_outputs, check_writable, existing_folder, is_finished
from lowmem_aim.planning.layout import make_plan
from lowmem_aim.recipe.recipe import Recipe, one_by_one
from lowmem_aim.system.run import Run


@contextlib.contextmanager
def prepared(recipe: Recipe, out: Path, run: Run, sources: Sources = FETCHED) -> Iterator[Prepared]:
    """Open, plan and check everything; the errors of single checks are kept in the result.

    Raises the errors of models that cannot be opened or planned, together with all that can be checked without them.
    """
    _tell_of_loops(run)
    recipes = one_by_one(recipe)
    folders = [out / name for name in recipes]
    errors: list[LowmemAimError] = []
    with noted(errors):
        check_outputs(out, folders, [])
        if not all(map(is_finished, folders)):
            check_writable(existing_folder(out))
    if errors and sources.fetches:
        raise_all(errors)  # nothing is downloaded for an output that cannot be made
    options = run.options
    with contextlib.ExitStack() as stack:
        reader = stack.enter_context(Reader(options.use_cache))
        try:
            inputs = stack.enter_context(
                open_inputs(
                    recipe,
                    options.read,
                    run.emit,
                    reader,
                    find=sources.find,
                    has_weights=sources.has_weights,
                )
            )
            plans = {
                name: make_plan(
                    one, inputs, seed=options.seed, shard_bytes=options.shard_bytes, nonfinite=options.nonfinite
                )
                for name, one in recipes.items()
            }
        except LowmemAimError as error:
            errors.append(error)
            for calibration in [table.calibration for table in (recipe.aim, recipe.acm) if table]:
                with noted(errors):
                    check_there(recipe, calibration)
            raise_all(errors)
            raise
        ready = Prepared(recipe, out, run, sources, reader, inputs, plans, errors, notes=list(_local_names(recipe)))
        for check in CHECKS:
            known = len(errors)
            with noted(errors):
                check(ready)
            ready.incomplete |= len(errors) > known and check in OF_THE_IDENTITY
        reader.close()
        yield ready


def _tell_of_loops(run: Run) -> None:
    """Emit a notice if the compiled loops are not used, or cannot be kept for the next run."""
    if run.device.type != "cpu":
        return
    if why := kernels.unavailable():
        run.emit(Notice(f"compiled loops are not used ({why}): torch does the same, several times slower"))
    elif trouble := kernels.cache_trouble():
        run.emit(Notice(f"compiled loops cannot be kept, and every run compiles them again: {trouble}", "warning"))


def _local_names(recipe: Recipe) -> Iterator[str]:
    if recipe.preferred:
        names = ", ".join(f"`{printable(path)}`" for path in recipe.preferred)
        yield f"found on this machine, so the Hub is not asked for these names: {names}"
