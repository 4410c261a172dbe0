"""lm-evaluation-harness run on a model, and the one number of each task that counts."""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Mapping
from typing import Any

import numpy
import torch

from lowmem_aim.errors import UsageError, printable
from lowmem_aim.evaluating.downloaded_metrics import nothing_downloaded
from lowmem_aim.evaluating.harness_settings import MULTITURN, SYSTEM
from lowmem_aim.evaluating.scores import Score
from lowmem_aim.evaluating.tasks import Asked, Loaded
from lowmem_aim.evaluating.unsafe_tasks import tasks_of

# Draws for the standard error of metrics that have no formula for it; the harness takes minutes for its 100,000.
BOOTSTRAPS = 1000


def scored(model: Any, loaded: Loaded, asked: Asked, unscored: Collection[str] = ()) -> dict[str, Score]:
    """The score of a model, an `LM` of the harness, on each task. Raises UsageError for a metric that a task lacks.

    The tasks of the names in `unscored` are asked for with all others, and keep the answers in their `instances`.
    """
    from lm_eval.api import metrics, task
    from lm_eval.evaluator import evaluate

    metrics.print = lambda *told: None  # stdout is for the result
    task.tqdm = lambda items, **_: items  # a script may have imported tqdm before `quiet` could silence it
    _set_up_all(loaded, asked)
    for name in unscored:
        for one in tasks_of(name, loaded.tasks).values():
            one.apply_filters = _nothing  # the harness scores what the filters have left of the answers
    with nothing_downloaded():
        results = evaluate(
            lm=model,
            task_dict=_without_groups(loaded.tasks, unscored),
            limit=asked.limit,
            apply_chat_template=asked.chat_template,
            system_instruction=asked.settings.get(SYSTEM),
            fewshot_as_multiturn=asked.settings.get(MULTITURN, True),
            log_samples=False,
            bootstrap_iters=BOOTSTRAPS,
            confirm_run_unsafe_code=asked.allow_execution,
        )
    return {name: _score(name, results, asked) for name in loaded.names if name not in unscored}


def _nothing() -> None:
    """Filter no answer."""


def _without_groups(tasks: Mapping[str, Any], unscored: Collection[str]) -> dict[str, Any]:
    """The harness' table without the groups that hold tasks which are not scored."""
    apart = {task for name in unscored for task in tasks_of(name, tasks)}
    groups = {name: group for name, group in tasks["groups"].items() if apart.isdisjoint(tasks_of(name, tasks))}
    return {**tasks, "groups": groups}


def requests_of(model: Any, loaded: Loaded, asked: Asked) -> dict[str, list[Any]]:
    """The requests that `scored` would make of a model, an `LM` of the harness, by their kind. None is answered."""
    from lm_eval.api import task
    from lm_eval.evaluator_utils import get_sample_size

    task.tqdm = lambda items, **_: items
    _set_up_all(loaded, asked)
    found: dict[str, list[Any]] = {}
    with nothing_downloaded():
        for one in loaded.tasks["tasks"].values():
            one.build_all_requests(
                limit=get_sample_size(one, asked.limit),
                rank=0,
                world_size=1,
                system_instruction=asked.settings.get(SYSTEM),
                apply_chat_template=asked.chat_template,
                fewshot_as_multiturn=asked.settings.get(MULTITURN, True),
                chat_template=model.apply_chat_template if asked.chat_template else None,
                tokenizer_name=model.tokenizer_name if asked.chat_template else "",
            )
            for request in one.instances:
                found.setdefault(request.request_type, []).extend([request] * request.repeats)
    return found


def _set_up_all(loaded: Loaded, asked: Asked) -> None:
    # `simple_evaluate` would do these, and run git and pip to describe the machine.
    random.seed(asked.seed)
    numpy.random.seed(asked.seed)
    torch.manual_seed(asked.seed)
    for one in loaded.tasks["tasks"].values():
        _set_up(one, asked)


def _set_up(task: Any, asked: Asked) -> None:
    """Give a task as many solved items as are asked for; one that says none gets none, as in the harness."""
    own = task.get_config("num_fewshot")
    if own is None or (asked.num_fewshot is not None and own != 0):
        task.set_config(key="num_fewshot", value=asked.num_fewshot or 0)
    task.set_fewshot_seed(seed=asked.seed)


def _score(task: str, results: Mapping[str, Any], asked: Asked) -> Score:
    table = {**results["results"].get(task, {}), **(results.get("groups") or {}).get(task, {})}
    values = {key: value for key, value in table.items() if _is_value(key, value)}
    wanted = asked.metric(task)
    fitting = [key for key in values if not wanted or wanted in (key, key.partition(",")[0])]
    if not fitting:
        there = ", ".join(f"`{printable(key)}`" for key in values) or "none"
        raise UsageError(f"`{printable(task)}` has no metric `{printable(wanted)}`; it has {there}", "mend `--metric`")
    key = fitting[0]
    metric, _, answers = key.partition(",")
    error = table.get(f"{metric}_stderr,{answers}")
    stderr = float(error) if isinstance(error, int | float) and math.isfinite(error) else None
    return Score.of_metric(metric, float(values[key]), stderr, _items(task, results))


def _is_value(key: str, value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return "," in key and "_stderr," not in key and number


def _items(task: str, results: Mapping[str, Any]) -> int | None:
    """The number of items that were scored, of a group those of all its tasks."""
    counts = results.get("n-samples") or {}
    if task in counts:
        return int(counts[task]["effective"])
    below = (results.get("group_subtasks") or {}).get(task, ())
    parts = [_items(part, results) for part in below]
    return sum(part for part in parts if part is not None) or None
