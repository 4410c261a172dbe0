"""Drivers: ways to run a forward of a model whose blocks are run one at a time.

RecordingForward   records each block's arguments; every block passes its input on unchanged
TailForward        ends a forward, its last block giving a known hidden state
SuspendedForward   an ordinary forward, in a thread of its own, that stops at each block
PagedForward       an ordinary forward that loads each block when it is called
GivenLogits        a forward through no block, whose output head gives known logits
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lowmem_aim.blocks.calls import Call, Forward
from lowmem_aim.blocks.past import without_past
from lowmem_aim.blocks.runner import BlockRunner
from lowmem_aim.system.tensor_store import Stored
from lowmem_aim.system.tensors import digest


class Broken(Exception):
    """A way of running the blocks does not work for this model; the text says why."""


class _Handed(Tensor):
    """A hidden state that a block passes on unchanged, whether the model expects a tensor or a tuple of one."""

    # Any operation gives plain tensors again.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __getitem__(self, index: Any) -> Any:
        # With four dimensions, the first above 1, it is a stack of states (Gemma 3n): `[0]` asks for the first of them.
        taken_from_tuple = type(index) is int and index == 0 and (self.shape[0] == 1 or self.dim() == 3)
        return self.as_subclass(Tensor) if taken_from_tuple else super().__getitem__(index)


@dataclass
class RecordingForward(Forward):
    """A forward that records each block's arguments; every block passes its input on unchanged."""

    runner: BlockRunner
    shared: dict[tuple[Any, ...], Stored]  # masks and rotary tables, which sequences of one length have in common
    calls: list[Call]  # of each block so far; their tensors are in the runner's store
    state: Tensor | None = None  # what the first block is given: (rows, tokens, hidden)
    _met: dict[tuple[int, int], tuple[Tensor, Stored]] = field(default_factory=dict)  # by id and version

    def block(self, index: int, call: Call) -> Any:
        """Record the call of block `index`, and return its hidden state unchanged.

        Raises Broken if blocks are called out of order, or if the hidden state has changed since the first block.
        """
        self.runner.watch.switch(False)  # from here on, modules are given a hidden state that is not the true one
        hidden = call.hidden
        if index != len(self.calls):
            raise Broken("this model does not call its blocks once each, in order")
        if self.state is None:
            self.state = hidden
        if hidden.data_ptr() != self.state.data_ptr() or hidden.shape != self.state.shape:
            raise Broken("this model works on the hidden state between blocks")
        self.calls.append(call.having(None).mapped(self._put_away))
        return hidden.as_subclass(_Handed)

    def _put_away(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return without_past(value)
        known = self._met.get((id(value), value._version))  # most blocks are given the same mask
        if known is not None:
            return known[1]
        # By content, since every forward makes its masks anew; with the strides, since kernels may depend on them.
        key = (value.dtype, value.shape, value.stride(), digest(value.cpu().contiguous()))
        if key not in self.shared:
            self.shared[key] = self.runner.store.put(value)
        self._met[id(value), value._version] = value, self.shared[key]
        return self.shared[key]


@dataclass
class TailForward(Forward):
    """A forward that ends as the true one does: its last block gives the true hidden state."""

    runner: BlockRunner
    state: Tensor  # what the last block gives
    counted: bool  # whether the inputs of modules after the last block count
    head_input: Tensor | None = None  # (rows, tokens, hidden), once the head has been called

    def block(self, index: int, call: Call) -> Any:
        """Pass the block's input on; at the last block, give the true hidden state.

        Inputs count from the last block on, if `counted`.
        """
        last = index == len(self.runner.blocks) - 1
        self.runner.watch.switch(last and self.counted)
        return (self.state if last else call.hidden).as_subclass(_Handed)

    def head(self, x: Tensor) -> Tensor | None:
        """Keep the output head's input, (1, tokens, hidden), and count it if inputs count now."""
        self.head_input = x
        self.runner.count_head(x)
        return None


class _Closed(BaseException):
    """Unwinds a suspended forward that is no longer wanted; a BaseException, so that no model code catches it."""


class SuspendedForward(Forward):
    """An ordinary forward in a thread of its own that stops at each block until its owner gives the block's output.

    A context manager. Either the owner or the thread runs, never both. Blocks run in the owner's thread, so that the
    forward's thread only runs what lies between them.
    """

    def __init__(self, runner: BlockRunner, tokens: Tensor, *, counted: bool = False) -> None:
        self.runner, self.tokens, self.counted = runner, tokens, counted
        self.ended = False  # by an exception
        self.index = -1  # of the block whose output the forward waits for; -1: it has not begun, or has ended
        self.call = Call((), {})
        self.head_input: Tensor | None = None
        self._to_thread: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._to_owner: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._body, daemon=True)

    def __enter__(self) -> SuspendedForward:
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
        """Give the current block's output, and let the forward run to its next block or to its end.

        Raises what the forward raises, and Broken if the forward has already ended with an exception.
        """
        self._let_run(lambda: self._to_thread.put(output))

    def _let_run(self, start: Callable[[], None]) -> None:
        if self.ended:
            raise Broken("a suspended forward has ended before its last block")  # its thread would never answer
        with self.runner.watch.counting(self.counted):  # by the owner: the thread runs only in here
            start()
            arrived = self._to_owner.get()
        if isinstance(arrived, BaseException):
            self.ended = True
            raise arrived
        self.index, self.call = arrived

    def _body(self) -> None:
        try:
            with torch.no_grad():  # a thread starts with gradients on
                self.runner.forward(self.tokens, self)
            self._to_owner.put((-1, Call((), {})))
        except _Closed:
            pass
        except BaseException as error:
            self._to_owner.put(error)

    def block(self, index: int, call: Call) -> Any:
        """Hand the call to the owner, and wait in the forward's thread for the block's output."""
        self._to_owner.put((index, call))
        output = self._to_thread.get()
        if isinstance(output, _Closed):
            raise output
        return output

    def head(self, x: Tensor) -> Tensor | None:
        """Keep the output head's input, (1, tokens, hidden), and count it if inputs count now."""
        self.head_input = x
        self.runner.count_head(x)
        return None


@dataclass
class PagedForward(Forward):
    """An ordinary forward that loads each block when it is called."""

    runner: BlockRunner
    head_input: Tensor | None = None

    def block(self, index: int, call: Call) -> Any:
        """Load block `index`, run it, drop its weights, and return its output."""
        return self.runner.with_block(index, lambda: self.runner.run_block(index, call))

    def head(self, x: Tensor) -> Tensor | None:
        """Keep the output head's input, (1, tokens, hidden), and count it if inputs count now."""
        self.head_input = x
        self.runner.count_head(x)
        return None


@dataclass
class GivenLogits(Forward):
    """A forward that shows what the model does to its logits: its blocks are left out, its output head is not asked."""

    logits: Tensor  # what the output head gives

    def block(self, index: int, call: Call) -> Any:
        """Pass the block's input on."""
        return call.hidden.as_subclass(_Handed)

    def head(self, x: Tensor) -> Tensor:
        """Give the known logits."""
        return self.logits
