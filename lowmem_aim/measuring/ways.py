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

from torch import Tensor

from lowmem_aim.blocks.calls import ForwardFailed, raised_here
from lowmem_aim.blocks.forwards import Broken, PagedForward, SuspendedForward
from lowmem_aim.blocks.recorder import CANARY_TOKENS, must_be_same
from lowmem_aim.blocks.runner import BlockRunner
from lowmem_aim.blocks.shares import Needs
from lowmem_aim.errors import MemoryBudgetError, ModelError, printable
from lowmem_aim.events import Notice
from lowmem_aim.measuring.batches import Batch
from lowmem_aim.measuring.purpose import COUNTING, Progress, Purpose
from lowmem_aim.measuring.recorded import run_recorded
from lowmem_aim.measuring.snapshots import Snapshots


class NotTogether(Exception):
    """Sequences must be run alone, one after another; the text says why."""


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

    def recorded(runner: BlockRunner, sequences: Sequence[Tensor], progress: Progress, purpose: Purpose) -> None:
        alone = [Batch(tokens[None], [number], [len(tokens)]) for number, tokens in enumerate(sequences)]
        run_recorded(runner, alone, progress, purpose, snapshots)

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


def run_batches(
    runner: BlockRunner, batches: Sequence[Batch], progress: Progress, snapshots: Snapshots, purpose: Purpose
) -> None:
    """Run sequences together, by the recorder alone.

    Raises NotTogether if this model cannot, ModelError, MemoryBudgetError, DiskError.
    """
    try:
        with runner.set_up():
            run_recorded(runner, batches, progress, purpose, snapshots)
            purpose.finish(runner)
    except (Broken, ForwardFailed) as reason:
        snapshots.forget()
        raise NotTogether(_told(reason)) from reason


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
