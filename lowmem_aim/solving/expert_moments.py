"""The second moments of one block for all experts at a time, and the way from block to block.

    1. record    one cheap forward a text, in its expert: what each block is called with
    2. measure   a block of each expert in turn: its weights come in, its texts go through, every linear's inputs X are
                 added up as X^T X, the weights go
    3. solve     the merge takes the moments and makes this block's weights; then the next block begins

All experts are in step, each on its own hidden states, which lie in stores. With a merged model the states are those
after the merged blocks (RegMean++), whose weights are solved from the moments of the block before.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from lowmem_aim.blocks.calls import ForwardFailed, raised_here
from lowmem_aim.blocks.forwards import Broken
from lowmem_aim.blocks.runner import BlockRunner
from lowmem_aim.blocks.shares import BOUNDLESS, Shares
from lowmem_aim.errors import ModelError, printable
from lowmem_aim.events import Emit, Notice, silent
from lowmem_aim.measuring.mean_activations import allocations_as_budget_errors
from lowmem_aim.measuring.steps import Steps
from lowmem_aim.methods.moments import MatrixSpace, Moment
from lowmem_aim.models.meta_model import MetaModel
from lowmem_aim.solving.input_moments import InputMoments
from lowmem_aim.solving.kept_states import KeptStates
from lowmem_aim.solving.matrices import Found, blocks_by_tensor, matrices_in, moments_by_tensor
from lowmem_aim.solving.states import MergedStates, OwnStates, States
from lowmem_aim.solving.texts import ExpertTexts, MergedModel
from lowmem_aim.system.memory import Budget

_WITHOUT = "`merge_method: covariance` needs no texts and runs no model"
# Of the memory for hidden states, the part that a merged model has; the experts then only hold what blocks are called
# with.
MERGED_PARTS, PARTS = 7, 8


class ExpertMoments:
    """The moments of one block of all experts. A context manager; blocks only go forward."""

    def __init__(
        self,
        experts: Sequence[ExpertTexts],
        space: MatrixSpace,
        device: torch.device,
        *,
        shares: Shares = BOUNDLESS,
        budget: Budget | None = None,
        spill: Path | None = None,
        kept: KeptStates | None = None,
        merged: MergedModel | None = None,
        emit: Emit = silent,
    ) -> None:
        """Prepare; nothing is run before `come_to`.

        The moments lie in `space`; `shares` are the parts of `budget` for running models, by `needs_of_moments`;
        `spill` is a folder for hidden states that do not fit; `kept` has snapshots of them. Raises ModelError if the
        experts' blocks are not as many.
        """
        self._experts, self._space, self._device = experts, space, device
        self._shares, self._budget, self._spill, self._emit = shares, budget, spill, emit
        self._kept = kept
        self.blocks = _number_of_blocks(experts)
        self._owners = blocks_by_tensor(experts[0].meta_model)
        self._statistics = [InputMoments(space, expert.label) for expert in experts]
        self._states = self._all_states(merged)
        self._merged = merged  # with it, a block is passed only while its moments are there
        self._stack = contextlib.ExitStack()
        self._begun = False
        self._measured = -1  # the block whose moments are there
        self._found: list[Found] = []  # of each expert

    def __enter__(self) -> ExpertMoments:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._found.clear()
        self._stack.close()

    # -- what the merge asks

    def block_of(self, name: str) -> int | None:
        """The block that a tensor belongs to, by its name in the first expert; None: to none, or to several."""
        return self._owners.get(name)

    def come_to(self, block: int) -> None:
        """Bring all experts to a block and measure it; the moments of the block before are dropped.

        Does nothing if the block is measured already. Raises ModelError if the blocks cannot be run one by one, or if
        inputs are not finite, MemoryBudgetError, DiskError.
        """
        if block == self._measured:
            return
        with torch.no_grad(), allocations_as_budget_errors(), self._as_model_errors():
            if not self._begun:
                self._begin(block)
            assert self._states.next <= block, "blocks only go forward"
            while self._states.next < block:
                if self.takes and self._measured != self._states.next:
                    self._measure(self._states.next)
                self._states.pass_block()
            if self._kept:
                self._kept.offer(self._states.sides, self._emit)
            self._measure(block)

    def of(self, names: Sequence[str]) -> list[list[Moment | None]]:
        """Return the moments of a tensor of the measured block: for each of its matrices, of each expert.

        `names`: what the tensor is called in each expert. A tensor has one matrix, or, if it is a stack of fused
        experts (experts, out, in), one for each. None: no token reached the matrix, or its inputs cannot be seen.
        """
        lists = [found.get(name) for found, name in zip(self._found, names, strict=True)]
        matrices = matrices_in(self._experts[0].meta_model, names[0])
        return [[None if own is None else own[matrix] for own in lists] for matrix in range(matrices)]

    @property
    def takes(self) -> bool:
        """Whether the texts go through the merged blocks, so that their rows are to be given to `take`."""
        return self._merged is not None

    def take(self, name: str, rows: Tensor) -> None:
        """Take the next rows of a tensor of the measured block, merged, rounded and not relaxed. Raises DiskError."""
        assert self._merged is not None
        self._merged.source.take(name, rows)

    def finished(self, block: int) -> None:
        """Take notice that the tensors of a block, and of those before, are all written durably. Raises DiskError."""
        if self._kept:
            self._kept.written(block + 1)

    # -- how it gets there

    def _begin(self, block: int) -> None:
        self._stack.enter_context(self._states)
        self._states.record()
        self._begun = True
        if self._kept and (reached := self._kept.restore(block, self._states.sides)):
            self._emit(Notice(f"resuming: the texts have passed {reached}/{self.blocks} blocks"))

    def _measure(self, block: int) -> None:
        self._measured = -1
        self._found.clear()
        for number, (expert, statistic) in enumerate(zip(self._experts, self._statistics, strict=True)):
            self._states.measure(number)
            self._found.append(moments_by_tensor(expert.meta_model, statistic.weights, statistic.taken()))
            statistic.weights.clear()
        self._space.settle()
        self._measured = block

    def _all_states(self, merged: MergedModel | None) -> States:
        tokens, parts = sum(expert.tokens for expert in self._experts), 1 if merged is None else PARTS
        left = parts if merged is None else PARTS - MERGED_PARTS
        experts = [
            Steps(
                self._runner(expert, self._shares.part(expert.tokens * left, tokens * parts), statistic),
                expert.sequences,
            )
            for expert, statistic in zip(self._experts, self._statistics, strict=True)
        ]
        if merged is None:
            return OwnStates(experts)
        texts = [tokens for expert in self._experts for tokens in expert.sequences]
        runner = self._runner(merged, self._shares.part(MERGED_PARTS, PARTS))
        return MergedStates(experts, Steps(runner, texts), merged.source)

    def _runner(
        self, model: ExpertTexts | MergedModel, shares: Shares, statistic: InputMoments | None = None
    ) -> BlockRunner:
        return BlockRunner(
            model.source, model.meta_model, self._device, shares, self._budget, self._spill, self._emit, statistic
        )

    @contextlib.contextmanager
    def _as_model_errors(self) -> Iterator[None]:
        try:
            yield
        except Broken as reason:
            raise ModelError(
                f"solving: the blocks of these models cannot be run one by one: {reason}", _WITHOUT
            ) from reason
        except ForwardFailed as reason:
            if isinstance(reason.__cause__, Exception) and raised_here(reason.__cause__):
                raise reason.__cause__ from None
            raise ModelError(f"solving: transformers cannot run these models: {reason}", _WITHOUT) from reason


def _number_of_blocks(experts: Sequence[ExpertTexts]) -> int:
    counts = {expert.label: _blocks(expert.meta_model) for expert in experts}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"`{printable(label)}` has {count}" for label, count in counts.items())
        raise ModelError(f"solving: the experts run side by side, but their blocks are not as many: {listed}", _WITHOUT)
    return next(iter(counts.values()))


def _blocks(meta_model: MetaModel) -> int:
    meta_model.require_blocks()
    return len(meta_model.blocks)
