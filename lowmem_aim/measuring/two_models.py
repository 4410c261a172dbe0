"""Two versions of a model side by side, block by block: how much their outputs have in common, text by text.

Each model is run as in `mean_activations`, by the recorder with its canary: what each block is called with is recorded;
then, block by block, one model's weights are loaded, every text goes through them, and they make way for the other
model's. The first model's outputs wait in the store for the second's. Each weight is read once.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lowmem_aim.blocks.calls import Call, ForwardFailed, hidden_of, raised_here
from lowmem_aim.blocks.forwards import Broken, SuspendedForward, TailForward
from lowmem_aim.blocks.head import OutputHead
from lowmem_aim.blocks.recorder import CANARY_TOKENS, must_be_same, recorded_calls
from lowmem_aim.blocks.runner import BlockRunner
from lowmem_aim.errors import ModelError, printable
from lowmem_aim.events import Advanced, Emit, PhaseEnded, PhaseStarted
from lowmem_aim.measuring.mutual_information import CHUNK, PairCounts
from lowmem_aim.relaxing.acm import EMBEDDING, HEAD, NORM
from lowmem_aim.system.tensor_store import Stored

# Paths within a block of the module whose output is the MLP's; the first that exists counts.
MLPS = ("mlp.down_proj", "mlp", "feed_forward", "block_sparse_moe", "ffn", "fc2")
_WITHOUT = "leave `acm:` out: a merge without it runs no model"
HEAD_ELEMENTS = 1 << 20  # of each head, in memory at a time
Information = dict[str, list[float]]  # group -> nats for each text


def information_between(
    base: BlockRunner,
    merged: BlockRunner,
    texts: Sequence[Tensor],
    emit: Emit,
    between: Callable[[], None],
    layers: Sequence[int],
) -> Information:
    """Mutual information of both models' outputs: of each layer's MLP, embedding, final norm and output head.

    `layers` has the base's layer for each layer of the merged model. Where they go back, the base is run again from
    its beginning; those that are left out are run and not compared. The result is in nats, by group, with a value for
    each text. `texts`: (tokens,) int64 each. `between` is called when a block's weights are no longer needed. Raises
    ModelError if the blocks cannot be run one by one, MemoryBudgetError, DiskError.
    """
    emit(PhaseStarted("compare", len(merged.blocks), "blocks"))
    with torch.no_grad(), contextlib.ExitStack() as stack:
        try:
            sides = [_Side(runner, [*texts, texts[0][:CANARY_TOKENS]]) for runner in (base, merged)]
            for side in sides:
                stack.enter_context(side)
            found = _Pairs(sides, len(texts))
            information = {EMBEDDING: found.of(_Side.embedded)}
            for index, ((path, _), of_base) in enumerate(zip(merged.blocks, layers, strict=True)):
                sides[0].come_to(of_base)
                information[str(index)] = found.of(_Side.over_block)
                between()
                emit(Advanced(index + 1, path))
            sides[0].come_to(len(base.blocks))
            information[NORM] = found.of(_Side.finished)
            if _has_own_head(base) and _has_own_head(merged):
                information[HEAD] = _of_heads(sides, len(texts))
        except Broken as reason:
            raise ModelError(f"ACM: the blocks of this model cannot be run one by one: {reason}", _WITHOUT) from reason
        except ForwardFailed as reason:
            if isinstance(reason.__cause__, Exception) and raised_here(reason.__cause__):
                raise reason.__cause__ from None
            raise ModelError(f"ACM: transformers cannot run this model: {reason}", _WITHOUT) from reason
    emit(PhaseEnded("compare"))
    return information


Take = Callable[[int, Tensor], None]  # number of the text, output


@dataclass
class _Pairs:
    """Compares both models' outputs of one step: the base's are kept until the merged model's come."""

    sides: Sequence[_Side]
    texts: int
    slots: list[Stored] = field(default_factory=list)

    def of(self, run: Callable[[_Side, Take], None]) -> list[float]:
        """Mutual information, in nats, of what `run` gives for both models, for each text."""
        base, merged = self.sides
        self.slots = self.slots or [Stored() for _ in range(self.texts)]
        found = [0.0] * self.texts

        def keep(number: int, output: Tensor) -> None:
            if number < self.texts:  # the canary comes after them
                base.runner.store.put(output.contiguous(), self.slots[number])

        def compare(number: int, output: Tensor) -> None:
            if number < self.texts:
                counts = PairCounts()
                _count(counts, base.runner.store.get(self.slots[number]), output)
                found[number] = counts.mutual_information()

        run(base, keep)
        run(merged, compare)
        return found


def _count(counts: PairCounts, x: Tensor, y: Tensor) -> None:
    try:
        counts.add(x, y)
    except ValueError as error:
        raise ModelError(f"ACM: {error} among the outputs that are compared", hint="are both models sound?") from error


