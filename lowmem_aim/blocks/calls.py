"""The calls of a model's blocks: their arguments and outputs, and the one who decides what happens at each."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lowmem_aim.errors import LowmemAimError, printable
from lowmem_aim.system.memory import is_allocation_failure
from lowmem_aim.system.tensor_store import Stored, TensorStore

_PLAIN = frozenset({bool, int, float, str, type(None)})


class ForwardFailed(Exception):
    """The model's own code raised while it ran; the cause is what it raised, the text says what that was."""


@contextlib.contextmanager
def model_code() -> Iterator[None]:
    """Raise ForwardFailed for what a model's code raises within this block.

    Errors of this project, weights that are not loaded and allocations that fail pass unchanged.
    """
    try:
        yield
    except (LowmemAimError, ForwardFailed, OSError):
        raise
    except Exception as error:
        if is_allocation_failure(error) or type(error).__module__.startswith("lowmem_aim."):  # Broken, ReadWhileAbsent
            raise
        said = (str(error).strip() or "no message").splitlines()[0]
        raise ForwardFailed(f"{type(error).__name__}: {printable(said)}") from error


def raised_here(error: BaseException) -> bool:
    """Whether the code of this project raised `error`, not the model's or a library's."""
    frames = list(traceback.walk_tb(error.__traceback__))
    return bool(frames) and str(frames[-1][0].f_globals.get("__name__", "")).startswith("lowmem_aim.")


class Forward:
    """Decides what happens at each block and at the output head of a forward."""

    def block(self, index: int, call: Call) -> Any:
        """Return the output of block `index` for this call."""
        raise NotImplementedError

    def head(self, x: Tensor) -> Tensor | None:
        """Take what the output head is given: `x`, (1, tokens, hidden). Returns the head's output, if it is known."""
        return None


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

    def key_of_parts(self) -> Hashable:
        """A key that two calls share only if their parts are the same; one of stored tensors, by their places."""

        def key(value: Any) -> Hashable:
            if type(value) is tuple:
                return tuple(map(key, value))
            return (type(value), value if type(value) in _PLAIN else id(value))  # 1 is not True

        return (key(self.args), tuple((name, key(value)) for name, value in self.kwargs.items()))

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
