"""The recorded way: each batch's calls are recorded in a cheap forward, then the blocks are run one by one.

See `blocks/recorder.py` for what this assumes of a model. The canary is compared before each block and before the head.
Where sequences are run together, one of them is also run alone, and compared after each block: not bit by bit, since
sums of another shape round otherwise, but nothing else may differ.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from lowmem_aim.blocks.calls import Call, hidden_of
from lowmem_aim.blocks.forwards import Broken, SuspendedForward, TailForward
from lowmem_aim.blocks.past import copies, no_past, with_past
from lowmem_aim.blocks.recorder import CANARY_TOKENS, must_be_same, recorded_calls
from lowmem_aim.blocks.runner import BlockRunner
from lowmem_aim.measuring.batches import Batch
from lowmem_aim.measuring.purpose import Progress, Purpose
from lowmem_aim.measuring.snapshots import BlockProgress, Snapshots, in_store
from lowmem_aim.system import interrupts
from lowmem_aim.system.tensor_store import Stored


def run_recorded(
    runner: BlockRunner,
    batches: Sequence[Batch],
    progress: Progress,
    purpose: Purpose,
    snapshots: Snapshots | None = None,
) -> None:
    """Run the blocks one by one, by the recorder. Raises Broken if the canary shows that the model forbids it."""
    checks = _checks(batches)
    tokens = next(batch.tokens for batch in batches if batch.after is None)
    # The canary's copy comes last; what comes after the batches is not counted.
    texts = [*batches, *(check.alone for check in checks), Batch(tokens[:1, :CANARY_TOKENS], [], [])]
    counted = len(batches) if purpose.counts else 0
    so_far = BlockProgress(*_record(runner, texts, counted))
    states = so_far.states
    if snapshots:
        runner.with_less(partial(snapshots.restore, runner, so_far))
    with SuspendedForward(runner, texts[-1].tokens[0]) as canary:
        _stepped_again(canary, so_far, runner, progress)
        with snapshots.at_a_stop(runner, so_far) if snapshots else contextlib.nullcontext():
            for index, (path, _) in list(enumerate(runner.blocks))[so_far.blocks :]:
                if so_far.texts < len(texts):  # else the recorded copy is a block further, and was compared before
                    expected = canary.call.hidden if canary.index == index else None
                    must_be_same(expected, runner.store.get(states[-1]), path)
                output = _driven(runner, index, texts, so_far, canary.call, progress, counted)
                for check, alone in zip(checks, states[len(batches) :], strict=False):
                    check.compare(runner.store.get(alone), runner.store.get(states[check.batch]), f"after {path}")
                in_the_store = in_store(output, runner)
                with interrupts.put_off():
                    so_far.outputs.append(in_the_store)
                    so_far.texts = 0
                canary.step(output)
                progress.block(index, path)
                if snapshots:
                    snapshots.offer(runner, so_far, progress.emit)
        head_input = _taken(runner, texts, states, checks, purpose, counted)
        must_be_same(canary.head_input, head_input, "the output head")


def _stepped_again(canary: SuspendedForward, so_far: BlockProgress, runner: BlockRunner, progress: Progress) -> None:
    """Step the canary over the blocks that an earlier run has finished, by their kept outputs."""
    for output in so_far.outputs:
        canary.step(output.from_store(runner.store).args[0])
    if so_far.blocks:
        progress.found(so_far.blocks, len(runner.blocks), runner.blocks[so_far.blocks - 1][0])
    if so_far.done:
        progress.kept(so_far.done)


def _record(runner: BlockRunner, texts: Sequence[Batch], counted: int) -> tuple[list[Sequence[Call]], list[Stored]]:
    """Record every text, the first ones `counted`; return each text's calls, and each text's first hidden state."""
    shared: dict[tuple[Any, ...], Stored] = {}
    known: dict[Any, Sequence[Call]] = {}  # texts of one length are often called alike: thousands would fill memory
    calls, states = list[Sequence[Call]](), []
    for number, past in enumerate(_pasts(texts)):
        record = partial(recorded_calls, runner, texts[number].tokens, shared, number < counted, past)
        own, state = runner.with_less(record)
        runner.watch.commit()
        states.append(state)
        calls.append(known.setdefault(tuple(call.key_of_parts() for call in own), own))
    return calls, states


def _pasts(texts: Sequence[Batch]) -> list[int | None]:
    """The number of tokens before those of each text; None for one that neither continues another nor is continued."""
    pasts = [None if text.after is None else len(texts[text.after].tokens[0]) for text in texts]
    for text in texts:
        if text.after is not None:
            pasts[text.after] = 0
    return pasts


@dataclass
class _Beginning:
    """The beginning that is being continued: what became of it in one block, or before the head."""

    number: int = -1  # of its text
    cache: Cache | None = None
    state: Tensor | None = None


def _driven(
    runner: BlockRunner,
    index: int,
    texts: Sequence[Batch],
    so_far: BlockProgress,
    canary: Call,
    progress: Progress,
    counted: int,
) -> Any:
    """Run the states of all texts that are left through block `index`; return the block's output for `canary`.

    The first texts are `counted`.
    """
    store, calls, states = runner.store, so_far.calls, so_far.states

    def through(number: int, cache: Cache | None) -> Tensor:
        call = with_past(calls[number][index].from_store(store), cache).having(store.get(states[number]))
        with runner.watch.counting(number < counted):
            return hidden_of(runner.run_block(index, call))

    def drive() -> Any:
        begun = _Beginning()  # not kept from one run of this to the next: its own state is put away last
        while so_far.texts < len(texts):  # what is done is not done again after a failed allocation
            number = so_far.texts
            after = texts[number].after
            if after is not None and after != begun.number:
                begun = _Beginning(after, cache := no_past(runner.model), through(after, cache))
            if number == begun.number and begun.state is not None:
                hidden = begun.state
            else:
                hidden = through(number, copies(begun.cache, len(texts[number].tokens)) if begun.cache else None)
            with interrupts.put_off():  # a snapshot has all of this, or nothing
                store.put(hidden, states[number])
                runner.watch.commit()
                so_far.texts += 1
            progress.within(index, so_far.texts / len(texts))
        return runner.run_block(index, canary)  # while the block's weights are still there

    return runner.with_block(index, drive)


# --- what the output head is given ------------------------------------------------------------------------------------


def _taken(
    runner: BlockRunner,
    texts: Sequence[Batch],
    states: Sequence[Stored],
    checks: Sequence[_Check],
    purpose: Purpose,
    counted: int,
) -> Tensor | None:
    """Give the head's input for each sequence to `purpose`; return that of the last text."""
    pasts, begun = _pasts(texts), _Beginning()
    together = dict[int, Tensor | None]()  # of each batch with a check: what it gives the head

    def head_input(number: int) -> Tensor | None:
        forward = runner.with_less(
            partial(_finished, runner, texts[number], states[number], number < counted, pasts[number])
        )
        runner.watch.commit()
        x = forward.head_input
        if x is not None and len(x) != len(texts[number].tokens):
            raise Broken("this model takes rows for something else than sequences")
        return x

    for number, text in enumerate(texts):
        if text.after is not None and text.after != begun.number:
            begun = _Beginning(text.after, None, head_input(text.after))
        x = begun.state if number == begun.number else head_input(number)
        for place, check in enumerate(checks, len(texts) - 1 - len(checks)):
            if number == check.batch:
                together[number] = x
            elif number == place and x is not None and (before := together[check.batch]) is not None:
                check.compare(x, before, "before the output head")
        begin = begun.state if text.after is not None else None
        for row, (member, length) in enumerate(zip(text.members, text.lengths, strict=False)):
            own = None if x is None else x[row : row + 1, :length]
            purpose.take(runner, member, own if own is None or begin is None else torch.cat([begin, own], 1))
    return x


