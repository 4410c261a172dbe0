"""Mean |x| of each input channel of the base model, one block of weights in memory at a time.

    1. record    one forward a sequence, every block an identity: finds what each block is called with
    2. run       block by block: load the block's weights (accelerate's offload hook over the checkpoint's own files),
                 run every sequence's hidden state through it with that sequence's recorded arguments, drop the weights
    3. finish    the same forward again, the last block giving the true hidden state: final norm, output head

Memory: one block, the activations of one sequence, the hidden states of all; under a budget (`shares`) hidden states go
to a file and a block's modules are loaded one by one. Each weight is read once, or, if it is paged, once a sequence;
embeddings are read by row; the output head is never loaded and no logits are computed.

The recorder assumes that nothing happens between blocks except passing the hidden state on. A *canary* checks that on
the very model: one short sequence goes through the model's own forward, suspended at each block, and is compared bit
for bit with the recorded way. If the two differ, a notice is given and everything is done again in a way that gives the
same numbers at a higher price:

    in lock-step      every sequence an ordinary forward in a suspended thread: each weight is read once (and once
                      more for a canary of its own), and memory also holds what those forwards keep alive; only if the
                      budget has space for all hidden states
    paged             one ordinary forward a sequence, blocks loaded as they are called: right for any order of calls;
                      each block is read once a sequence

Forwards are one sequence each, unpadded, without gradients or caches: no padding enters a mean, and no result depends
on which sequences share a batch.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence, Sized
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from lowmem_aim.blocks.forwards import Broken, PagedForward, SuspendedForward, TailForward
from lowmem_aim.blocks.recorder import CANARY_TOKENS, must_be_same, recorded_calls
from lowmem_aim.blocks.runner import SHORTER, BlockRunner, Call, hidden_of
from lowmem_aim.blocks.shares import BOUNDLESS, Needs, Shares, share_out
from lowmem_aim.errors import MemoryBudgetError, ModelError, printable
from lowmem_aim.events import Advanced, Emit, Notice, PhaseEnded, PhaseStarted, Worked, silent
from lowmem_aim.measuring.snapshots import BlockProgress, Snapshots, in_store
from lowmem_aim.models.checkpoint import Checkpoint
from lowmem_aim.models.meta_model import MetaModel
from lowmem_aim.output.folder import check_disk, snapshot_bytes
from lowmem_aim.relaxing.activations import Activations
from lowmem_aim.system.memory import Budget, is_allocation_failure
from lowmem_aim.system.tensor_store import Stored
from lowmem_aim.system.tensors import dtype_name


def mean_activations(
    base: Checkpoint,
    meta_model: MetaModel,
    sequences: Sequence[Tensor],  # (length,) int64 each; lengths may differ
    *,
    device: str = "cpu",
    budget: Budget | None = None,
    spill: Path | None = None,
    snapshots: Snapshots | None = None,
    emit: Emit = silent,
) -> Activations:
    """The activation statistics of `base` (AIM, arXiv 2502.02421): the mean of |x| over tokens, then over sequences.

    The forward runs in the meta model's dtype, within `budget` (None: no bound). What does not fit goes to a file
    without a name in the folder `spill` (None: stays in RAM). Progress is kept in `snapshots`, from which a killed run
    is resumed. The result is reproducible for one device, set of versions and thread count, whatever the budget. The
    model is left as it was found, also after an exception.

    Raises ModelError (a sequence that the model cannot take, weights that do not load, inputs that overflow),
    MemoryBudgetError if not even single modules fit, and DiskError.
    """
    _check_sequences(sequences)
    place = torch.device(device)
    shares = BOUNDLESS if budget is None else shares_for(needs_of(meta_model, sequences), budget, place, spill)
    progress = _Progress(emit)
    emit(PhaseStarted("calibrate", len(meta_model.blocks), "blocks"))
    with torch.no_grad(), _as_budget_errors():
        runner = _run(
            lambda: BlockRunner(base, meta_model, place, shares, budget, spill, emit), sequences, progress, snapshots
        )
    base.check_unchanged()  # a change between reading and computing would count
    result = _gather(runner, sequences, emit)
    emit(PhaseEnded("calibrate"))
    return result


def needs_of(meta_model: MetaModel, sequences: Sequence[Sized], beside: int = 0) -> Needs:
    """The needs of a calibration; `beside` is the number of bytes that something else takes meanwhile.

    Raises ModelError for a model without a list of blocks.
    """
    if not meta_model.blocks:
        label = printable(meta_model.weights.checkpoint.label)
        raise ModelError(f"`{label}` is not built of a list of blocks: it cannot be calibrated")
    needs = Needs.of(meta_model, sequences)
    return replace(needs, beside=needs.beside + beside)


def shares_for(needs: Needs, budget: Budget, device: torch.device, spill: Path | None) -> Shares:
    """Divide the budget, and check that the disk of `spill` has space for hidden states.

    Beside what does not fit the budget, the disk takes two snapshots: the last one stays until the next is whole. Those
    of an interrupted run that lie in `spill` make way for them. Raises MemoryBudgetError, DiskError.
    """
    shares = share_out(budget, device, needs)
    if spill is not None:
        needed = shares.spilled(needs.states) + 2 * needs.states - snapshot_bytes(spill)
        check_disk(spill, needed, "calibration, for hidden states,")
    return shares


@contextlib.contextmanager
def _as_budget_errors() -> Iterator[None]:
    """Raise MemoryBudgetError for an allocation that fails outside the blocks, where nothing can be made smaller."""
    try:
        yield
    except Exception as error:
        if not is_allocation_failure(error):
            raise
        raise MemoryBudgetError(
            f"calibration: there was no memory left: {printable(str(error).splitlines()[0] if str(error) else '')}",
            hint=SHORTER,
        ) from error


def _check_sequences(sequences: Sequence[Tensor]) -> None:
    if not sequences:
        raise ModelError("there is no calibration text: not one sequence")
    for index, tokens in enumerate(sequences):
        if tokens.dim() != 1 or tokens.dtype != torch.int64 or not len(tokens) or int(tokens.min()) < 0:
            raise ModelError(f"calibration sequence {index} is not a list of token ids")


class _Progress:
    """Reports progress once a block, also when a fallback goes through the blocks again."""

    def __init__(self, emit: Emit) -> None:
        self.emit, self.done = emit, 0

    def found(self, blocks: int, of: int, path: str) -> None:
        """Report the blocks that an earlier run has finished."""
        self.emit(Notice(f"resuming: {blocks}/{of} blocks are calibrated"))
        self.block(blocks - 1, path)

    def within(self, index: int, share: float) -> None:
        """Report that `share` of block `index` is done."""
        self.emit(Worked("compute", 0, 0.0, done=index + share))

    def block(self, index: int, path: str) -> None:
        """Report that block `index` is done."""
        if index >= self.done:
            self.done = index + 1
            self.emit(Advanced(self.done, path))


def _run(
    open_runner: Callable[[], BlockRunner],
    sequences: Sequence[Tensor],
    progress: _Progress,
    snapshots: Snapshots | None,
) -> BlockRunner:
    """Run the first way that works for this model; the runner that is returned has the counted means in its `watch`."""
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
                way(runner, sequences, progress)
            runner.watch.check("")
            break
        except Broken as reason:
            progress.emit(Notice(f"calibration: {reason}; {instead}", "warning"))
            if snapshots:
                snapshots.forget()  # of a way that does not work
        except MemoryBudgetError as reason:
            if way is not _lock_step:
                raise
            progress.emit(Notice(f"{reason}; {instead}", "warning"))
        runner = open_runner()  # with empty tallies: nothing that the failed way has counted may stay
    return runner


# --- the recorder -----------------------------------------------------------------------------------------------


def _recorded(
    runner: BlockRunner, sequences: Sequence[Tensor], progress: _Progress, snapshots: Snapshots | None = None
) -> None:
    """Run the blocks one by one, by the recorder. Raises Broken if the canary shows that the model forbids it."""
    watched = len(sequences)  # the canary comes after them, uncounted
    texts = [*sequences, sequences[0][:CANARY_TOKENS]]
    so_far = BlockProgress(*_record(runner, texts))
    states = so_far.states
    if snapshots:
        runner.with_less(partial(snapshots.restore, runner, so_far))
    with SuspendedForward(runner, texts[watched]) as canary:
        _stepped_again(canary, so_far, runner, progress)
        for index, (path, _) in list(enumerate(runner.blocks))[so_far.blocks :]:
            must_be_same(canary.call.hidden if canary.index == index else None, runner.store.get(states[watched]), path)
            output = _driven(runner, index, so_far.calls, states, canary.call, progress)
            so_far.outputs.append(in_store(output, runner))
            canary.step(output)
            progress.block(index, path)
            if snapshots:
                snapshots.offer(runner, so_far, progress.emit)
        for number in range(len(texts)):
            forward = runner.with_less(partial(_finished, runner, texts[number], states[number], number < watched))
            runner.watch.commit()
        must_be_same(canary.head_input, forward.head_input, "the output head")


def _stepped_again(canary: SuspendedForward, so_far: BlockProgress, runner: BlockRunner, progress: _Progress) -> None:
    """Step the canary over the blocks that an earlier run has finished, by their kept outputs."""
    for output in so_far.outputs:
        canary.step(output.from_store(runner.store).args[0])
    if so_far.blocks:
        progress.found(so_far.blocks, len(runner.blocks), runner.blocks[so_far.blocks - 1][0])


def _finished(runner: BlockRunner, tokens: Tensor, state: Stored, counted: bool) -> TailForward:
    """Run the forward whose last block gives `state`, the known hidden state; return the forward."""
    forward = TailForward(runner, runner.store.get(state), counted)
    with runner.watch.counting(False):  # `TailForward` switches counting on at the last block
        runner.forward(tokens, forward)
    return forward


def _driven(
    runner: BlockRunner,
    index: int,
    calls: Sequence[Sequence[Call]],
    states: Sequence[Stored],
    canary: Call,
    progress: _Progress,
) -> Any:
    """Run every sequence's state through block `index`; return the block's output for `canary`.

    The last sequence is the canary's recorded copy, and is not counted.
    """
    store = runner.store
    left = deque(range(len(calls)))  # so that what is done is not done again after a failed allocation

    def drive() -> Any:
        while left:
            number = left[0]
            call = calls[number][index].from_store(store).having(store.get(states[number]))
            with runner.watch.counting(number < len(calls) - 1):
                store.put(hidden_of(runner.run_block(index, call)), states[number])
            runner.watch.commit()
            left.popleft()
            progress.within(index, 1 - len(left) / len(calls))
        return runner.run_block(index, canary)  # while the block's weights are still there

    return runner.with_block(index, drive)


def _record(runner: BlockRunner, texts: Sequence[Tensor]) -> tuple[list[list[Call]], list[Stored]]:
    """Record every text, the last one uncounted; return each text's calls, and each text's first hidden state."""
    shared: dict[tuple[Any, ...], Stored] = {}
    calls, states = [], []
    for number, tokens in enumerate(texts):
        own, state = runner.with_less(partial(recorded_calls, runner, tokens, shared, number < len(texts) - 1))
        runner.watch.commit()
        states.append(state)
        calls.append(own)
    return calls, states


# --- the fallbacks ------------------------------------------------------------------------------------------------


def _lock_step(runner: BlockRunner, sequences: Sequence[Tensor], progress: _Progress) -> None:
    """Run all sequences as suspended forwards, block by block.

    Raises Broken if the blocks are not called once each, in order, or keep something from call to call.
    """
    canary = SuspendedForward(runner, sequences[0][:CANARY_TOKENS])
    with contextlib.ExitStack() as stack:
        runs = [SuspendedForward(runner, tokens, counted=True) for tokens in sequences]
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


def _paged(runner: BlockRunner, sequences: Sequence[Tensor], progress: _Progress) -> None:
    """Run one ordinary forward a sequence, each block loaded whenever it is called."""
    for tokens in sequences:
        with runner.watch.counting(True):
            runner.forward(tokens, PagedForward(runner))
    for index, (path, _) in enumerate(runner.blocks):
        progress.block(index, path)


# --- the result ---------------------------------------------------------------------------------------------------


def _gather(runner: BlockRunner, sequences: Sequence[Tensor], emit: Emit) -> Activations:
    means, unreached, lost = _by_checkpoint_name(runner)
    _tell(unreached, lost, emit)
    return Activations(
        means=means,
        tied=runner.meta_model.tied,
        base_digests=runner.weights.digests,
        tokens_digest=_tokens_digest(sequences),
        sequences=len(sequences),
        tokens=sum(len(tokens) for tokens in sequences),
        dtype=dtype_name(runner.meta_model.dtype),
        unreached_experts=unreached,
    )


def _by_checkpoint_name(runner: BlockRunner) -> tuple[dict[str, Tensor], dict[str, int], list[str]]:
    """(statistics, experts that no token reached, parameters whose statistic has no place in the checkpoint)."""
    weights, tallies = runner.meta_model.weights, runner.watch.tallies
    means: dict[str, Tensor] = {}
    unreached: dict[str, int] = {}
    lost = runner.watch.stacks - tallies.keys()
    blocks = tuple(f"{path}." for path, _ in runner.blocks)
    for parameter, tally in tallies.items():
        if parameter == f"{runner.meta_model.head}.weight":
            # By its own name: a tied head may be absent from the file, or stand there twice.
            means[weights.name(parameter)] = tally.statistic()
        # Outside the blocks, a module that is never called (of a vision tower) is not one that text fails to reach.
        elif any(tally.calls) or parameter.startswith(blocks):
            found = dict(weights.scatter(parameter, tally.statistic()))
            means |= found
            lost |= set() if found else {parameter}
            flags = weights.scatter(parameter, tally.unreached())
            unreached |= {name: count for name, flag in flags if (count := _experts_in(flag))}
    return means, unreached, sorted(lost)


def _experts_in(flag: Tensor) -> int:
    """Number of experts of a tensor that no token reached; `flag` is (experts, ...), or of a single expert."""
    return int(flag.flatten(1).any(1).sum()) if flag.dim() == 3 else int(flag.any())


def _tell(unreached: dict[str, int], lost: list[str], emit: Emit) -> None:
    if unreached:
        what = f"no token of the calibration text was seen at {sum(unreached.values())} weights, most likely experts"
        emit(Notice(f"{what} that it does not reach; they stay as merged (more text reaches more experts)", "warning"))
    if lost:
        what = f"the inputs of {len(lost)} weights such as `{lost[0]}` cannot be seen or matched to the checkpoint"
        emit(Notice(f"calibration: {what}; they stay as merged", "warning"))


def _tokens_digest(sequences: Sequence[Tensor]) -> str:
    state = xxhash.xxh3_128()
    for tokens in sequences:
        state.update(len(tokens).to_bytes(8, "little"))  # the same tokens, cut elsewhere, are other sequences
        state.update(tokens.cpu().contiguous().numpy().tobytes())
    return str(state.hexdigest())
