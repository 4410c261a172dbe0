"""The ways to run all blocks of a model over all texts, one block of weights in memory at a time.

The recorder assumes that nothing happens between blocks except passing the hidden state on. A *canary* checks that on
the very model: one short sequence goes through the model's own forward, suspended at each block, and is compared bit
for bit with the recorded way. If the two differ, a notice is given and everything is done again in a way that gives the
same numbers at a higher price:

    in lock-step      every sequence an ordinary forward in a suspended thread: each weight is read once (and once
                      more for a canary of its own), and memory also holds what those forwards keep alive; only if the
                      budget has space for all hidden states
    paged             one ordinary forward a sequence, blocks loaded as they are called: right for any order of calls;
                      each block is read once a sequence
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from lowmem_aim.blocks.calls import Call, ForwardFailed, hidden_of, raised_here
from lowmem_aim.blocks.forwards import Broken, PagedForward, SuspendedForward, TailForward
from lowmem_aim.blocks.recorder import CANARY_TOKENS, must_be_same, recorded_calls
from lowmem_aim.blocks.runner import BlockRunner
from lowmem_aim.blocks.shares import Needs
from lowmem_aim.errors import MemoryBudgetError, ModelError, printable
from lowmem_aim.events import Advanced, Emit, Notice, Snapshot, Worked
from lowmem_aim.measuring.snapshots import BlockProgress, Snapshots, in_store
from lowmem_aim.system import interrupts
from lowmem_aim.system.tensor_store import Stored


class Progress:
    """Reports progress once a block, also when a fallback goes through the blocks again."""

    def __init__(self, emit: Emit, *, before: float = 0.0, a_block: float = 1.0, what: str = "calibrated") -> None:
        """`before`: what is done of the phase when the first block begins; `a_block`: what a block adds to that."""
        self.emit, self._before, self._a_block, self._what = emit, before, a_block, what
        self._blocks = 0

    def found(self, blocks: int, of: int, path: str) -> None:
        """Report the blocks that an earlier run has finished."""
        self.emit(Notice(f"resuming: {blocks}/{of} blocks are {self._what}"))
        self.block(blocks - 1, path)

    def kept(self, blocks: float) -> None:
        """Report how many blocks a killed run would not have to run again."""
        self.emit(Snapshot(self._done(blocks)))

    def within(self, index: int, share: float) -> None:
        """Report that `share` of block `index` is done."""
        self.emit(Worked("compute", 0, 0.0, done=self._done(index + share)))

    def block(self, index: int, path: str) -> None:
        """Report that block `index` is done."""
        if index >= self._blocks:
            self._blocks = index + 1
            self.emit(Advanced(self._done(self._blocks), path))

    def _done(self, blocks: float) -> float:
        return self._before + self._a_block * blocks


class Purpose:
    """The purpose of running all blocks: here, counting the inputs of their modules."""

    counts = True  # whether inputs are counted in the runner's `watch`

    def take(self, runner: BlockRunner, number: int, head_input: Tensor | None) -> None:
        """Take what the output head is given for sequence `number`: (1, tokens, hidden); None: it was not called.

        If a way turns out to be wrong for the model, the next one gives every sequence again.
        """

    def finish(self, runner: BlockRunner) -> None:
        """Finish while the runner is still set up; every sequence was taken."""


COUNTING = Purpose()


def run_blocks(
    open_runner: Callable[[], BlockRunner],
    sequences: Sequence[Tensor],
    progress: Progress,
    snapshots: Snapshots | None,
    purpose: Purpose = COUNTING,
) -> BlockRunner:
    """Run the first way that works for this model; the runner that is returned has the counted means in its `watch`.

    Raises ModelError if the model's own forward fails, MemoryBudgetError, DiskError.
    """
    recorded = partial(_recorded, snapshots=snapshots)
    # The cheapest first: lock-step also holds what all forwards keep alive, paged reads every block once a sequence.
    ways: list[tuple[Callable[..., None], str]] = [
        (recorded, "suspending a forward of every sequence instead"),
        (_lock_step, "reading each block again for every sequence instead, which takes longer"),
        (_paged, ""),
    ]
    runner = open_runner()
    if not runner.shares.suspend(2 * Needs.of(runner.meta_model, sequences).states):
        ways = [(recorded, ways[1][1]), ways[2]]  # suspended forwards hold their states in memory
    for way, instead in ways:
        try:
            with runner.set_up():
                way(runner, sequences, progress, purpose)
                purpose.finish(runner)
            runner.watch.check("")
            break
        except (Broken, ForwardFailed) as reason:
            if way is _paged:  # an ordinary forward, but for weights that come and go
                raise _refused(runner, reason) from reason
            progress.emit(Notice(f"{_told(reason)}; {instead}", "warning"))
            if snapshots:
                snapshots.forget()  # of a way that does not work
                progress.kept(0)
        except MemoryBudgetError as reason:
            if way is not _lock_step:
                raise
            progress.emit(Notice(f"{reason}; {instead}", "warning"))
        runner = open_runner()  # with empty tallies: nothing that the failed way has counted may stay
    return runner


def _told(reason: Broken | ForwardFailed) -> str:
    return str(reason) if isinstance(reason, Broken) else f"this model's forward cannot be run in parts ({reason})"


def _refused(runner: BlockRunner, reason: Exception) -> Exception:
    """The error for a model whose own forward fails; what a mistake of this project raised stays what it is."""
    cause = reason.__cause__
    if isinstance(cause, Exception) and raised_here(cause):
        return cause
    label = printable(runner.meta_model.weights.checkpoint.label)
    return ModelError(
        f"transformers cannot run a forward pass of `{label}`: {reason}",
        hint="do config and weights match, and can this model run on text alone? a merge without `aim:` runs no model",
    )


# --- the recorder -----------------------------------------------------------------------------------------------


def _recorded(
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


# --- the fallbacks ------------------------------------------------------------------------------------------------


def _lock_step(runner: BlockRunner, sequences: Sequence[Tensor], progress: Progress, purpose: Purpose) -> None:
    """Run all sequences as suspended forwards, block by block.

    Raises Broken if the blocks are not called once each, in order, or keep something from call to call.
    """
    canary = SuspendedForward(runner, sequences[0][:CANARY_TOKENS])
    with contextlib.ExitStack() as stack:
        runs = [SuspendedForward(runner, tokens, counted=purpose.counts) for tokens in sequences]
        for run in (*runs, canary):
            stack.enter_context(run)
        for index, (path, _) in enumerate(runner.blocks):
            runner.with_block(index, partial(_stepped, runner, index, deque([*runs, canary])))
            progress.block(index, path)
        if canary.index >= 0:
            raise Broken("this model calls blocks more than once")
    pager = PagedForward(runner)
    runner.forward(canary.tokens, pager)  # the canary by itself: nothing that other sequences leave behind
    must_be_same(pager.head_input, canary.head_input, "the output head")
    for number, run in enumerate(runs):
        purpose.take(runner, number, run.head_input)


def _stepped(runner: BlockRunner, index: int, left: deque[SuspendedForward]) -> None:
    """Run every suspended forward over block `index`; a forward that is over it is taken out of `left`."""
    while left:
        run = left[0]
        if run.index != index:
            raise Broken("this model does not call its blocks once each, in order")
        with runner.watch.counting(run.counted):
            output = runner.run_block(index, run.call)
        runner.watch.commit()
        left.popleft()
        run.step(output)


def _paged(runner: BlockRunner, sequences: Sequence[Tensor], progress: Progress, purpose: Purpose) -> None:
    """Run one ordinary forward a sequence, each block loaded whenever it is called."""
    for number, tokens in enumerate(sequences):
        forward = PagedForward(runner)
        with runner.watch.counting(purpose.counts):
            runner.forward(tokens, forward)
        purpose.take(runner, number, forward.head_input)
    for index, (path, _) in enumerate(runner.blocks):
        progress.block(index, path)
