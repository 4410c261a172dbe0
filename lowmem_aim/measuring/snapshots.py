"""Where a calibration stands after a block, kept durably, so that a killed run goes on at the next one.

A snapshot is a file of tensors, one after another (hidden states of every text, sums so far, what each block made of
the canary), and a row in the journal that says what they are, with the file's digest. The row is written once the file
is durable; only then is the file before it removed. What the recorder finds out (arguments of the blocks) is not kept:
recording again costs next to nothing. A snapshot is made after a block, at most every `SECONDS`.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
import xxhash
from torch import Tensor

from lowmem_aim.blocks.observer import Tally
from lowmem_aim.blocks.runner import BlockRunner, Call
from lowmem_aim.events import Emit, Notice
from lowmem_aim.output.folder import SNAPSHOTS, remove_snapshots
from lowmem_aim.output.journal import Journal
from lowmem_aim.output.records import CalibrationSnapshot
from lowmem_aim.system.files import disk_errors, sync_folder
from lowmem_aim.system.tensor_store import Stored
from lowmem_aim.system.tensors import dtype_name, dtype_named, raw

# Rarer than blocks where those are quick: a snapshot of a 13B model's hidden states has some 600 MB.
SECONDS = 60.0


@dataclass
class BlockProgress:
    """What the blocks have made so far."""

    tapes: Sequence[Sequence[Call]]  # of each text, the canary's last: every block's call without the hidden state
    states: Sequence[Stored]  # of each text: the hidden state after the last finished block
    outputs: list[Call] = field(default_factory=list)  # what each made of the canary, as an only argument

    @property
    def blocks(self) -> int:
        """How many are finished."""
        return len(self.outputs)

    def is_whole(self) -> bool:
        """Whether this is all that blocks hand to each other; objects that their calls share could carry more."""
        calls = [*self.outputs, *(call for tape in self.tapes for call in tape)]
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

    def offer(self, runner: BlockRunner, so_far: BlockProgress, emit: Emit) -> None:
        """A block is finished: make a snapshot, if the last would be too old after another block as long as this."""
        now = time.monotonic()
        took, self._block = now - self._block, now
        if not self._possible or now - self._last + took < SECONDS:
            return
        self._possible = so_far.is_whole()
        if self._possible:
            self._keep(runner, so_far)
            self._last = self._block = time.monotonic()
        else:
            what = (
                "the blocks of this model share more than plain tensors: if calibration is interrupted, it starts again"
            )
            emit(Notice(what, "warning"))

    def _keep(self, runner: BlockRunner, so_far: BlockProgress) -> None:
        runner.weights.base.check_unchanged()  # else a change between reading and computing would be kept
        file = self._folder / SNAPSHOTS.replace("*", str(so_far.blocks))
        store, tallies = runner.store, runner.watch.tallies
        with disk_errors(file), _whole_or_absent(file) as stream:
            out = _Out(stream)
            states = [out.put(store.get(stored)) for stored in so_far.states]
            outputs = [out.put(call.from_store(store).args[0]) for call in so_far.outputs]
            sums = [(name, out.put(t.total), t.calls, t.shape) for name, t in tallies.items()]
            stream.flush()
            os.fsync(stream.fileno())
            sync_folder(self._folder)
        snapshot = CalibrationSnapshot(
            recorded=self._recorded,
            file=file.name,
            blocks=so_far.blocks,
            of=len(runner.blocks),
            states=states,
            outputs=outputs,
            tallies=sums,
            stacks=sorted(runner.watch.stacks),
            weights=runner.weights.digests,
            digest=out.digest(),
        )
        self._journal.keep(snapshot)
        remove_snapshots(self._folder, but=file.name)

    def restore(self, runner: BlockRunner, so_far: BlockProgress) -> None:
        """Bring the so_far, and what the runner has seen, to where the last snapshot was made; if there is one.

        One that is damaged counts as none, and so does one of other embeddings or masks, which the so_far begins with.
        """
        self._recorded = _digest_of(so_far, runner)
        last = self._journal.kept(CalibrationSnapshot)
        remove_snapshots(self._folder, but=last.file if last else "")
        if last is None:
            return
        file = self._folder / last.file
        if last.recorded != self._recorded or _digest_of_file(file) != last.digest:
            return
        with disk_errors(file), file.open("rb") as stream:
            for slot, stored in zip(so_far.states, last.states, strict=True):
                runner.store.put(_taken(stream, stored), slot)
            outputs = [_taken(stream, stored) for stored in last.outputs]
            tallies = {
                name: Tally(_taken(stream, stored), calls, tuple(shape))
                for name, stored, calls, shape in last.tallies  # in the file's order
            }
        so_far.outputs[:] = [in_store(output, runner) for output in outputs]
        runner.watch.tallies, runner.watch.stacks = tallies, set(last.stacks)
        runner.weights.digests.update(last.weights)

    def forget(self) -> None:
        """There is nothing to go on with."""
        self._journal.forget(CalibrationSnapshot)
        remove_snapshots(self._folder)


def in_store(output: Any, runner: BlockRunner) -> Call:
    """A block's output for the so_far: its tensors on the store."""
    return Call((output,), {}).mapped(lambda value: runner.store.put(value) if isinstance(value, Tensor) else value)


# --- the file -----------------------------------------------------------------------------------------------------


class _Out:
    """Appends tensors to a file, and knows the digest of all of it."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self._state = stream, xxhash.xxh3_128()

    def put(self, value: Any) -> Any:
        """What `_taken` makes the same value of: a tensor's dtype and shape, a tuple's parts, anything else itself."""
        if isinstance(value, tuple):
            return [self.put(part) for part in value]
        if not isinstance(value, Tensor):
            return value
        data = raw(value.cpu().contiguous())
        self._stream.write(data)
        self._state.update(data)
        return {"dtype": dtype_name(value.dtype), "shape": list(value.shape)}

    def digest(self) -> str:
        return str(self._state.hexdigest())


def _taken(stream: IO[bytes], stored: Any) -> Any:
    """The next value of the file; `stored` is what `put` said of it."""
    if isinstance(stored, list):
        return tuple(_taken(stream, part) for part in stored)
    if not isinstance(stored, dict):
        return stored
    value = torch.empty(stored["shape"], dtype=dtype_named(stored["dtype"]))
    stream.readinto(raw(value))  # type: ignore[attr-defined]
    return value


def _digest_of_file(file: Path) -> str:
    """Empty if it cannot be read."""
    state = xxhash.xxh3_128()
    try:
        with file.open("rb") as stream:
            while data := stream.read(8 << 20):
                state.update(data)
    except OSError:
        return ""
    return str(state.hexdigest())


@contextlib.contextmanager
def _whole_or_absent(file: Path) -> Iterator[IO[bytes]]:
    """A new file that does not stay if writing it fails."""
    try:
        with file.open("wb") as stream:
            yield stream
    except BaseException:
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)
        raise


def _digest_of(so_far: BlockProgress, runner: BlockRunner) -> str:
    """Of what the recorder found: the hidden states before the first block, the tensors that blocks are called with."""
    state, seen = xxhash.xxh3_128(), set[int]()
    calls = (call for tape in so_far.tapes for call in tape)
    for slot in (*so_far.states, *(slot for call in calls for slot in call.slots())):
        if id(slot) not in seen:
            seen.add(id(slot))
            state.update(raw(runner.store.get(slot).cpu().contiguous()))
    return str(state.hexdigest())