class _Side:
    """One of the two models, and the hidden state that each text has reached in it. A context manager."""

    def __init__(self, runner: BlockRunner, texts: Sequence[Tensor]) -> None:
        self.runner, self._texts = runner, texts
        self._calls: list[list[Call]] = []  # of each text: every block's call, without the hidden state
        self.states: list[Stored] = []
        self._shared: dict[tuple[Any, ...], Stored] = {}  # parts of calls that several of them have
        self._next = 0  # the block before which the states are
        self._canary = SuspendedForward(runner, texts[-1])
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> _Side:
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.runner.set_up())
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def embedded(self, take: Take) -> None:
        """Record every text; `take` is given its embedding."""
        with _watching(self.runner.model.get_input_embeddings()) as seen:
            for number, tokens in enumerate(self._texts):
                calls, state = self._recorded(tokens)
                self._calls.append(calls)
                self.states.append(state)
                take(number, seen[-1])
        self._stack.enter_context(self._canary)

    def _recorded(self, tokens: Tensor) -> tuple[list[Call], Stored]:
        """All calls of a forward, and the hidden state before the first block."""
        runner = self.runner
        return runner.with_less(partial(recorded_calls, runner, tokens, self._shared, counted=False))

    def come_to(self, index: int) -> None:
        """Bring every text to the block `index`: from where it is, or, if that is beyond, from the beginning."""
        if index < self._next:
            self._start_again()
        while self._next < index:
            self.over_block(lambda number, output: None)

    def _start_again(self) -> None:
        store = self.runner.store
        for number, tokens in enumerate(self._texts):
            _, state = self._recorded(tokens)
            store.put(store.get(state), self.states[number])
            store.drop(state)
        self._canary.__exit__()
        self._canary = self._stack.enter_context(SuspendedForward(self.runner, self._texts[-1]))
        self._next = 0

    def over_block(self, take: Take) -> None:
        """Run every text through the next block; `take` is given the output of the block's MLP."""
        runner, store, canary, index = self.runner, self.runner.store, self._canary, self._next
        path, block = runner.blocks[index]
        true = canary.call.hidden if canary.index == index else None
        must_be_same(true, store.get(self.states[-1]), path)
        left = deque(range(len(self._texts)))  # so that what is done is not done again after a failed allocation

        def drive() -> Any:
            with _watching(_mlp_of(path, block)) as seen:
                while left:
                    number = left[0]
                    call = self._calls[number][index].from_store(store).having(store.get(self.states[number]))
                    output = runner.run_block(index, call)
                    if not seen:
                        raise ModelError(f"ACM: `{printable(path)}` does not call its MLP", _WITHOUT)
                    take(number, seen.pop())
                    store.put(hidden_of(output), self.states[number])
                    left.popleft()
                return runner.run_block(index, canary.call)

        canary.step(runner.with_block(index, drive))
        self._next += 1

    def finished(self, take: Take) -> None:
        """Run the rest of every forward; `take` is given the output head's input, which becomes the text's state."""
        head_inputs = []
        for number, tokens in enumerate(self._texts):
            forward = self.runner.with_less(partial(self._tail, tokens, number))
            if forward.head_input is None:
                raise Broken("this model does not call its output head")
            self.runner.store.put(forward.head_input, self.states[number])
            take(number, forward.head_input)
            head_inputs.append(forward.head_input if number == len(self._texts) - 1 else None)
        must_be_same(self._canary.head_input, head_inputs[-1], "the output head")

    def _tail(self, tokens: Tensor, number: int) -> TailForward:
        forward = TailForward(self.runner, self.runner.store.get(self.states[number]), counted=False)
        self.runner.forward(tokens, forward)
        return forward


@contextlib.contextmanager
def _watching(module: nn.Module) -> Iterator[list[Tensor]]:
    """Yield a list that holds the module's latest output."""
    seen: list[Tensor] = []

    def hook(part: nn.Module, args: Any, output: Any) -> None:
        seen[:] = [hidden_of(output)]

    handle = module.register_forward_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()


def _mlp_of(path: str, block: nn.Module) -> nn.Module:
    parts: dict[str, nn.Module] = dict(block.named_modules())
    name = next((name for name in MLPS if name in parts), None)
    if name is None:
        raise ModelError(
            f"ACM: `{printable(path)}` has no MLP under a known name",
            hint=f"known names are {', '.join(MLPS)}",
        )
    return parts[name]


# --- the output head --------------------------------------------------------------------------------------------------


def _has_own_head(runner: BlockRunner) -> bool:
    """Whether the model has a head that is not its embedding, and the files hold it: a reward model's do not."""
    head = runner.meta_model.head
    return runner.meta_model.has_head and f"{head}.weight" not in runner.model.all_tied_weights_keys


def _of_heads(sides: Sequence[_Side], texts: int) -> list[float]:
    """Compare the heads some rows at a time: the logits of all texts would be as many as tokens times vocabulary."""
    store = sides[0].runner.store
    counts = [PairCounts(store) for _ in range(texts)]
    longest = max(store.get(state).shape[-2] for state in sides[0].states[:texts])
    heads = [OutputHead(side.runner) for side in sides]
    rows = min(head.rows for head in heads)
    step = max(1, min(CHUNK // longest, HEAD_ELEMENTS // max(head.columns for head in heads)))
    for start in range(0, rows, step):
        parts = [head.part(start, min(start + step, rows)) for head in heads]
        for number, counted in enumerate(counts):
            logits = [
                nn.functional.linear(side.runner.store.get(side.states[number]), *part)
                for side, part in zip(sides, parts, strict=True)
            ]
            _count(counted, *logits)
    return [counted.mutual_information() for counted in counts]
