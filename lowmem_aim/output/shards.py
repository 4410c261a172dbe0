"""The shards of an output while they are written: what an earlier run has finished, what is left, what is durable."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

from lowmem_aim.events import Emit, Notice, Worked
from lowmem_aim.output.journal import Journal
from lowmem_aim.output.merged import DeltaKept, Effect
from lowmem_aim.output.records import Group
from lowmem_aim.output.tensor_facts import ByModel, Read, TensorFacts
from lowmem_aim.output.writer import Commit, Prefix, ShardWriter, finished_prefix
from lowmem_aim.planning.tasks import Plan, Shard, Task
from lowmem_aim.system.files import disk_errors
from lowmem_aim.system.tensors import raw
from lowmem_aim.units import shown

if TYPE_CHECKING:
    from torch import Tensor

V = TypeVar("V")


class Shards:
    """The shards of one output, each begun with its first row and closed with its last. A context manager.

    Entering it checks what an earlier run has finished, and lists the tasks that are `left`.
    """

    def __init__(self, plan: Plan, staging: Path, journal: Journal, emit: Emit, output: str = "") -> None:
        """Prepare; nothing is read or written before the shards are entered.

        `output` is the output's name in events, if there are several.
        """
        self._plan, self._staging, self._journal, self._emit = plan, staging, journal, emit
        self._shards = {task.name: shard for shard in plan.shards for task in shard.tasks}
        self._writers: dict[str, ShardWriter] = {}  # those that are open, by file name: one at most
        self._prefixes: dict[str, Prefix] = {}  # what was found of the shards, by file name
        self._written = 0  # bytes that have gone to the disk
        self.facts = TensorFacts(emit, output)
        self.digests: dict[str, str] = {}  # file name -> sha256
        self.read_before: list[Read] = []  # of the tensors that were found
        self.left: list[Task] = []

    def _left_of(self, shard: Shard) -> tuple[Task, ...]:
        file = self._staging / shard.name
        prefix, groups = finished_prefix(file, self._journal.groups(shard.name))
        if prefix is None:
            with disk_errors(file):
                file.unlink(missing_ok=True)
            return shard.tasks
        self._prefixes[shard.name] = prefix
        for read in map(_read_before, groups):
            self.read_before.append(read)
            self.facts.add(read)
        for task in shard.tasks[: prefix.tensors]:
            self.facts.tell(task, earlier=True)
        if prefix.tensors == len(shard.tasks):
            with ShardWriter(file, shard.nbytes, prefix=prefix) as writer:  # cuts off what may have come after the end
                self.digests[shard.name] = writer.close()
        return shard.tasks[prefix.tensors :]

    def append(self, task: Task, rows: Tensor) -> None:
        """Write the next rows of a tensor; tensors come in the plan's order.

        Raises DiskError, perhaps for rows given earlier.
        """
        self._writer(self._shards[task.name]).append(raw(rows))

    def tensor_done(self, task: Task, read: Read) -> None:
        """Mark a tensor as whole; with the last one, its shard is made durable and closed. Raises DiskError."""
        shard = self._shards[task.name]
        writer = self._writer(shard)  # begins the shard, if a tensor without a row is its first
        writer.tensor_done(read)
        self.facts.add(read)
        self.facts.tell(task)
        if task is shard.tasks[-1]:
            self.digests[shard.name] = writer.close()
            del self._writers[shard.name]

    def settle(self) -> None:
        """Wait until all tensors that are done are durable. Raises DiskError."""
        for writer in self._writers.values():
            writer.settle()

    def _writer(self, shard: Shard) -> ShardWriter:
        if shard.name not in self._writers:
            prefix = self._prefixes.get(shard.name)
            commit = functools.partial(self._commit, shard)
            writer = ShardWriter(self._staging / shard.name, shard.nbytes, commit, prefix, self._worked)
            self._writers[shard.name] = writer
            if prefix is None:
                writer.append(shard.header)
        return self._writers[shard.name]

    def _worked(self, nbytes: int, seconds: float) -> None:
        self._written += nbytes
        self._emit(Worked("write", nbytes, seconds, done=self._written))

    def _commit(self, shard: Shard, done: Commit) -> None:
        digests = _joined(read.digests for read in done.facts)
        replaced = _joined(read.replaced for read in done.facts)
        kept = {name: sums for read in done.facts for name, sums in read.kept.items()}
        effects = {name: sums for read in done.facts for name, sums in read.effects.items()}
        singular = {name: told for read in done.facts for name, told in read.singular.items()}
        place = (shard.name, done.tensors - len(done.facts), done.tensors, done.end, done.sha256)
        self._journal.keep_group(Group(*place, digests, replaced, kept, effects, singular))

    def __enter__(self) -> Shards:
        plan = self._plan
        self.left = [task for shard in plan.shards for task in self._left_of(shard)]
        self._written = done = self.facts.done_bytes
        if done:
            found = f"{len(plan.tasks) - len(self.left)}/{len(plan.tasks)} tensors"
            sizes = f"{shown(done)} of {shown(plan.tensor_bytes)}"
            self._emit(Notice(f"resuming: {found}, {sizes}"))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for writer in self._writers.values():
            writer.__exit__(kind, error, trace)


def _read_before(group: Group) -> Read:
    """The facts about the tensors of a group that an earlier run has finished."""
    kept = {name: DeltaKept(*sums) for name, sums in group.kept.items()}
    effects = {name: [Effect(*sums) for sums in found] for name, found in group.effects.items()}
    return Read(group.digests, group.replaced, kept, effects, group.singular)


def _joined(facts: Iterable[ByModel[V]]) -> dict[str, dict[str, V]]:
    joined: dict[str, dict[str, V]] = {}
    for by_model in facts:
        for model, table in by_model.items():
            joined.setdefault(model, {}).update(table)
    return joined
