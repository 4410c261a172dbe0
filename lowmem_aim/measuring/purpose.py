"""The purpose for which all blocks of a model are run, and reports of how far that is."""

from __future__ import annotations

from torch import Tensor

from lowmem_aim.blocks.runner import BlockRunner
from lowmem_aim.events import Advanced, Emit, Notice, Snapshot, Worked


class Progress:
    """Reports progress once a block, also when a fallback goes through the blocks again."""

    def __init__(self, emit: Emit, *, before: float = 0.0, a_block: float = 1.0, what: str = "calibrated") -> None:
        """`before`: what is done of the phase when the first block begins; `a_block`: what a block adds to that."""
        self.emit, self._before, self._a_block, self._what = emit, before, a_block, what
        self._blocks = 0

    def found(self, blocks: int, of: int, path: str) -> None:
        """Report the blocks that an earlier run has finished."""
        self.emit(Notice(f"resuming: {blocks}/{of} blocks are {self._what}"))
        self.block(blocks - 1, path)

    def kept(self, blocks: float) -> None:
        """Report how many blocks a killed run would not have to run again."""
        self.emit(Snapshot(self._done(blocks)))

    def within(self, index: int, share: float) -> None:
        """Report that `share` of block `index` is done."""
        self.emit(Worked("compute", 0, 0.0, done=self._done(index + share)))

    def block(self, index: int, path: str) -> None:
        """Report that block `index` is done."""
        if index >= self._blocks:
            self._blocks = index + 1
            self.emit(Advanced(self._done(self._blocks), path))

    def _done(self, blocks: float) -> float:
        return self._before + self._a_block * blocks


class Purpose:
    """The purpose of running all blocks: here, counting the inputs of their modules."""

    counts = True  # whether inputs are counted in the runner's `watch`

    def take(self, runner: BlockRunner, number: int, head_input: Tensor | None) -> None:
        """Take what the output head is given for sequence `number`: (1, tokens, hidden); None: it was not called.

        If a way turns out to be wrong for the model, the next one gives every sequence again.
        """

    def finish(self, runner: BlockRunner) -> None:
        """Finish while the runner is still set up; every sequence was taken."""


COUNTING = Purpose()
