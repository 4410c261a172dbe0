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
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from torch import Tensor

from lowmem_aim.activations import Activations
from lowmem_aim.checkpoint import Checkpoint, digest
from lowmem_aim.errors import ModelError
from lowmem_aim.events import Advanced, Emit, Notice, PhaseEnded, PhaseStarted, silent
from lowmem_aim.skeleton import Skeleton, load_skeleton
from lowmem_aim.stage import Call, Driver, Stage, hidden_of

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


class _Broken(Exception):
    """A way of running the blocks does not hold for this model; the text says why."""


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
        except _Broken as reason:
            progress.emit(Notice(f"calibration: {reason}; {instead}", "warning"))
    return stage


# --- the recorder -----------------------------------------------------------------------------------------------


class _Handed(Tensor):
    """The hidden state that an identity block hands on, whether the model expects a tensor or a tuple of one."""

    # Any operation gives plain tensors again.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __getitem__(self, index: Any) -> Any:
        # With more than one in front it is a stack (Gemma 3n), and means what it says.
        taken_from_tuple = type(index) is int and index == 0 and self.shape[0] == 1
        return self.as_subclass(Tensor) if taken_from_tuple else super().__getitem__(index)


@dataclass
class _Tape(Driver):
    """Records what each block is called with in one sequence's forward, every block handing its input on."""

    stage: Stage
    shared: dict[tuple[Any, ...], Tensor]  # masks and rotary tables, which sequences of one length have in common
    calls: list[Call]
    state: Tensor | None = None  # what the first block is given: (1, tokens, hidden)

    def block(self, index: int, call: Call) -> Any:
        self.stage.watch.active = False  # what comes later in this forward sees an untrue hidden state
        hidden = call.hidden
        if index != len(self.calls):
            raise _Broken("this model does not call its blocks once each, in order")
        if self.state is None:
            self.state = hidden
        if hidden.data_ptr() != self.state.data_ptr() or hidden.shape != self.state.shape:
            raise _Broken("this model works on the hidden state between blocks")
        self.calls.append(self._slim(call.having(None)))
        return hidden.as_subclass(_Handed)

    def _slim(self, call: Call) -> Call:
        return Call(self._share(call.args), {key: self._share(value) for key, value in call.kwargs.items()})

    def _share(self, value: Any) -> Any:
        if type(value) is tuple:
            return tuple(self._share(part) for part in value)
        if not isinstance(value, Tensor):
            return value
        key = (value.dtype, value.shape, value.stride(), digest(value.cpu().contiguous()))
        return self.shared.setdefault(key, value)


@dataclass
class _Tail(Driver):
    """The forward that ends as it should: the last block gives the true hidden state."""

    stage: Stage
    state: Tensor
    counted: bool
    head_input: Tensor | None = None

    def block(self, index: int, call: Call) -> Any:
        last = index == len(self.stage.blocks) - 1
        self.stage.watch.active = last and self.counted
        return (self.state if last else call.hidden).as_subclass(_Handed)

    def head(self, x: Tensor) -> None:
        self.head_input = x
        self.stage.see_head(x)


class _States:
    """The hidden states between two blocks, one a sequence."""

    def __init__(self) -> None:
        self._states: dict[int, Tensor] = {}

    def put(self, sequence: int, state: Tensor) -> None:
        self._states[sequence] = state

    def get(self, sequence: int) -> Tensor:
        return self._states[sequence]


def _recorded(stage: Stage, sequences: Sequence[Tensor], progress: _Progress) -> None:
    """Raises _Broken when the canary shows that the recorder's assumption does not hold for this model."""
    watched = len(sequences)  # the canary comes after them, uncounted
    texts = [*sequences, sequences[0][:CANARY_TOKENS]]
    states = _States()
    tapes = _record(stage, texts, states)
    with _Suspended(stage, texts[watched]) as canary:
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
            tail = _Tail(stage, states.get(number), counted=number < watched)
            stage.watch.active = False
            stage.forward(tokens, tail)
        _same(canary.head_input, tail.head_input, "the output head")


