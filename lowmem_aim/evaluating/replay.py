"""Tasks that run what the model has written, scored in a process apart, which is given the answers and asks no model.

What that process gives back is JSON, of which nothing is believed: scores of the tasks that were asked for, in the form
that they must have, or one error for all of them.
"""

from __future__ import annotations

import json
import math
import os
import signal
import site
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import xxhash

from lowmem_aim.errors import UsageError, printable
from lowmem_aim.evaluating.apart import Ended, package_folder, run_apart
from lowmem_aim.evaluating.code_scoring import FILE_BYTES, MEMORY_BYTES, SECONDS, START_SECONDS
from lowmem_aim.evaluating.scores import Score
from lowmem_aim.evaluating.tasks import Asked, Loaded
from lowmem_aim.evaluating.unsafe_tasks import tasks_of, uses_code_eval

LOADING_SECONDS = 300  # for torch, the harness and the tasks, on a cold and slow disk
_LONGEST = 1_000_000  # bytes of what comes back
_PROGRAM = "evaluating.replay_program"
_KEYS = {"value", "stderr", "metric", "n"}  # of a score
_HINT = "what the model has written is kept: give the same command again, or leave these tasks out of `--tasks`"


def scored_apart(names: Sequence[str], loaded: Loaded, asked: Asked) -> dict[str, Score]:
    """Return the scores that a process apart gives tasks which keep the answers, see `harness.scored`.

    Raises UsageError if the process gives none, DiskError.
    """
    tasks = {key: task for name in names for key, task in tasks_of(name, loaded.tasks).items()}
    content = json.dumps({"asked": _as_json(names, asked), "answers": {key: _answers(tasks[key]) for key in tasks}})
    seconds = LOADING_SECONDS + sum(map(_seconds, tasks.values()))
    limits = (MEMORY_BYTES, FILE_BYTES, seconds, SECONDS)
    ended = run_apart(_PROGRAM, limits, content.encode(), seconds, _LONGEST + 1, _variables())
    try:
        if ended.code != 0:
            raise ValueError(_failure(ended, seconds))
        return checked(ended.results, {name: _items(tasks_of(name, loaded.tasks)) for name in names})
    except ValueError as error:
        listed = ", ".join(f"`{printable(name)}`" for name in names)
        raise UsageError(f"{listed}: the process that scores what the model has written {error}", _HINT) from error


def checked(content: bytes, items: Mapping[str, int]) -> dict[str, Score]:
    """The scores in what the process has written; `items`: of each task that it was asked for.

    Raises ValueError for anything but one score, of the right form, for each of these.
    """
    wrong = ValueError("has given back something else than their scores")
    try:
        said = json.loads(content) if len(content) <= _LONGEST else None
    except (ValueError, RecursionError) as error:
        raise wrong from error
    scores = said.get("scores") if isinstance(said, dict) and said.keys() == {"scores"} else None
    if not isinstance(scores, dict) or scores.keys() != items.keys():
        raise wrong
    if not all(_is_score(scores[name], items[name]) for name in items):
        raise wrong
    return {name: _score(scores[name]) for name in items}


def _is_score(said: Any, items: int) -> bool:
    if not isinstance(said, dict) or said.keys() != _KEYS:
        return False
    metric, n, stderr = said["metric"], said["n"], said["stderr"]
    return (
        _is_number(said["value"])
        and (stderr is None or (_is_number(stderr) and stderr >= 0))
        and (isinstance(metric, str) and 0 < len(metric) <= 200 and metric.isprintable())
        and (n is None or (type(n) is int and 0 <= n <= items))
    )


def _is_number(value: Any) -> bool:
    """Whether it is a number that a float holds."""
    try:
        return type(value) in (int, float) and math.isfinite(value)
    except OverflowError:
        return False


def _score(said: Mapping[str, Any]) -> Score:
    stderr = None if said["stderr"] is None else float(said["stderr"])
    return Score.of_metric(said["metric"], float(said["value"]), stderr, said["n"])


def _failure(ended: Ended, seconds: int) -> str:
    """Why there are no scores; continues `the process ...`."""
    if ended.code is None or ended.code == -getattr(signal, "SIGXCPU", 0):
        return f"took more than {seconds} seconds"
    if ended.code < 0:
        return f"was ended by signal {-ended.code}, by somebody or by a system short of memory"
    return f"failed: {printable(ended.said) or f'it ended with exit code {ended.code}'}"


# --- what the process is given ----------------------------------------------------------------------------------------


def _as_json(names: Sequence[str], asked: Asked) -> dict[str, Any]:
    """The request to the process, without what only changes the questions, such as a chat template: they were asked."""
    metrics = {name: metric for name, metric in asked.metrics.items() if name in names}
    less = replace(asked, names=tuple(names), metrics=metrics, settings={}, chat_template=False)
    return {**asdict(less), "folders": [str(folder.absolute()) for folder in asked.folders]}


def _answers(task: Any) -> list[Any]:
    """The answers of a task: (number of the item, number of its request, digest of the item, the model's answers)."""
    return [[one.doc_id, one.idx, digest_of(one.doc), one.resps] for one in task.instances]


def digest_of(item: Any) -> str:
    """A digest of an item, by which the other process knows that it has the same one. 32 hex digits."""
    text = json.dumps(item, default=lambda value: type(value).__name__)
    return xxhash.xxh3_128_hexdigest(text.encode("utf-8", "surrogatepass"))


def _items(tasks: Mapping[str, Any]) -> int:
    return sum(len({one.doc_id for one in task.instances}) for task in tasks.values())


def _seconds(task: Any) -> int:
    """The seconds that scoring a task may take: 10 for each text, and the start of its process where it gets one."""
    texts = sum(len(one.resps) for one in task.instances) * len(getattr(task, "_filters", [None]))
    return texts * (SECONDS + START_SECONDS * uses_code_eval(task))


def _variables() -> dict[str, str]:
    """Variables by which the process finds the items that this one has loaded, without a network or a GPU."""
    from datasets import config
    from huggingface_hub import constants

    nltk = sys.modules.get("nltk")
    return {
        "PYTHONPATH": os.pathsep.join(filter(None, (package_folder(), os.environ.get("PYTHONPATH", "")))),
        **({"PYTHONUSERBASE": site.getuserbase()} if site.ENABLE_USER_SITE else {}),  # it has another home
        "HF_HUB_CACHE": str(constants.HF_HUB_CACHE),
        "HF_DATASETS_CACHE": str(config.HF_DATASETS_CACHE),
        **dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE"), "1"),
        **({"NLTK_DATA": os.pathsep.join(map(str, nltk.data.path))} if nltk else {}),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "MALLOC_ARENA_MAX": "1",
    }
