"""A model made runnable, its blocks and its output head left to whoever runs a forward.

A block's weights are loaded and dropped through accelerate's offload hooks, all at once or, where memory is short,
module by module. In every forward a `Forward` decides what happens at each block and at the head. All changes to the
model are undone when the set-up ends, also after an exception.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowmem_aim.blocks.beside import Beside
from lowmem_aim.blocks.calls import Call, Forward, model_code
from lowmem_aim.blocks.means import Means
from lowmem_aim.blocks.observer import Statistic, Watch
from lowmem_aim.blocks.offload import ReadWhileAbsent, Source, Weights
from lowmem_aim.blocks.past import as_if_after
from lowmem_aim.blocks.shares import BOUNDLESS, SHORTER, SMALLEST_PAGED, Shares, owners, paged, size_of
from lowmem_aim.errors import MemoryBudgetError, printable
from lowmem_aim.events import Emit, Notice, Worked, silent
from lowmem_aim.models.meta_model import MetaModel
from lowmem_aim.system.memory import Budget, is_allocation_failure, trim
from lowmem_aim.system.tensor_store import TensorStore
from lowmem_aim.units import shown

R = TypeVar("R")
LESS = f"{SHORTER}; close other programs, or use `--device cpu`"


class BlockRunner:
    """A model with everything outside its blocks loaded; each forward decides what happens at blocks and head."""

    def __init__(
        self,
        base: Source,
        meta_model: MetaModel,
        device: torch.device,
        shares: Shares = BOUNDLESS,
        budget: Budget | None = None,
        spill: Path | None = None,
        emit: Emit = silent,
        statistic: Statistic | None = None,
    ) -> None:
        """Prepare the runner; the model itself is changed only by `set_up`.

        `shares` are the parts of `budget`; `spill` is a folder for hidden states that do not fit in memory. Inputs that
        count go to `statistic` (None: to `means`).
        """
        self.meta_model, self.device, self._emit = meta_model, device, emit
        self.model, self.blocks = meta_model.model, meta_model.blocks
        self.weights = Weights(base, meta_model, device, emit)
        self.means = Means()
        self.watch = Watch(statistic or self.means)
        self.store = TensorStore(device, device_bytes=shares.device_states, ram_bytes=shares.ram_states, folder=spill)
        self.shares, self._room = shares, shares.weights  # _room: bytes of a block's weights in memory at a time
        self._budget = budget
        self._stay: set[str] = set()  # modules whose weights are read without calling them
        self._short = False  # an allocation has failed
        self._forwards: list[Callable[..., Any]] = []  # the blocks' own
        inside = {id(part) for _, block in self.blocks for part in block.modules()}
        self._beside = [(path, part) for path, part in self.model.named_modules() if id(part) not in inside]
        self._current = threading.local()  # suspended forwards run in threads of their own

    def forward(self, tokens: Tensor, forward: Forward, past: int | None = None) -> Any:
        """Run one forward of the model on `tokens`, int64, (tokens,) or (rows, tokens); `forward` handles blocks, head.

        `past`: how many tokens come before these, whose keys and values the blocks are given; None: blocks neither take
        nor keep any. Returns what the model gives. Raises ForwardFailed for what the model's code raises; so does
        `run_block`.
        """
        self._current.now = forward
        with model_code(), self.watch.experts(self._beside):
            before = {} if past is None else {"past_key_values": as_if_after(self.model, past)}
            read = tokens if tokens.dim() == 2 else tokens[None]
            given = self.model(input_ids=read.to(self.device), use_cache=past is not None, **before)
        trim()  # else tensors kept from many forwards end up between the holes that those forwards leave
        return given

    def run_block(self, index: int, call: Call) -> Any:
        """Run block `index`, whose weights must be loaded, and return its output.

        Inputs noted in a run that fails are discarded; those of a run that succeeds count once they are committed, by
        the caller or by the next run.
        """
        self.watch.commit()
        self.watch.statistic.settle()
        if self._budget is not None and self._budget.ram_left() < self.shares.ram_work:
            trim()  # what earlier sequences freed may lie in the heap, in pieces of the wrong size
        begun = time.perf_counter()
        try:
            with model_code():
                output = self._forwards[index](*call.args, **call.kwargs)
        except BaseException:
            self.watch.discard()
            raise
        self._emit(Worked("compute", 0, time.perf_counter() - begun, self.blocks[index][0]))
        return output

    @contextlib.contextmanager
    def loaded(self, index: int) -> Iterator[None]:
        """Load block `index`, or as much as fits while its other modules come and go, and observe its inputs.

        Raises ModelError at the end if inputs were not finite, and MemoryBudgetError if what must stay does not fit.
        """
        path, block = self.blocks[index]
        parts = list(block.named_modules(prefix=path))
        away = self._paged(index)
        with contextlib.ExitStack() as undo:
            undo.callback(trim)
            for name, module in owners(path, block):
                bring = self.weights.coming if name in away else self.weights.there
                undo.enter_context(bring(name, module))
            if index + 1 < len(self.blocks) and not away:  # a paged block is read again: it needs the system's cache
                following, after = self.blocks[index + 1]
                self.weights.expect(name for name, _ in after.named_parameters(prefix=following))
            with self.watch.on(parts), self.watch.experts(parts):
                yield
            self.watch.check(f"{path}.")

    def with_block(self, index: int, work: Callable[[], R]) -> R:
        """Return work() with block `index` loaded; after each failed allocation, try again with less in memory.

        `work` must not repeat what it has finished. Raises MemoryBudgetError when nothing more can be dropped.
        """
        while True:
            try:
                with self.loaded(index):
                    return work()
            except ReadWhileAbsent as error:
                if error.module in self._stay:
                    raise  # never again and again
                self._stay.add(error.module)
            except Exception as error:
                if not is_allocation_failure(error):
                    raise
                self._short = True
            self.watch.discard()
            if self._short:  # outside the handlers: the exceptions' frames hold tensors
                self._short = False
                self._lessen(index)

    def with_less(self, work: Callable[[], R]) -> R:
        """Return work(); if an allocation fails, try once more without hidden states on the device. Not for blocks.

        Raises MemoryBudgetError if no hidden state was on the device.
        """
        try:
            return work()
        except Exception as error:
            if not is_allocation_failure(error):
                raise
        self.watch.discard()
        if not self.store.leave_device():
            raise MemoryBudgetError("memory ran out for the parts outside the blocks", hint=LESS)
        return work()

    # -- weights that come and go

    def _paged(self, index: int) -> set[str]:
        path, block = self.blocks[index]
        sizes = {name: size_of(module) for name, module in owners(path, block)}
        # A block's own parameters always stay: the block's forward is called directly, past all hooks.
        away = paged(sizes, self._room, self._stay | {path})
        there = sum(size for name, size in sizes.items() if name not in away)
        if self._stay & sizes.keys() and there + max((sizes[name] for name in away), default=0) > self._room:
            raise MemoryBudgetError(
                f"this model reads weights without calling their modules: {shown(there)} of a block must stay in "
                f"memory, `{printable(min(self._stay))}` among them, and that does not fit the budget",
                hint="give more memory (`--ram`, `--vram`)",
            )
        return away

    def _lessen(self, index: int) -> None:
        """Free something after a failed allocation. Raises MemoryBudgetError if there is nothing to free."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        # Hidden states first: a paged module is read again for every sequence, a hidden state once a block.
        if self.store.leave_device():
            self._emit(Notice("memory ran short: hidden states leave the device", "warning"))
            return
        if self.watch.statistic.leave_device():
            self._emit(Notice("memory ran short: what is measured leaves the device", "warning"))
            return
        if self._room == 0:
            raise MemoryBudgetError(
                f"one sequence in `{printable(self.blocks[index][0])}` does not fit the memory that is "
                "left, even with its modules brought in one by one",
                hint=LESS,
            )
        path, block = self.blocks[index]
        there = min(self._room, sum(size_of(module) for _, module in owners(path, block)))
        self._room = there // 2 if there > SMALLEST_PAGED else 0
        self._emit(Notice("memory ran short: fewer of a block's weights stay in it at a time", "warning"))

    @contextlib.contextmanager
    def set_up(self) -> Iterator[None]:
        """Make the model runnable during this block, and undo every change at its end. Raises ModelError, DiskError."""
        with contextlib.ExitStack() as undo:
            undo.enter_context(self.store)
            undo.enter_context(_saying(self.device))
            undo.enter_context(Beside(self.meta_model, self.weights, self.watch, self.device).placed())
            for index, (_, block) in enumerate(self.blocks):
                self._forwards.append(block.forward)
                _override(undo, block, self._block_stub(index))
            if self.meta_model.head:
                _override(undo, self.model.get_submodule(self.meta_model.head), self._head_stub)
            yield

    def _block_stub(self, index: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._current.now.block(index, Call(args, kwargs))

        return forward

    def _head_stub(self, x: Tensor) -> Tensor:
        known: Tensor | None = self._current.now.head(x)
        if known is not None:
            return known
        return x.new_zeros(*x.shape[:-1], 1)  # one logit, for what the model does to logits

    def count_head(self, x: Tensor) -> None:
        """Count the output head's input, (1, tokens, hidden), if inputs count now."""
        head = self.model.get_submodule(self.meta_model.head)
        self.watch.count(f"{self.meta_model.head}.weight", head.weight, x)


@contextlib.contextmanager
def _saying(device: torch.device) -> Iterator[None]:
    """Let transformers' models say that they are on `device`, not where their first, absent weight is.

    Idefics 3 moves the embedded tokens to where it says it is.
    """
    before = vars(PreTrainedModel).get("device")
    PreTrainedModel.device = property(lambda model: device)
    try:
        yield
    finally:
        if before is None:
            del PreTrainedModel.device
        else:  # of another runner, around this one
            PreTrainedModel.device = before


def _override(undo: contextlib.ExitStack, module: nn.Module, forward: Callable[..., Any]) -> None:
    """Replace the forward of one module, not of its class, until `undo` unwinds."""
    if "forward" in vars(module):
        undo.callback(setattr, module, "forward", module.forward)
    else:
        undo.callback(vars(module).pop, "forward")
    module.forward = forward
