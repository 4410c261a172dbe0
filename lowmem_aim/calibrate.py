"""Mean |x| of each input channel of the base model, one block of weights in memory at a time.

    1. record    one forward a sequence with every block an identity: what each block is called with
    2. drive     block by block: bring its weights in (accelerate's offload hook over the checkpoint's own files), run
                 every sequence's hidden state through it with its own recorded arguments, drop it
    3. tail      the same forward again with the last block giving the true hidden state: final norm, output head

Memory: one block, the activations of one sequence, the hidden states of all. Each weight is read once; embeddings
are read by row; the output head is never loaded and no logits are computed. The recorder assumes that nothing happens
between blocks but handing the hidden state on. A *canary* checks that on this very model: one short sequence goes
through the model's own forward, suspended at each block, and is compared bit for bit with the recorded way. If they
differ, a notice is given and the whole is done again

    in lock-step      every sequence an ordinary forward in a suspended thread: each weight is read once (and once
                      more for a canary of its own), memory also holds what those forwards keep alive
    paged             one ordinary forward a sequence, blocks brought in as they are called: right for any order of
                      calls, each block is read once a sequence

which give the same numbers. Forwards are one sequence each, unpadded, without gradients or caches.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import xxhash
from torch import Tensor

from lowmem_aim.activations import Activations
from lowmem_aim.checkpoint import Checkpoint
from lowmem_aim.drivers import Broken, Pager, Suspended, Tail, Tape
from lowmem_aim.errors import ModelError, printable
from lowmem_aim.events import Advanced, Emit, Notice, PhaseEnded, PhaseStarted, silent
from lowmem_aim.skeleton import Skeleton, load_skeleton
from lowmem_aim.stage import Call, Stage, hidden_of

# Long enough to fill attention with something, short enough to cost nothing.
CANARY_TOKENS = 32


def calibrate(
    base: Checkpoint,
    skeleton: Skeleton,
    sequences: Sequence[Tensor],  # (length,) int64 each; lengths may differ
    *,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    emit: Emit = silent,
) -> Activations:
    """The activation statistics of `base` (AIM, arXiv 2502.02421): mean over tokens, then over sequences.

    The forward runs in `dtype`, by default that of the skeleton. Reproducible for one device, set of versions and
    thread count. The skeleton is left as it was found, also after an exception. Raises ModelError: a sequence that
    the model cannot take, weights that do not load, inputs that overflow.
    """
    _check_sequences(sequences)
    if not skeleton.blocks:
        raise ModelError(f"`{printable(base.label)}` is not built of a list of blocks: it cannot be calibrated")
    if dtype not in (None, skeleton.dtype):
        skeleton = load_skeleton(base, dtype)
    emit(PhaseStarted("calibrate", len(skeleton.blocks), "blocks"))
    progress = _Progress(emit)
    with torch.no_grad():
        stage = _run(base, skeleton, sequences, torch.device(device), progress)
    result = _gather(stage, sequences, emit)
    emit(PhaseEnded("calibrate"))
    return result


def _check_sequences(sequences: Sequence[Tensor]) -> None:
    if not sequences:
        raise ModelError("there is no calibration text: not one sequence")
    for index, tokens in enumerate(sequences):
        if tokens.dim() != 1 or tokens.dtype != torch.int64 or not len(tokens) or int(tokens.min()) < 0:
            raise ModelError(f"calibration sequence {index} is not a list of token ids")


class _Progress:
    """Advances once a block, also when the blocks are gone through again by a fallback."""

    def __init__(self, emit: Emit) -> None:
        self.emit, self.done = emit, 0

    def block(self, index: int, path: str) -> None:
        if index >= self.done:
            self.done = index + 1
            self.emit(Advanced(self.done, path))


def _run(
    base: Checkpoint, skeleton: Skeleton, sequences: Sequence[Tensor], device: torch.device, progress: _Progress
) -> Stage:
    """The first way that holds for this model; what it saw is in the stage's `watch`."""
    ways: list[tuple[Callable[..., None], str]] = [
        (_recorded, "suspending a forward of every sequence instead"),
        (_lock_step, "reading each block again for every sequence instead, which takes longer"),
        (_paged, ""),
    ]
    for way, instead in ways:
        stage = Stage(base, skeleton, device)
        try:
            with stage.set_up():
                way(stage, sequences, progress)
            stage.watch.check("")
            break
        except Broken as reason:
            progress.emit(Notice(f"calibration: {reason}; {instead}", "warning"))
    return stage


# --- the recorder -----------------------------------------------------------------------------------------------


class _States:
    """The hidden states between two blocks, one a sequence."""

    def __init__(self) -> None:
        self._states: dict[int, Tensor] = {}

    def put(self, sequence: int, state: Tensor) -> None:
        self._states[sequence] = state

    def get(self, sequence: int) -> Tensor:
        return self._states[sequence]


