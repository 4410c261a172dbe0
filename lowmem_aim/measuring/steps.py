"""A model that is stepped over texts, block by block, by whoever wants to see something of each block.

The texts are recorded, and a canary checks that this is right for the model, as `blocks/recorder.py` describes.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lowmem_aim.blocks.calls import Call, hidden_of
from lowmem_aim.blocks.forwards import Broken, SuspendedForward, TailForward
from lowmem_aim.blocks.recorder import CANARY_TOKENS, must_be_same, recorded_calls
from lowmem_aim.blocks.runner import BlockRunner
from lowmem_aim.measuring.snapshots import BlockProgress, in_store
from lowmem_aim.system.tensor_store import Stored

Take = Callable[[int, Tensor], None]  # number of the text, the hidden state that it has reached


def ignore(number: int, state: Tensor) -> None:
    """Take nothing."""


class Steps:
    """A model that is stepped over texts, and the hidden state that each has reached. A context manager.

    All methods raise Broken if the blocks cannot be run one by one, ForwardFailed, ModelError, MemoryBudgetError and
    DiskError. They must be called without gradients.
    """

    def __init__(self, runner: BlockRunner, texts: Sequence[Tensor]) -> None:
        """`texts`: (tokens,) int64 each."""
        self.runner, self.texts = runner, len(texts)
        self._tokens = [*texts, texts[0][:CANARY_TOKENS]]  # the canary's copy comes last
        self.so_far = BlockProgress([], [])  # not begun
        self._shared: dict[tuple[Any, ...], Stored] = {}  # parts of calls that several of them have
        self._dtype: torch.dtype | None = None  # of states that the blocks are given `beside`
        self._canary = SuspendedForward(runner, self._tokens[-1])
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Steps:
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.runner.set_up())
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    @property
    def next(self) -> int:
        """The number of the block before which the texts are."""
        return self.so_far.blocks

    def record(self, take: Take = ignore) -> None:
        """Record every text; `take` is given the state before its first block."""
        calls, states = list[Sequence[Call]](), list[Stored]()
        for number in range(len(self._tokens)):
            own, state = self._recorded(number)
            calls.append(own)
            states.append(state)
            if number < self.texts:
                take(number, self.runner.store.get(state))
        self.so_far = BlockProgress(calls, states)
        self._stack.enter_context(self._canary)

    def record_calls(self) -> None:
        """Record every text for `beside` alone: without states, and without the canary."""
        for number in range(self.texts):
            own, state = self._recorded(number)
            self.so_far.calls.append(own)
            self._dtype = self.runner.store.get(state).dtype
            self.runner.store.drop(state)

    def _recorded(self, number: int) -> tuple[list[Call], Stored]:
        """All calls of a forward, and the hidden state before the first block."""
        record = partial(recorded_calls, self.runner, self._tokens[number], self._shared, counted=False)
        return self.runner.with_less(record)

    def come_to(self, index: int) -> None:
        """Bring every text to the block `index`: from where it is, or, if that is beyond, from the beginning."""
        if index < self.next:
            self._start_again()
        while self.next < index:
            self.over_block()

    def _start_again(self) -> None:
        store = self.runner.store
        for number, slot in enumerate(self.so_far.states):
            _, state = self._recorded(number)
            store.put(store.get(state), slot)
            store.drop(state)
        for output in self.so_far.outputs:
            for slot in output.slots():
                store.drop(slot)
        self.so_far.outputs.clear()
        self._canary.__exit__()
        self._canary = self._stack.enter_context(SuspendedForward(self.runner, self._tokens[-1]))

    def catch_up(self) -> None:
        """Step the canary over the blocks whose outputs were put in `so_far`."""
        for output in self.so_far.outputs:
            self._canary.step(output.from_store(self.runner.store).args[0])

    def over_block(self, take: Take = ignore, *, counted: bool = False) -> None:
        """Run every text through the next block; `take` is given its state before that becomes the text's.

        `counted`: the inputs of the block's modules count.
        """
        runner, store, states, index = self.runner, self.runner.store, self.so_far.states, self.next
        true = self._canary.call.hidden if self._canary.index == index else None
        must_be_same(true, store.get(states[-1]), runner.blocks[index][0])
        left = deque(range(len(states)))  # so that what is done is not done again after a failed allocation

        def drive() -> Any:
            while left:
                number = left[0]
                hidden = self._through(index, number, store.get(states[number]), counted=counted)
                if number < self.texts:
                    take(number, hidden)
                store.put(hidden, states[number])  # the last that can fail
                runner.watch.commit()
                left.popleft()
            return runner.run_block(index, self._canary.call)

        output = runner.with_block(index, drive)
        self.so_far.outputs.append(in_store(output, runner))
        self._canary.step(output)

    def beside(self, index: int, state_of: Callable[[int], Tensor]) -> None:
        """Run block `index` on other states than the texts' own, for what its modules are given; that counts.

        `state_of`: text -> the hidden state before the block, in any dtype. The outputs are dropped.
        """
        left = deque(range(self.texts))

        def drive() -> None:
            while left:
                self._through(index, left[0], state_of(left[0]).to(self._dtype), counted=True)
                self.runner.watch.commit()
                left.popleft()

        self.runner.with_block(index, drive)

    def _through(self, index: int, number: int, state: Tensor, *, counted: bool) -> Tensor:
        """A text's hidden state after block `index`; the canary's copy never counts."""
        call = self.so_far.calls[number][index].from_store(self.runner.store).having(state)
        with self.runner.watch.counting(counted and number < self.texts):
            return hidden_of(self.runner.run_block(index, call))

    def finish(self, take: Take) -> None:
        """Run the rest of every forward; `take` is given the output head's input, which becomes the text's state."""
        head_input = None
        for number, slot in enumerate(self.so_far.states):
            head_input = self.runner.with_less(partial(self._tail, number, slot)).head_input
            if head_input is None:
                raise Broken("this model does not call its output head")
            self.runner.store.put(head_input, slot)
            if number < self.texts:
                take(number, head_input)
        must_be_same(self._canary.head_input, head_input, "the output head")

    def _tail(self, number: int, slot: Stored) -> TailForward:
        forward = TailForward(self.runner, self.runner.store.get(slot), counted=False)
        self.runner.forward(self._tokens[number], forward)
        return forward
