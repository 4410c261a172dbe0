"""Hidden states kept durably before a block, so that a killed merge loses one block of them.

The moments of a block are not kept: until all tensors of the block are written, a run that goes on needs the states
before it. So two snapshots may be there at a time: the one that counts, and a later one that will count once the
blocks before it are written.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import xxhash

from lowmem_aim.blocks.runner import BlockRunner
from lowmem_aim.events import Emit, Notice
from lowmem_aim.measuring.snapshots import in_store, recorded_digest
from lowmem_aim.measuring.steps import Steps
from lowmem_aim.measuring.tensor_file import digest_of_file, durable_tensors, taken
from lowmem_aim.output.folder import STATES, remove_snapshots
from lowmem_aim.output.journal import Journal
from lowmem_aim.output.records import SolvingSnapshot
from lowmem_aim.system.files import disk_errors, open_to_read

# Not before every block, where blocks are quick: states of a few hundred texts have some GB.
SECONDS = 60.0
FILES = tuple(STATES.replace("*", name) for name in ("a", "b"))  # two that take turns; a record has its file's name


class KeptStates:
    """The snapshots of one merge. All methods raise DiskError."""

    def __init__(self, folder: Path, journal: Journal) -> None:
        self._folder, self._journal = folder, journal
        self._kept: dict[str, SolvingSnapshot] = {}  # by file
        self._written = 0  # blocks whose tensors are all written
        self._last = time.monotonic()
        self._recorded = ""
        self._possible = True

    def offer(self, sides: Sequence[Steps], emit: Emit) -> None:
        """Keep the states before the next block, if the last ones are old enough, and none wait to count."""
        self._tidy()
        block = sides[0].next
        newest = max((kept.block for kept in self._kept.values()), default=0)
        waits = newest > self._written
        if waits or newest >= block or not self._possible or time.monotonic() - self._last < SECONDS:
            return
        self._possible = all(side.so_far.is_whole() for side in sides)
        if self._possible:
            self._keep(block, sides)
            self._last = time.monotonic()
        else:
            what = "the blocks of this model share more than plain tensors: if the merge is interrupted"
            emit(Notice(f"{what}, the texts run through all blocks again", "warning"))

    def _keep(self, block: int, sides: Sequence[Steps]) -> None:
        for side in sides:
            side.runner.weights.base.check_unchanged()  # else a change between reading and computing would be kept
        name = next(name for name in FILES if name not in self._kept)
        with durable_tensors(self._folder / name) as out:
            described = [
                {
                    "states": [out.put(side.runner.store.get(slot)) for slot in side.so_far.states],
                    "outputs": [out.put(call.from_store(side.runner.store).args[0]) for call in side.so_far.outputs],
                }
                for side in sides
            ]
        snapshot = SolvingSnapshot(self._recorded, name, block, described, out.digest())
        self._journal.keep(snapshot, name)  # once its file is durable
        self._kept[name] = snapshot
        self._tidy()

    def written(self, blocks: int) -> None:
        """Take notice that all tensors of the first `blocks` blocks are written durably; from any thread."""
        self._written = max(self._written, blocks)  # states before other blocks than the last are dropped later

    def _tidy(self) -> None:
        """Drop the states before the last that count."""
        counting = [kept.block for kept in self._kept.values() if kept.block <= self._written]
        for name, kept in list(self._kept.items()):
            if counting and kept.block < max(counting):
                del self._kept[name]
        remove_snapshots(self._folder, but=self._kept, kind=STATES)

    def restore(self, block: int, sides: Sequence[Steps]) -> int:
        """Bring the states to the last snapshot that is not beyond `block`; return the block before which they are.

        A damaged snapshot counts as none, and so does one of other embeddings or masks than the texts begin with.
        """
        self._written = block
        self._recorded = _digest_of(sides)
        found = [kept for kept in self._journal.all_kept(SolvingSnapshot) if kept.block <= block]
        for kept in sorted(found, key=lambda kept: -kept.block):
            file = self._folder / kept.file
            if kept.recorded == self._recorded and digest_of_file(file) == kept.digest:
                with disk_errors(file), open_to_read(file, follow=False) as stream:
                    for side, described in zip(sides, kept.sides, strict=True):
                        _put_back(side, described, stream)
                        side.catch_up()
                self._kept = {kept.file: kept}
                break
        remove_snapshots(self._folder, but=self._kept, kind=STATES)
        return sides[0].next

    def forget(self) -> None:
        """Remove all snapshots: the merge needs no more moments."""
        self._journal.forget(SolvingSnapshot)
        self._kept.clear()
        remove_snapshots(self._folder, kind=STATES)


def _put_back(side: Steps, described: Any, stream: IO[bytes]) -> None:
    runner: BlockRunner = side.runner
    for slot, stored in zip(side.so_far.states, described["states"], strict=True):
        runner.store.put(taken(stream, stored), slot)
    side.so_far.outputs[:] = [in_store(taken(stream, stored), runner) for stored in described["outputs"]]


def _digest_of(sides: Sequence[Steps]) -> str:
    found = [recorded_digest(side.so_far, side.runner) for side in sides]
    return xxhash.xxh3_128_hexdigest("".join(found).encode())
