"""A merge of which nothing is written: finished rows go nowhere, and what is found out about their tensors is kept."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

from lowmem_aim.events import Emit
from lowmem_aim.output.tensor_facts import Read, TensorFacts
from lowmem_aim.planning.tasks import Plan, Task

if TYPE_CHECKING:
    from torch import Tensor


class Unwritten:
    """The place of `shards.Shards` in a merge of which nothing is written: all tensors are left to be done."""

    def __init__(self, plan: Plan, emit: Emit, output: str = "") -> None:
        """`output` is the output's name in events, if there are several."""
        self.facts = TensorFacts(emit, output)
        self.digests: dict[str, str] = {}
        self.read_before: list[Read] = []
        self.left: list[Task] = [task for shard in plan.shards for task in shard.tasks]

    def append(self, task: Task, rows: Tensor) -> None:
        """Let the rows go."""

    def tensor_done(self, task: Task, read: Read) -> None:
        """Keep the facts about a tensor, and tell that it is finished."""
        self.facts.add(read)
        self.facts.tell(task)

    def settle(self) -> None:
        """Wait for nothing."""

    def __enter__(self) -> Unwritten:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass
