"""The request for a search, and all that is checked of it before work."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lowmem_aim.errors import LowmemAimError, UsageError, did_you_mean, noted, printable, raise_all
from lowmem_aim.evaluating.scores import UNITS
from lowmem_aim.evaluating.tasks import Loaded
from lowmem_aim.events import Emit
from lowmem_aim.jobs.evaluate import Find
from lowmem_aim.jobs.study import missing_optuna
from lowmem_aim.jobs.swept import Checked, Swept, checked
from lowmem_aim.models.hub import locate
from lowmem_aim.recipe.search_space import Space
from lowmem_aim.system.options import Options

GAIN = "HV gain"  # the objective that no task is


@dataclass(frozen=True)
class Searched:
    """A search: how many merges of a space are tried, and by what they are judged."""

    swept: Swept  # how all are scored; its points are samples, by which all is checked
    space: Space
    trials: int  # of all workers together
    objectives: tuple[str, ...] = ()  # tasks; (): the hypervolume gain over the experts
    controls: bool = True  # of the recommended merges

    def identity(self) -> dict[str, Any]:
        """The part of what makes two searches the same that a grid does not have."""
        return {"search": self.space.as_json()}


def checked_search(
    searched: Searched, out: Path, options: Options, emit: Emit, *, measure: bool = False, find: Find = locate
) -> Checked:
    """Make all checks before work; `measure`: also find out how long the merges of the samples would take.

    `find` gives the folder of an expert. Raises every error that there is, at once.
    """
    errors: list[LowmemAimError] = [*missing_optuna()]
    if searched.trials < 1:
        errors.append(UsageError("`--search` needs one trial or more", "such as `--search 20`"))
    if len(set(searched.objectives)) < len(searched.objectives):
        errors.append(UsageError("`--objective` names a task twice", "name each once"))
    options = replace(options, fresh=False)  # the points by which all is checked are never made
    swept = replace(searched.swept, trials=max(searched.trials, 1))
    with noted(errors):
        ready = checked(
            swept,
            out,
            options,
            emit,
            measure=measure,
            of_tasks=lambda loaded: _of_tasks(searched, loaded),
            find=find,
        )
    raise_all(errors)
    return ready


def _of_tasks(searched: Searched, loaded: Loaded) -> Iterator[LowmemAimError]:
    """Yield what is wrong with the objectives, now that the tasks are known."""
    listed = ", ".join(f"`{printable(name)}`" for name in loaded.names)
    for name in searched.objectives:
        if name not in loaded.names:
            near = did_you_mean(name, loaded.names)
            yield UsageError(f"`--objective`: no task `{printable(name)}` is evaluated{near}", f"these are: {listed}")
    metrics = [_metric(searched.swept, loaded, name) for name in loaded.names]
    if not searched.objectives and all(metric in UNITS for metric in metrics):
        text = "no task has a score that is a fraction, so there is no hypervolume gain to search for"
        yield UsageError(text, f"`--objective` names the tasks to search for: {listed}")


def _metric(swept: Swept, loaded: Loaded, name: str) -> str:
    """The metric that a task is scored by; "" for one that is known only once it is scored."""
    task = loaded.tasks["tasks"].get(name)
    first = next(iter(task.aggregation()), "") if task is not None else ""
    return (swept.asked.metric(name) or str(first)).partition(",")[0]