def _recorded(stage: Stage, sequences: Sequence[Tensor], progress: _Progress) -> None:
    """Raises Broken when the canary shows that the recorder's assumption does not hold for this model."""
    watched = len(sequences)  # the canary comes after them, uncounted
    texts = [*sequences, sequences[0][:CANARY_TOKENS]]
    states = _States()
    tapes = _record(stage, texts, states)
    with Suspended(stage, texts[watched]) as canary:
        for index, (path, _) in enumerate(stage.blocks):
            with stage.loaded(index):
                _same(canary.call.hidden if canary.index == index else None, states.get(watched), path)
                for number, calls in enumerate(tapes):
                    stage.watch.active = number < watched
                    output = stage.run_block(index, calls[index].having(states.get(number)))
                    states.put(number, hidden_of(output))
                stage.watch.active = False
                canary.step(stage.run_block(index, canary.call))
            progress.block(index, path)
        for number, tokens in enumerate(texts):
            tail = Tail(stage, states.get(number), counted=number < watched)
            stage.watch.active = False
            stage.forward(tokens, tail)
        _same(canary.head_input, tail.head_input, "the output head")


def _record(stage: Stage, texts: Sequence[Tensor], states: _States) -> list[list[Call]]:
    """The calls of every text, and their first hidden states put into `states`."""
    shared: dict[tuple[Any, ...], Tensor] = {}
    tapes = []
    for number, tokens in enumerate(texts):
        tape = Tape(stage, shared, [])
        stage.watch.active = number < len(texts) - 1
        try:
            stage.forward(tokens, tape)
        except torch.OutOfMemoryError:
            raise
        except (TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
            raise Broken(f"this model's blocks cannot be left out ({type(error).__name__})") from error
        if tape.state is None or len(tape.calls) != len(stage.blocks):
            raise Broken("this model does not call its blocks once each, in order")
        states.put(number, tape.state)
        tapes.append(tape.calls)
    return tapes


def _same(true: Tensor | None, recorded: Tensor | None, place: str) -> None:
    if true is None and recorded is None:
        return
    if true is None or recorded is None or (true.dtype, true.shape) != (recorded.dtype, recorded.shape):
        raise Broken(f"before {place} the hidden state is of another shape than running the blocks one by one gave")
    if not torch.allclose(true, recorded, rtol=0, atol=0, equal_nan=True):  # NaN is found, and named, elsewhere
        raise Broken(f"before {place} the hidden state is not what running the blocks one by one gave")


# --- the fallbacks ------------------------------------------------------------------------------------------------


def _lock_step(stage: Stage, sequences: Sequence[Tensor], progress: _Progress) -> None:
    """Raises Broken when the blocks are not called once each, in order, or keep something from call to call."""
    canary = Suspended(stage, sequences[0][:CANARY_TOKENS])
    with contextlib.ExitStack() as stack:
        runs = [Suspended(stage, tokens, counted=True) for tokens in sequences]
        for run in (*runs, canary):
            stack.enter_context(run)
        for index, (path, _) in enumerate(stage.blocks):
            with stage.loaded(index):
                for run in (*runs, canary):
                    if run.index != index:
                        raise Broken("this model does not call its blocks once each, in order")
                    stage.watch.active = run.counted
                    run.step(stage.run_block(index, run.call))
            progress.block(index, path)
        if canary.index >= 0:
            raise Broken("this model calls blocks more than once")
    pager = Pager(stage)
    stage.watch.active = False
    stage.forward(canary.tokens, pager)  # the canary by itself: nothing that other sequences leave behind
    _same(pager.head_input, canary.head_input, "the output head")


def _paged(stage: Stage, sequences: Sequence[Tensor], progress: _Progress) -> None:
    for tokens in sequences:
        stage.watch.active = True
        stage.forward(tokens, Pager(stage))
    for index, (path, _) in enumerate(stage.blocks):
        progress.block(index, path)


# --- the result ---------------------------------------------------------------------------------------------------


def _gather(stage: Stage, sequences: Sequence[Tensor], emit: Emit) -> Activations:
    means, unreached, lost = _by_checkpoint_name(stage)
    _tell(unreached, lost, emit)
    return Activations(
        means=means,
        tied=stage.skeleton.tied,
        base_digests=stage.weights.digests,
        tokens_digest=_tokens_digest(sequences),
        sequences=len(sequences),
        tokens=sum(len(tokens) for tokens in sequences),
        dtype=str(stage.skeleton.dtype).removeprefix("torch."),
        unreached_experts=unreached,
    )


def _by_checkpoint_name(stage: Stage) -> tuple[dict[str, Tensor], dict[str, int], list[str]]:
    """(statistics, experts that saw nothing, parameters whose statistic has no place in the checkpoint)."""
    weights, tallies = stage.skeleton.weights, stage.watch.tallies
    means: dict[str, Tensor] = {}
    unreached: dict[str, int] = {}
    lost = stage.watch.stacks - tallies.keys()
    blocks = tuple(f"{path}." for path, _ in stage.blocks)
    for parameter, tally in tallies.items():
        if parameter == f"{stage.skeleton.head}.weight":
            # By its own name: a tied head may be absent from the file, or stand there twice.
            means[weights.name(parameter)] = tally.statistic()
        elif any(tally.calls) or parameter.startswith(blocks):
            found = dict(weights.scatter(parameter, tally.statistic()))
            means |= found
            lost |= set() if found else {parameter}
            flags = weights.scatter(parameter, tally.unreached())
            unreached |= {name: count for name, flag in flags if (count := _experts_in(flag))}
    return means, unreached, sorted(lost)


def _experts_in(flag: Tensor) -> int:
    """How many experts of a tensor saw nothing; `flag` is (experts, ...) or of one expert."""
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
        state.update(len(tokens).to_bytes(8, "little"))
        state.update(tokens.cpu().contiguous().numpy().tobytes())
    return str(state.hexdigest())
