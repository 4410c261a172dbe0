"""Tasks that let the model write: which they are, how much they may make it write, and what that costs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lowmem_aim.errors import UsageError, printable
from lowmem_aim.evaluating.tasks import WRITES, Asked, Loaded
from lowmem_aim.units import counted, shown

_USUAL_TOKENS = 256  # that HFLM has a model write at most, where a task says nothing


@dataclass(frozen=True)
class WritingTask:
    """A task that lets the model write."""

    name: str
    texts: int  # that the model is to write
    tokens: int  # of one of them, at most
    drawn: bool  # at random, and not greedily


def writing_tasks(loaded: Loaded, asked: Asked) -> list[WritingTask]:
    """The tasks that let the model write, with how much they may make it write."""
    return [
        _task(name, task, asked.limit) for name, task in loaded.tasks["tasks"].items() if task.OUTPUT_TYPE == WRITES
    ]


def _task(name: str, task: Any, limit: float | None) -> WritingTask:
    from lm_eval.models.utils import normalize_gen_kwargs

    settings = normalize_gen_kwargs(dict(task.get_config("generation_kwargs") or {}), _USUAL_TOKENS)
    items = len(task.eval_docs)
    if limit is not None:
        items = math.ceil(items * limit) if limit < 1 else min(items, int(limit))
    texts = items * int(task.get_config("repeats") or 1)
    return WritingTask(name, texts, int(settings["max_gen_toks"]), bool(settings["do_sample"]))


def too_long(tasks: Sequence[WritingTask], max_length: int) -> Iterator[UsageError]:
    """Yield an error for each task whose texts alone are as long as what the model can read and write together."""
    for task in tasks:
        if task.tokens >= max_length:
            yield UsageError(
                f"the task `{printable(task.name)}` has the model write up to {task.tokens} tokens, and this one reads "
                f"and writes {max_length} together",
                hint="leave it out of `--tasks`, or allow more with `--max-length` if the model was trained for more",
            )


def costs(tasks: Sequence[WritingTask], stored: int, weights: int, room: int, batch: int) -> str:
    """The cost of the tasks at most, for people: `weights` bytes in memory, where `room` is, `stored` on disk."""
    names = ", ".join(f"`{printable(task.name)}`" for task in tasks)
    texts = sum(task.texts for task in tasks)
    tokens = sum(task.texts * task.tokens for task in tasks)
    told = (
        f"{names}: here the model writes ({counted(texts, 'text')}, {tokens} tokens at most), and for that it is loaded"
        " whole: `--ram` and `--vram` decide where its weights lie, but are not kept to"
    )
    again = max(0, round(stored * (1 - room / weights)))
    if again:
        steps = sum(math.ceil(task.texts / batch) * task.tokens for task in tasks)
        told += f"; {shown(again)} of them do not fit and are read from disk for each token, "
        told += f"{shown(again * steps)} in all at most (`--batch-size` writes more texts at a time)"
    if any(task.drawn for task in tasks):
        told += "; texts that a task draws at random are not kept for the next run"
    return told
