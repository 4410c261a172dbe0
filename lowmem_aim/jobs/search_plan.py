"""The plan of a search: trials, ranges, readings of the inputs, disk, memory and time; nothing is done.

Nobody knows what a search will try. So a few merges from the ends of its ranges stand for all trials: the time of one
is their mean, and the memory is that of the one which needs the most.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lowmem_aim.events import Emit, silent
from lowmem_aim.jobs.forecast import Forecast, times_of_merge
from lowmem_aim.jobs.headers import Headers
from lowmem_aim.jobs.searched import Searched, checked_search
from lowmem_aim.jobs.sweep_plan import SweepTime, evaluation, experts_left, time_of
from lowmem_aim.jobs.swept import MOST_RECOMMENDED, largest
from lowmem_aim.output.sweep_folder import scored_trials
from lowmem_aim.system.options import DEFAULTS, Options

SCHEMA = 1  # of `sweep --search --plan --json`


@dataclass(frozen=True)
class SearchPlan:
    """The plan of a search: all that it would do and need."""

    trials: int  # that are asked for
    finished: int  # of these, by earlier runs
    space: Mapping[str, Any]  # methods with their parameters, and omega: what is chosen from
    objectives: Sequence[str]  # tasks; (): the hypervolume gain
    experts: Sequence[str]  # that are scored first
    tasks: Sequence[str]
    merged: int  # merges that are left, at most
    judges: int  # of these, merges that the recommended ones are compared with
    read_bytes: int  # of the inputs, for all merges
    disk_bytes: int  # the most bytes of merged models at a time, of each process
    merges: Forecast | None  # of all that are left, one after another
    time: SweepTime

    def as_json(self) -> dict[str, Any]:
        """The plan as JSON values, as `sweep --search --plan --json` prints it."""
        merges = self.merges.as_json() if self.merges else None
        return {"search_plan": SCHEMA, **asdict(self), "merges": merges, "time": self.time.as_json()}


def plan_search(searched: Searched, out: Path, options: Options = DEFAULTS, emit: Emit = silent) -> SearchPlan:
    """Find out what `search` with the same arguments would do and need. Raises what it would raise before work."""
    begun, swept = time.perf_counter(), replace(searched.swept, trials=searched.trials)
    with contextlib.ExitStack() as stack:
        hub = Headers(stack)
        ready = checked_search(searched, out, options, emit, measure=True, find=hub.find)
        start = time.perf_counter() - begun
        finished = 0 if options.fresh else min(scored_trials(out), searched.trials)
        judges = _judges(searched) if finished < searched.trials else 0
        left = searched.trials - finished + judges
        models = left + experts_left(ready, out, options)
        each = evaluation(swept, ready, models, out, options, hub)
    batches = ready.merges.batches
    merges = _of_all(ready.merges.together, len(swept.points), len(batches), left) if left else None
    return SearchPlan(
        searched.trials,
        finished,
        searched.space.as_json(),
        searched.objectives,
        [*ready.experts],
        swept.asked.names,
        left,
        judges,
        left * max((batch.read_bytes for batch in batches), default=0),
        swept.at_once * largest(batches),
        merges,
        time_of(merges, start, models, each),
    )


def _judges(searched: Searched) -> int:
    """The most merges that recommended ones are compared with: of each the unrelaxed one, and its control."""
    relaxed = any(point.recipe.relaxed for point in searched.swept.points)
    with_aim = any(point.recipe.aim is not None for point in searched.swept.points)
    return min(MOST_RECOMMENDED, searched.trials) * (relaxed + (with_aim and searched.controls))


def _of_all(samples: Forecast | None, count: int, readings: int, merges: int) -> Forecast | None:
    """The forecast of so many merges, from that of `count` samples, which read the inputs so many times."""
    if samples is None:
        return None
    share = merges / count  # activations are measured once, whatever the number of merges
    steps = (times_of_merge(step, read=merges / max(readings, 1), others=share) for step in samples.steps)
    return replace(samples, steps=tuple(steps))
