"""The time that a model takes, estimated from one of its blocks and a part of its head, run on a few texts.

Each is run by the code of the evaluation itself, for less than a second where that is possible: so the figures hold
what is true of this model here, its kernels, its shapes, and the calls of many small tensors. What else the machine
does meanwhile counts too.
"""

from __future__ import annotations

import statistics
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from lowmem_aim.blocks.calls import Call, hidden_of
from lowmem_aim.blocks.head import OutputHead
from lowmem_aim.blocks.recorder import recorded_calls
from lowmem_aim.blocks.runner import BlockRunner
from lowmem_aim.evaluating.questions import Question
from lowmem_aim.evaluating.rounds import Rounds
from lowmem_aim.evaluating.scoring import POSITIONS, Sums, rows_at_a_time
from lowmem_aim.measuring.batches import SIDE_BY_SIDE, batches_of, groups_in_order
from lowmem_aim.system.devices import wait_for
from lowmem_aim.system.tensor_store import Stored

R = TypeVar("R")
T = TypeVar("T")
SECONDS = 0.5  # in a block, if one text takes less
MOST_TEXTS = 12
REPEATS = 7  # of what takes moments, so that a pause of the machine does not count as many times


@dataclass(frozen=True)
class Pace:
    """Seconds that the parts of an evaluation take."""

    weights: float  # all weights, brought in once
    token: float  # in all blocks, and in what lies before and behind them
    head: float  # the tokens of one text that are scored, in the whole head

    def seconds(self, tokens: int, texts: int, rounds: int) -> float:
        """Seconds for texts with so many tokens in all, which are read in so many rounds."""
        return rounds * self.weights + tokens * self.token + texts * self.head


def samples_of(rounds: Rounds) -> list[Tensor]:
    """A few batches from everywhere among all, (rows, tokens) int64 each, cut where they take long."""
    sequences = rounds.sequences
    groups = _some([group for groups in rounds.groups for group in groups])
    tokens = [sequences[number] for group in groups for number in group.members]
    batches = _some(batches_of(groups_in_order(groups), tokens))
    cut = [batch.tokens[:, :SIDE_BY_SIDE] for batch in batches]
    return [tokens[: max(1, SIDE_BY_SIDE // tokens.shape[1])] for tokens in cut]


def _some(items: Sequence[T]) -> Sequence[T]:
    """At most MOST_TEXTS of the items, from everywhere among them."""
    count = min(len(items), MOST_TEXTS)
    return [items[(2 * place + 1) * len(items) // (2 * count)] for place in range(count)]


def measured(runner: BlockRunner, samples: Sequence[Tensor], scored: int) -> Pace:
    """The pace of a model on texts like `samples`, (rows, tokens) int64 each, of which `scored` tokens are scored.

    Raises Broken and ForwardFailed for models that are not run so, ModelError, MemoryBudgetError, DiskError.
    """
    place = len(runner.blocks) // 2  # the first blocks of some models are unlike the others
    shared: dict[tuple[Any, ...], Stored] = {}
    with torch.no_grad(), runner.set_up():
        record = partial(_recorded, runner, place, shared)
        record(samples[0])  # at the first call, libraries are loaded and algorithms are chosen
        recording, texts = _timed(runner, lambda: list(map(record, samples)))
        begun = time.perf_counter()
        entered, running, ran = runner.with_block(place, partial(_through, runner, place, texts))
        reading, head = _head(runner, runner.store.get(texts[0][1])[:1], scored)
        count = sum(tokens for _, _, tokens in texts)
        blocks = len(runner.blocks)
        # Every text is passed on by all blocks twice: when its calls are recorded, and when its head's input is taken.
        token = 2 * recording / count + blocks * running / ran
        return Pace(blocks * (entered - begun) + reading, token, head)


def _recorded(
    runner: BlockRunner, place: int, shared: dict[tuple[Any, ...], Stored], tokens: Tensor
) -> tuple[Call, Stored, int]:
    """The call of the block at a place, the hidden state, and the number of tokens."""
    calls, state = recorded_calls(runner, tokens, shared, False)
    return calls[place], state, tokens.numel()


def _through(runner: BlockRunner, place: int, texts: Sequence[tuple[Call, Stored, int]]) -> tuple[float, float, int]:
    """Run as many texts through the block at a place as there is time for.

    Returns the time at which the block was there, and the seconds and tokens of these texts, the first of which is run
    once before without being counted.
    """
    entered, store, seconds, ran = time.perf_counter(), runner.store, 0.0, 0

    def run(call: Call, state: Stored) -> None:
        hidden_of(runner.run_block(place, call.from_store(store).having(store.get(state))))

    for number, (call, state, tokens) in enumerate([texts[0], *texts]):
        took, _ = _timed(runner, partial(run, call, state))
        if number or took > SECONDS:
            seconds, ran = seconds + took, ran + tokens
        if seconds > SECONDS:
            break
    return entered, seconds, ran


def _head(runner: BlockRunner, states: Tensor, scored: int) -> tuple[float, float]:
    """Seconds of reading the whole head, and of as many positions of one text in it; `states`: (1, tokens, hidden)."""
    head = OutputHead(runner)
    rows = min(head.rows, rows_at_a_time(head))
    reading, part = _timed(runner, lambda: head.part(0, rows))
    some = min(scored, POSITIONS)
    x = states[0, :1].expand(some, -1).contiguous()
    sums = Sums([[Question(array("i", [0] * some), array("i", [0] * some))]], runner.device)

    def add() -> None:
        sums.add(0, 0, 0, F.linear(x, *part))

    add()
    adding = statistics.median(_timed(runner, add)[0] for _ in range(REPEATS))
    return reading * head.rows / rows, adding * head.rows / rows * scored / some


def _timed(runner: BlockRunner, work: Callable[[], R]) -> tuple[float, R]:
    """(seconds, result) of work, which has been done when this returns."""
    begun = time.perf_counter()
    result = work()
    wait_for(runner.device)
    return time.perf_counter() - begun, result
