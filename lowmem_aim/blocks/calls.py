"""The calls of a model's blocks: their arguments and outputs, and the one who decides what happens at each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lowmem_aim.system.tensor_store import Stored, TensorStore


class Forward:
    """Decides what happens at each block and at the output head of a forward."""

    def block(self, index: int, call: Call) -> Any:
        """Return the output of block `index` for this call."""
        raise NotImplementedError

    def head(self, x: Tensor) -> None:
        """Take what the output head is given: `x`, (1, tokens, hidden)."""


@dataclass(frozen=True)
class Call:
    """The arguments of one call of a block. The hidden state is the first, by position or by keyword."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def key(self) -> str:
        """The keyword of the hidden state, in a call without positional arguments."""
        return next(iter(self.kwargs)) if "hidden_states" not in self.kwargs else "hidden_states"

    @property
    def hidden(self) -> Tensor:
        """The hidden state, in most models (1, tokens, hidden)."""
        state: Tensor = self.args[0] if self.args else self.kwargs[self.key]
        return state

    def having(self, hidden: Tensor | None) -> Call:
        """Copy the call with `hidden` as its hidden state."""
        if self.args:
            return Call((hidden, *self.args[1:]), self.kwargs)
        return Call((), {**self.kwargs, self.key: hidden})

    def mapped(self, change: Callable[[Any], Any]) -> Call:
        """Copy the call with `change` applied to each argument, and to each part of an argument that is a tuple."""

        def changed(value: Any) -> Any:
            return tuple(map(changed, value)) if type(value) is tuple else change(value)

        return Call(tuple(map(changed, self.args)), {key: changed(value) for key, value in self.kwargs.items()})

    def slots(self) -> list[Stored]:
        """The places of the call's tensors in the store, if they were put there."""
        found: list[Stored] = []
        self.mapped(lambda value: found.append(value) if isinstance(value, Stored) else None)
        return found

    def from_store(self, store: TensorStore) -> Call:
        """Copy the call with the tensors themselves instead of their places in the store. Raises DiskError."""
        return self.mapped(lambda value: store.get(value) if isinstance(value, Stored) else value)


def hidden_of(output: Any) -> Tensor:
    """The hidden state in a block's output: the output itself, or the first item of a tuple or list."""
    state: Tensor = output[0] if isinstance(output, (tuple, list)) else output
    return state
