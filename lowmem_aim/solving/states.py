"""The hidden states that the texts have reached: after their own expert's blocks, or after the merged ones."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from types import TracebackType
from typing import Protocol

from torch import Tensor

from lowmem_aim.measuring.comparison import Merged
from lowmem_aim.measuring.steps import Steps


class States(contextlib.AbstractContextManager["States"], Protocol):
    """The hidden states of all experts' texts, before one block. A context manager. Raises what `Steps` raises."""

    sides: Sequence[Steps]  # the models that the states are of

    @property
    def next(self) -> int:
        """The number of the block before which the states are."""
        ...

    def record(self) -> None:
        """Record all texts; their states are then before the first block."""
        ...

    def measure(self, expert: int) -> None:
        """Run an expert's texts through its next block, whose inputs count."""
        ...

    def pass_block(self) -> None:
        """Bring all states past the next block, whose inputs do not count."""
        ...


class OwnStates(States):
    """States after each expert's own blocks: measuring a block passes it."""

    def __init__(self, experts: Sequence[Steps]) -> None:
        self.sides = experts
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> OwnStates:
        _enter(self._stack, self.sides)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def next(self) -> int:
        """The number of the block before which the states are."""
        return min(side.next for side in self.sides)

    def record(self) -> None:
        """Record all texts; their states are then before the first block."""
        for side in self.sides:
            side.record()

    def measure(self, expert: int) -> None:
        """Run an expert's texts through its next block, whose inputs count."""
        self.sides[expert].over_block(counted=True)

    def pass_block(self) -> None:
        """Bring all states past the next block, whose inputs do not count."""
        for side in self.sides:
            side.over_block()


class MergedStates(States):
    """States after the merged model's blocks: each expert's block is run beside them (RegMean++, arXiv 2508.03121)."""

    def __init__(self, experts: Sequence[Steps], merged: Steps, weights: Merged) -> None:
        """`merged` has the texts of all experts, in their order."""
        self.sides = [merged]
        self._experts, self._weights = experts, weights
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> MergedStates:
        _enter(self._stack, [*self.sides, *self._experts])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def next(self) -> int:
        """The number of the block before which the states are."""
        return self.sides[0].next

    def record(self) -> None:
        """Record all texts in the merged model, whose states count, and in their expert."""
        self.sides[0].record()
        for expert in self._experts:
            expert.record_calls()

    def measure(self, expert: int) -> None:
        """Run an expert's texts through its next block, whose inputs count."""
        merged, before = self.sides[0], sum(one.texts for one in self._experts[:expert])

        def state_of(number: int) -> Tensor:
            return merged.runner.store.get(merged.so_far.states[before + number])

        self._experts[expert].beside(self.next, state_of)

    def pass_block(self) -> None:
        """Bring all states past the next merged block, whose moments must be there: its weights are solved now."""
        self.sides[0].over_block()
        self._weights.forget()


def _enter(stack: contextlib.ExitStack, models: Sequence[Steps]) -> None:
    with contextlib.ExitStack() as entering:
        for model in models:
            entering.enter_context(model)
        stack.push(entering.pop_all())
