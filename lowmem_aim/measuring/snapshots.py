"""Snapshots of a calibration after a block, kept durably, so that a killed run is resumed at the next block.

A snapshot is a file of tensors, one after another (hidden states of every text, sums so far, each block's output for
the canary), and a record in the journal that describes them, with the file's digest. The record is written once the
file is durable; only then is the previous file removed. What the recorder finds out (the blocks' arguments) is not
kept: recording again costs next to nothing. A snapshot is made after a block, at most every `SECONDS`; and at a signal
that stops the run, also in the middle of a block, of the texts that have passed it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from lowmem_aim.blocks.calls import Call
from lowmem_aim.blocks.means import Tally
from lowmem_aim.blocks.runner import BlockRunner
from lowmem_aim.events import Emit, Notice, Snapshot
from lowmem_aim.measuring.tensor_file import digest_of_file, durable_tensors, taken
from lowmem_aim.output.folder import SNAPSHOTS, remove_snapshots
from lowmem_aim.output.journal import Journal
from lowmem_aim.output.records import CalibrationSnapshot
from lowmem_aim.system import interrupts
from lowmem_aim.system.files import disk_errors, open_to_read
from lowmem_aim.system.on_demand import torch
from lowmem_aim.system.tensor_store import Stored
from lowmem_aim.system.tensors import raw

# Not after every block, where blocks are quick: a snapshot of a 13B model's hidden states has some 600 MB.
SECONDS = 60.0


@dataclass
class BlockProgress:
    """The progress of a calibration: what its blocks have made so far."""

    calls: list[Sequence[Call]]  # of each text, the canary's last: every block's call without the hidden state
    states: Sequence[Stored]  # of each text: the hidden state after the last finished block
    outputs: list[Call] = field(default_factory=list)  # each block's output for the canary, as the only argument
    texts: int = 0  # those that have also passed the block under way

    @property
    def blocks(self) -> int:
        """The number of finished blocks."""
        return len(self.outputs)

    @property
    def done(self) -> float:
        """The number of finished blocks, the finished part of the block under way included."""
        return self.blocks + self.texts / len(self.states)

    def is_whole(self) -> bool:
        """Whether these tensors are all that blocks pass on; other objects that their calls share could carry more."""
        calls = [*self.outputs, *(call for own in self.calls for call in own)]
        values = [value for call in calls for value in (*call.args, *call.kwargs.values())]
        return all(map(_is_plain, values)) and all(slot.is_contiguous for slot in self.states)


def _is_plain(value: Any) -> bool:
    if type(value) is tuple:
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (Stored, bool, int, float, str))


class Snapshots:
    """The snapshots of one run, of which the last counts. All methods raise DiskError."""

    def __init__(self, folder: Path, journal: Journal) -> None:
        self._folder, self._journal = folder, journal
        self._last = self._block = time.monotonic()  # when the last snapshot was made, and the last block finished
        self._possible = True
        self._recorded = ""  # digest of what the recorder found
        self._kept = 0.0  # blocks of the last snapshot

    def offer(self, runner: BlockRunner, so_far: BlockProgress, emit: Emit) -> None:
        """Make a snapshot after a finished block, if the last one would be too old after one more block as long."""
        now = time.monotonic()
        took, self._block = now - self._block, now
        if not self._possible or now - self._last + took < SECONDS:
            return
        self._possible = so_far.is_whole()
        if self._possible:
            self._keep(runner, so_far)
            self._last = self._block = time.monotonic()
            emit(Snapshot(so_far.done))
        else:
            what = (
                "the blocks of this model share more than plain tensors: if calibration is interrupted, it starts again"
            )
            emit(Notice(what, "warning"))

    @contextlib.contextmanager
    def at_a_stop(self, runner: BlockRunner, so_far: BlockProgress) -> Iterator[None]:
        """Make a snapshot if a signal stops the run in the block, in which blocks are run. A second signal ends it."""
        try:
            yield
        except interrupts.Interrupted:
            if self._possible and so_far.done > self._kept and so_far.is_whole():
                with contextlib.suppress(Exception):  # no space, say: then the snapshot before counts
                    self._keep(runner, so_far)
            raise

    def _keep(self, runner: BlockRunner, so_far: BlockProgress) -> None:
        runner.weights.base.check_unchanged()  # else a change between reading and computing would be kept
        file = self._folder / SNAPSHOTS.replace("*", f"{so_far.blocks}-{so_far.texts}")
        store, tallies = runner.store, runner.means.tallies
        with durable_tensors(file) as out:
            # In the order in which `restore` reads.
            states = [out.put(store.get(stored)) for stored in so_far.states]
            outputs = [out.put(call.from_store(store).args[0]) for call in so_far.outputs]
            sums = [(name, out.put(t.total), t.calls, t.shape) for name, t in tallies.items()]
        snapshot = CalibrationSnapshot(
            recorded=self._recorded,
            file=file.name,
            blocks=so_far.blocks,
            of=len(runner.blocks),
            states=states,
            outputs=outputs,
            tallies=sums,
            weights=runner.weights.digests,
            digest=out.digest(),
            texts=so_far.texts,
        )
        # The record once its file is durable, the file before it only then: one of the two is always whole.
        self._journal.keep(snapshot)
        remove_snapshots(self._folder, but=[file.name])
        self._kept = so_far.done

    def restore(self, runner: BlockRunner, so_far: BlockProgress) -> None:
        """Bring the progress, and the runner's tallies, to where the last snapshot was made, if there is one.

        A damaged snapshot counts as none, and so does one of other embeddings or masks than the progress begins with.
        """
        self._recorded = recorded_digest(so_far, runner)
        last = self._journal.kept(CalibrationSnapshot)
        remove_snapshots(self._folder, but=[last.file] if last else ())
        if last is None:
            return
        file = self._folder / last.file
        if last.recorded != self._recorded or digest_of_file(file) != last.digest:
            return
        with disk_errors(file), open_to_read(file, follow=False) as stream:
            for slot, stored in zip(so_far.states, last.states, strict=True):
                runner.store.put(taken(stream, stored), slot)
            outputs = [taken(stream, stored) for stored in last.outputs]
            tallies = {
                name: Tally(taken(stream, stored), calls, tuple(shape))
                for name, stored, calls, shape in last.tallies  # in the file's order
            }
        so_far.outputs[:] = [in_store(output, runner) for output in outputs]
        so_far.texts = last.texts
        self._kept = so_far.done
        runner.means.tallies = tallies
        runner.weights.digests.update(last.weights)

    def forget(self) -> None:
        """Remove all snapshots, so that there is nothing to resume from."""
        self._journal.forget(CalibrationSnapshot)
        remove_snapshots(self._folder)
        self._kept = 0.0


def in_store(output: Any, runner: BlockRunner) -> Call:
    """Turn a block's output into the form of `BlockProgress.outputs`: a call whose tensors are in the store."""
    return Call((output,), {}).mapped(
        lambda value: runner.store.put(value) if isinstance(value, torch.Tensor) else value
    )


def recorded_digest(so_far: BlockProgress, runner: BlockRunner) -> str:
    """xxh3-128 of what the recorder found: the hidden states before the first block, and the tensors in all calls."""
    state, seen = xxhash.xxh3_128(), set[int]()
    calls = (call for own in so_far.calls for call in own)
    for slot in (*so_far.states, *(slot for call in calls for slot in call.slots())):
        if id(slot) not in seen:
            seen.add(id(slot))
            state.update(raw(runner.store.get(slot).cpu().contiguous()))
    return str(state.hexdigest())
