"""A forecast of the merges by several recipes, found without making them: above all, how often their models are read.

They are checked as `merge_many` checks them, but for space: outputs that do not fit the disk or the memory together are
divided among several passes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from lowmem_aim.errors import raise_all
from lowmem_aim.events import Emit, Notice, silent
from lowmem_aim.jobs.forecast import Forecast, ForecastOfMany, Pass, Requirement, in_passes, read_more_often
from lowmem_aim.jobs.headers import Headers
from lowmem_aim.jobs.merge_many import prepared_together
from lowmem_aim.jobs.plan import Estimate, noting
from lowmem_aim.jobs.prepared import Prepared
from lowmem_aim.merging.shares import Needs
from lowmem_aim.models.opening import Finder
from lowmem_aim.output.folder import SMALL_FILES_BYTES
from lowmem_aim.recipe.recipe import Recipe
from lowmem_aim.system.memory import enough
from lowmem_aim.system.options import DEFAULTS, Options
from lowmem_aim.units import shown


def plan_many(
    recipes: Mapping[str, Recipe],
    out: Path,
    options: Options = DEFAULTS,
    emit: Emit = silent,
    *,
    disk: int | None = None,
    measure: bool = True,
) -> ForecastOfMany:
    """Forecast the merges by at least one recipe, made by one `merge_many` for each of the passes that it tells.

    `disk` is the most bytes of outputs that lie on the disk at a time, unless a single one has more; without it all
    stay. `measure`: also how long it would take. Raises the errors of models that cannot be opened, and of options that
    cannot be used here; every other problem is among the forecast's.
    """
    warnings: list[str] = []
    told = noting(emit, warnings)
    for notice in dict.fromkeys(notice for recipe in recipes.values() for notice in recipe.notices):
        told(Notice(notice, "warning"))
    with contextlib.ExitStack() as stack:
        hub = Headers(stack)
        finder = Finder(hub.find, has_weights=lambda folder: not hub.stands_in(folder), fetches=False)
        together = prepared_together(recipes, out, options, told, finder, together=disk is None)
        found, errors = stack.enter_context(together)
        if not found:
            raise_all(errors)
        passes, forecasts = list[Pass](), list[Forecast]()
        for reading in found:
            known = len(reading.ready.errors)
            forecast = Estimate(reading.ready, hub).forecast(measure and not errors)
            errors += reading.ready.errors[known:]
            own = [*_passes(reading.ready, forecast, disk)]
            passes += own
            forecasts.append(_read_by_each(forecast, len(own)))
        whole = replace(in_passes(forecasts, errors), warnings=tuple(dict.fromkeys(warnings)))
        if disk is None:
            written = sum(reading.ready.bytes_to_write() for reading in found)
        else:
            written = max((sum(one.output_bytes.values()) for one in passes), default=0)
        return ForecastOfMany(tuple(passes), _with_disk(whole, written))


def _passes(ready: Prepared, forecast: Forecast, disk: int | None) -> Iterator[Pass]:
    """Divide the outputs that are left among passes that fit disk and memory, in their order."""
    small = sum(map(len, ready.copied.values()))
    sizes = {name: ready.plans[name].output_bytes + small for name in ready.unfinished()}
    batch: dict[str, int] = {}
    for name, nbytes in sizes.items():
        grown = {**batch, name: nbytes}
        if batch and disk is not None and not (sum(grown.values()) <= disk and _fit_memory(ready, [*grown])):
            yield Pass(forecast.survey["read_bytes"], batch)
            grown = {name: nbytes}
        batch = grown
    if batch:
        yield Pass(forecast.survey["read_bytes"], batch)


def _with_disk(whole: Forecast, written: int) -> Forecast:
    """The forecast with the need of disk space for `written` bytes of outputs that lie there at a time."""

    def all_of(need: Requirement) -> Requirement:
        why = f"outputs at a time {shown(written)}; of the largest: {need.why}"
        return replace(need, least=max(need.least, written + SMALL_FILES_BYTES), why=why)

    return replace(whole, needs=tuple(all_of(need) if need.what == "disk" else need for need in whole.needs))


def _fit_memory(ready: Prepared, names: list[str]) -> bool:
    """Whether the memory is enough to make these outputs at the same time."""
    run = ready.run
    needs = Needs.of([ready.plans[name] for name in names], ready.inputs, run.device)
    fits = enough(run.budget.ram_used(), needs.least_ram(run.budget.vram is None)) <= run.budget.ram
    return fits and (run.budget.vram is None or enough(0, needs.least_vram()) <= run.budget.vram)


def _read_by_each(forecast: Forecast, passes: int) -> Forecast:
    """The forecast of one pass as that of several, each of which reads everything."""

    return read_more_often(forecast, max(passes, 1))