def _finished(runner: BlockRunner, text: Batch, state: Stored, counted: bool, past: int | None) -> TailForward:
    """Run the forward whose last block gives `state`, the known hidden state; return the forward."""
    forward = TailForward(runner, runner.store.get(state), counted)
    with runner.watch.counting(False):  # `TailForward` switches counting on at the last block
        runner.forward(text.tokens, forward, past)
    return forward


# --- sequences that are run together ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Check:
    """The first row of a batch, and the same sequence alone."""

    batch: int
    alone: Batch

    def compare(self, alone: Tensor, together: Tensor, place: str) -> None:
        """Raise Broken unless both hidden states, (rows, tokens, hidden), are the same but for rounding."""
        if alone.dim() != 3 or together.dim() != 3:
            raise Broken("this model's hidden states are of another shape than sequences")
        own = together[0].float()
        true = alone[0, len(alone[0]) - len(own) :].float()
        if not bool((own - true).norm() <= true.norm() * torch.finfo(alone.dtype).eps ** 0.5):
            raise Broken(f"{place}, sequences that are run together are not what they are alone")


def _checks(batches: Sequence[Batch]) -> list[_Check]:
    """One of the first batch of each kind: rows that continue a beginning, and whole sequences side by side."""
    found = list[_Check]()
    for continues in (True, False):
        some = (number for number, batch in enumerate(batches) if (batch.after is not None) == continues)
        number = next((number for number in some if not batches[number].is_plain), None)
        if number is not None:
            found.append(_Check(number, _alone(batches, number)))
    return found


def _alone(batches: Sequence[Batch], number: int) -> Batch:
    own = batches[number]
    tokens = own.tokens[:1]
    if own.after is not None:
        tokens = torch.cat([batches[own.after].tokens, tokens], 1)
    return Batch(tokens, [], [])