def _record(stage: Stage, texts: Sequence[Tensor], states: _States) -> list[list[Call]]:
    """The calls of every text, and their first hidden states put into `states`."""
    shared: dict[tuple[Any, ...], Tensor] = {}
    tapes = []
    for number, tokens in enumerate(texts):
        tape = _Tape(stage, shared, [])
        stage.watch.active = number < len(texts) - 1
        try:
            stage.forward(tokens, tape)
        except torch.OutOfMemoryError:
            raise
        except (TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
            raise _Broken(f"this model's blocks cannot be left out ({type(error).__name__})") from error
        if tape.state is None or len(tape.calls) != len(stage.blocks):
            raise _Broken("this model does not call its blocks once each, in order")
        states.put(number, tape.state)
        tapes.append(tape.calls)
    return tapes


def _same(true: Tensor | None, recorded: Tensor | None, place: str) -> None:
    if true is None and recorded is None:
        return
    if true is None or recorded is None or (true.dtype, true.shape) != (recorded.dtype, recorded.shape):
        raise _Broken(f"before {place} the hidden state is of another shape than running the blocks one by one gave")
    if not torch.allclose(true, recorded, rtol=0, atol=0, equal_nan=True):  # NaN is found, and named, elsewhere
        raise _Broken(f"before {place} the hidden state is not what running the blocks one by one gave")


# --- suspended forwards, for the canary and for lock-step ---------------------------------------------------------


class _Closed(BaseException):
    """Unwinds a suspended forward that is no longer wanted; no model code may catch it."""


class _Suspended(Driver):
    """An ordinary forward in a thread of its own that stops at each block, until its owner gives the block's output.

    Strict hand-over: either the owner or the thread runs, never both. Blocks run in the owner, so that the thread
    only does what lies between them.
    """

    def __init__(self, stage: Stage, tokens: Tensor, *, counted: bool = False) -> None:
        self.stage, self.tokens, self.counted = stage, tokens, counted
        self.index = -1  # of the block that it waits for; -1 when it has ended
        self.call = Call((), {})
        self.head_input: Tensor | None = None
        self._to_thread: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._to_owner: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._body, daemon=True)

    def __enter__(self) -> _Suspended:
        try:
            self._let_run(self._thread.start)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._to_thread.put(_Closed())
        self._thread.join()

    def step(self, output: Any) -> None:
        """Go on to the next block, or to the end."""
        self._let_run(lambda: self._to_thread.put(output))

    def _let_run(self, start: Callable[[], None]) -> None:
        self.stage.watch.active = self.counted  # before the thread runs, not beside it
        start()
        arrived = self._to_owner.get()
        self.stage.watch.active = False
        if isinstance(arrived, BaseException):
            raise arrived
        self.index, self.call = arrived

    def _body(self) -> None:
        try:
            with torch.no_grad():  # a thread starts with gradients on
                self.stage.forward(self.tokens, self)
            self._to_owner.put((-1, Call((), {})))
        except _Closed:
            pass
        except BaseException as error:
            self._to_owner.put(error)

    def block(self, index: int, call: Call) -> Any:
        self._to_owner.put((index, call))
        output = self._to_thread.get()
        if isinstance(output, _Closed):
            raise output
        return output

    def head(self, x: Tensor) -> None:
        self.head_input = x
        self.stage.see_head(x)


def _lock_step(stage: Stage, sequences: Sequence[Tensor], progress: _Progress) -> None:
    """Raises _Broken when the blocks are not called once each, in order, or keep something from call to call."""
    canary = _Suspended(stage, sequences[0][:CANARY_TOKENS])
    with contextlib.ExitStack() as stack:
        runs = [_Suspended(stage, tokens, counted=True) for tokens in sequences]
        for run in (*runs, canary):
            stack.enter_context(run)
        for index, (path, _) in enumerate(stage.blocks):
            with stage.loaded(index):
                for run in (*runs, canary):
                    if run.index != index:
                        raise _Broken("this model does not call its blocks once each, in order")
                    stage.watch.active = run.counted
                    run.step(stage.run_block(index, run.call))
            progress.block(index, path)
        if canary.index >= 0:
            raise _Broken("this model calls blocks more than once")
    pager = _Pager(stage)
    stage.watch.active = False
    stage.forward(canary.tokens, pager)  # the canary by itself: nothing that other sequences leave behind
    _same(pager.head_input, canary.head_input, "the output head")


@dataclass
class _Pager(Driver):
    """Brings each block in when it is called."""

    stage: Stage
    head_input: Tensor | None = None

    def block(self, index: int, call: Call) -> Any:
        with self.stage.loaded(index):
            return self.stage.run_block(index, call)

    def head(self, x: Tensor) -> None:
        self.head_input = x
        self.stage.see_head(x)


def _paged(stage: Stage, sequences: Sequence[Tensor], progress: _Progress) -> None:
    for tokens in sequences:
        stage.watch.active = True
        stage.forward(tokens, _Pager(stage))
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
