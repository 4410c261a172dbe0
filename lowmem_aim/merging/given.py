"""Space for matrices, and the moments of texts, block by block: all that methods which solve are given."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Protocol

from lowmem_aim.merging.effects import EffectSampler
from lowmem_aim.methods.method import Subject
from lowmem_aim.methods.moments import MatrixSpace, Moment
from lowmem_aim.planning.layout import subject_of
from lowmem_aim.planning.tasks import Plan, Task

if TYPE_CHECKING:
    from torch import Tensor


class BlockMoments(Protocol):
    """The moments of one block of all experts at a time; blocks only go forward."""

    def block_of(self, name: str) -> int | None:
        """The block that a tensor belongs to, by its name in the first expert; None: to none, or to several."""
        ...

    def come_to(self, block: int) -> None:
        """Measure a block. Raises ModelError, MemoryBudgetError, DiskError."""
        ...

    def of(self, names: Sequence[str]) -> list[list[Moment | None]]:
        """The moments of a tensor of the measured block: for each of its matrices, of each expert."""
        ...

    @property
    def takes(self) -> bool:
        """Whether the texts go through the merged blocks, so that their rows are to be given to `take`."""
        ...

    def take(self, name: str, rows: Tensor) -> None:
        """Take the next rows of a tensor of the measured block, merged, rounded and not relaxed. Raises DiskError."""
        ...

    def finished(self, block: int) -> None:
        """Take notice that the tensors of a block, and of those before, are all written durably. Raises DiskError."""
        ...


@dataclass(frozen=True)
class Given:
    """All that methods which solve are given."""

    space: MatrixSpace
    moments: BlockMoments | None = None  # None: no texts are measured

    def subject(self, task: Task, plan: Plan, shape: tuple[int, ...] | None = None) -> Subject:
        """The facts about a tensor, and what its method works with; `shape` in place of its own."""
        facts = subject_of(task, plan.recipe, plan.seed, shape)
        return replace(facts, space=self.space, moments=self._moments(task) if plan.recipe.texts else None)

    def block_of(self, task: Task) -> int | None:
        """The block that must be measured before a tensor is merged."""
        if self.moments is None or task.action == "copy":
            return None
        return self.moments.block_of(task.experts[0].tensor)

    def taker(self, task: Task) -> BlockMoments | None:
        """The one that takes the merged rows of a tensor, for the texts of the next block; None if nothing does."""
        takes = self.moments is not None and self.moments.takes and task.tile and self.block_of(task) is not None
        return self.moments if takes else None

    def sampler(self, task: Task) -> EffectSampler | None:
        """A sampler of the experts' effects in a tensor, whose block is measured; None where there are none."""
        moments = self._moments(task)
        reached = moments and any(moment for of_matrix in moments for moment in of_matrix)
        return EffectSampler(task, moments) if moments and reached else None

    def by_block(self, tasks: Iterable[Task]) -> Iterator[tuple[int | None, Iterator[Task]]]:
        """Yield tasks, in their order, with the block that must be measured before them.

        Tensors of a layer that belong to no block, such as buffers, go with those before them.
        """
        layer, block = None, None

        def key(task: Task) -> int | None:
            nonlocal layer, block
            own = self.block_of(task)
            layer, block = task.layer, block if own is None and layer is not None and task.layer == layer else own
            return block

        return groupby(tasks, key=key)

    def _moments(self, task: Task) -> list[list[Moment | None]] | None:
        if self.moments is None or not task.linear:
            return None
        if self.block_of(task) is None:  # no text reaches it
            matrices = task.shape[0] if len(task.shape) == 3 else 1
            return [[None] * len(task.experts) for _ in range(matrices)]
        return self.moments.of([source.tensor for source in task.experts])
