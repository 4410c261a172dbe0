"""The recorded way: each sequence's calls are recorded in a cheap forward, then the blocks are run one by one.

See `blocks/recorder.py` for what this assumes of a model. The canary is compared before each block and before the head.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from lowmem_aim.blocks.calls import Call, hidden_of
from lowmem_aim.blocks.forwards import SuspendedForward, TailForward
from lowmem_aim.blocks.recorder import CANARY_TOKENS, must_be_same, recorded_calls
from lowmem_aim.blocks.runner import BlockRunner
from lowmem_aim.measuring.purpose import Progress, Purpose
from lowmem_aim.measuring.snapshots import BlockProgress, Snapshots, in_store
from lowmem_aim.system import interrupts
from lowmem_aim.system.tensor_store import Stored


def run_recorded(
    runner: BlockRunner,
    sequences: Sequence[Tensor],
    progress: Progress,
    purpose: Purpose,
    snapshots: Snapshots | None = None,
) -> None:
    """Run the blocks one by one, by the recorder. Raises Broken if the canary shows that the model forbids it."""
    watched = len(sequences)  # the canary comes after them, uncounted
    texts = [*sequences, sequences[0][:CANARY_TOKENS]]
    so_far = BlockProgress(*_record(runner, texts, purpose.counts))
    states = so_far.states
    if snapshots:
        runner.with_less(partial(snapshots.restore, runner, so_far))
    with SuspendedForward(runner, texts[watched]) as canary:
        _stepped_again(canary, so_far, runner, progress)
        with snapshots.at_a_stop(runner, so_far) if snapshots else contextlib.nullcontext():
            for index, (path, _) in list(enumerate(runner.blocks))[so_far.blocks :]:
                if so_far.texts <= watched:  # else the recorded copy is a block further, and was compared before
                    expected = canary.call.hidden if canary.index == index else None
                    must_be_same(expected, runner.store.get(states[watched]), path)
                output = _driven(runner, index, so_far, canary.call, progress, purpose.counts)
                in_the_store = in_store(output, runner)
                with interrupts.put_off():
                    so_far.outputs.append(in_the_store)
                    so_far.texts = 0
                canary.step(output)
                progress.block(index, path)
                if snapshots:
                    snapshots.offer(runner, so_far, progress.emit)
        for number in range(len(texts)):
            counted = purpose.counts and number < watched
            forward = runner.with_less(partial(_finished, runner, texts[number], states[number], counted))
            runner.watch.commit()
            if number < watched:
                purpose.take(runner, number, forward.head_input)
        must_be_same(canary.head_input, forward.head_input, "the output head")


def _stepped_again(canary: SuspendedForward, so_far: BlockProgress, runner: BlockRunner, progress: Progress) -> None:
    """Step the canary over the blocks that an earlier run has finished, by their kept outputs."""
    for output in so_far.outputs:
        canary.step(output.from_store(runner.store).args[0])
    if so_far.blocks:
        progress.found(so_far.blocks, len(runner.blocks), runner.blocks[so_far.blocks - 1][0])
    if so_far.done:
        progress.kept(so_far.done)


def _finished(runner: BlockRunner, tokens: Tensor, state: Stored, counted: bool) -> TailForward:
    """Run the forward whose last block gives `state`, the known hidden state; return the forward."""
    forward = TailForward(runner, runner.store.get(state), counted)
    with runner.watch.counting(False):  # `TailForward` switches counting on at the last block
        runner.forward(tokens, forward)
    return forward


def _driven(
    runner: BlockRunner,
    index: int,
    so_far: BlockProgress,
    canary: Call,
    progress: Progress,
    counted: bool,
) -> Any:
    """Run the states of all sequences that are left through block `index`; return the block's output for `canary`.

    The last sequence is the canary's recorded copy, and is never counted.
    """
    store, calls, states = runner.store, so_far.calls, so_far.states

    def drive() -> Any:
        while so_far.texts < len(calls):  # what is done is not done again after a failed allocation
            number = so_far.texts
            call = calls[number][index].from_store(store).having(store.get(states[number]))
            with runner.watch.counting(counted and number < len(calls) - 1):
                hidden = hidden_of(runner.run_block(index, call))
            with interrupts.put_off():  # a snapshot has all of this, or nothing
                store.put(hidden, states[number])
                runner.watch.commit()
                so_far.texts += 1
            progress.within(index, so_far.texts / len(calls))
        return runner.run_block(index, canary)  # while the block's weights are still there

    return runner.with_block(index, drive)


def _record(runner: BlockRunner, texts: Sequence[Tensor], counted: bool) -> tuple[list[Sequence[Call]], list[Stored]]:
    """Record every text, the last one uncounted; return each text's calls, and each text's first hidden state."""
    shared: dict[tuple[Any, ...], Stored] = {}
    known: dict[Any, Sequence[Call]] = {}  # texts of one length are often called alike: thousands would fill memory
    calls, states = list[Sequence[Call]](), []
    for number, tokens in enumerate(texts):
        count = counted and number < len(texts) - 1
        own, state = runner.with_less(partial(recorded_calls, runner, tokens, shared, count))
        runner.watch.commit()
        states.append(state)
        calls.append(known.setdefault(tuple(call.key_of_parts() for call in own), own))
    return calls, states
