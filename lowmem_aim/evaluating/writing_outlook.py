"""The cost of letting a model write, found before it does: texts and tokens at most, and the time that these take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lowmem_aim.blocks.calls import ForwardFailed
from lowmem_aim.blocks.forwards import Broken
from lowmem_aim.blocks.runner import BlockRunner
from lowmem_aim.blocks.shares import share_out
from lowmem_aim.errors import LowmemAimError
from lowmem_aim.evaluating.pace import MOST_TEXTS, Pace, measured
from lowmem_aim.evaluating.scoring import WORK_BYTES
from lowmem_aim.evaluating.whole_model import room_of
from lowmem_aim.evaluating.writing_tasks import WritingTask
from lowmem_aim.measuring.batches import SIDE_BY_SIDE
from lowmem_aim.measuring.mean_activations import needs_of
from lowmem_aim.models.checkpoint import Checkpoint
from lowmem_aim.models.meta_model import MetaModel
from lowmem_aim.system.run import Run


@dataclass(frozen=True)
class WritingOutlook:
    """The cost of the tasks that let the model write, at most: as if each text were as long as its task allows."""

    texts: int
    read: int  # tokens of the texts that the model is to continue
    written: int  # tokens
    seconds: float | None  # estimated; None: unknown


def writing_outlook(
    contexts: Sequence[str],
    tasks: Sequence[WritingTask],
    batch: int,
    tokenizer: Any,
    checkpoint: Checkpoint,
    meta_model: MetaModel,
    run: Run,
) -> WritingOutlook:
    """The cost of continuing these contexts, of all tasks, `batch` of them at a time. Raises ModelError."""
    read = sum(len(tokenizer(context)["input_ids"]) for context in contexts)
    steps = sum(math.ceil(task.texts / batch) * task.tokens for task in tasks)
    room = sum(room_of(run.budget, torch.device(run.device)).values())
    missing = max(0.0, 1 - room / (checkpoint.numel * meta_model.dtype.itemsize))  # share that is read for each step
    seconds = None
    if (found := _paces(round(read / len(contexts)), batch, checkpoint, meta_model, run)) is not None:
        reading, step = found
        seconds = reading.seconds(read, 0, 1) + steps * (step.seconds(batch, batch, 0) + missing * step.weights)
    written = sum(task.texts * task.tokens for task in tasks)
    return WritingOutlook(sum(task.texts for task in tasks), read, written, seconds)


def _paces(
    length: int, batch: int, checkpoint: Checkpoint, meta_model: MetaModel, run: Run
) -> tuple[Pace, Pace] | None:
    """(the pace of reading a context, that of one token of each text); None where it cannot be measured."""
    device, length = torch.device(run.device), min(max(length, 1), SIDE_BY_SIDE)
    needs = needs_of(meta_model, [range(max(length, batch))], beside=WORK_BYTES)
    try:
        checkpoint.warm_up()  # before the budget is divided
        shares = share_out(run.budget, device, needs)
        one, many = (
            measured(BlockRunner(checkpoint, meta_model, device, shares, run.budget), [tokens] * MOST_TEXTS, 1)
            for tokens in (torch.zeros(batch, 1, dtype=torch.int64), torch.zeros(1, length, dtype=torch.int64))
        )
    except (LowmemAimError, Broken, ForwardFailed):
        return None
    return many, one
