"""The passes over one tensor: its slices come from the stream of what is read, from memory, or from disk again."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from lowmem_aim.events import Emit, Worked
from lowmem_aim.merging.pipeline import Ahead, Pass
from lowmem_aim.merging.shares import Shares
from lowmem_aim.merging.slices import Stride, TensorInputs, in_halves
from lowmem_aim.methods.method import Rows
from lowmem_aim.planning.tasks import Task

# Each slice with the tensor that it is of, and None after a tensor's last.
Stream = Iterator[tuple[TensorInputs, Rows | None]]


@dataclass(frozen=True)
class PassSettings:
    """The settings that the passes over all tensors have in common."""

    stride: Stride
    shares: Shares
    emit: Emit
    release: Callable[[], None]  # gives back what the device's allocator holds, after an allocation has failed


class TensorPasses:
    """The passes over one tensor. Between them, its slices are kept if they fit `Shares.kept_bytes`, or read again."""

    tensor: TensorInputs  # set once the first pass has begun

    def __init__(self, settings: PassSettings, task: Task, stream: Stream) -> None:
        self.task = task
        self._settings = settings
        self._stream: Stream | None = stream
        self._kept: deque[Rows] | None = None

    def measuring(self, work: Callable[[Rows], Any], take: Callable[[list[Any]], None]) -> Pass:
        """A pass that another one follows: work(rows) for each slice; `take` is given a list for each slice, in order.

        A list has more than one result if memory ran short and the slice was worked on in parts.
        """
        return Pass(self._slices(last=False), self._timed(work), take, last=False)

    def last(self, work: Callable[[Rows], Any], take: Callable[[list[Any]], None], done: Callable[[], None]) -> Pass:
        """The last pass over the tensor; `done` is called once all its results are taken."""
        return Pass(self._slices(last=True), self._timed(work), take, last=True, done=done)

    def _timed(self, work: Callable[[Rows], Any]) -> Callable[[Rows], list[Any]]:
        def worked(rows: Rows) -> list[Any]:
            begun = time.perf_counter()
            results = in_halves(work, rows, self._failed)
            # Workers run side by side: the shares of all of them add up to the time that has passed.
            seconds = (time.perf_counter() - begun) / self._settings.shares.workers
            self._settings.emit(Worked("compute", _nbytes(rows), seconds, self.task.name, self.task.shape))
            return results

        return worked

    def _failed(self, rows: Rows) -> None:
        """Free what can be freed after a failed allocation, and have slices halved. Raises MemoryBudgetError."""
        self._settings.release()
        columns = rows.stored_experts[0].shape[1]
        self._settings.stride.too_large(rows.count, columns, self.task.name, fixed=bool(self.task.tile))

    def _slices(self, last: bool) -> Iterator[Rows]:
        if self._stream is not None:
            stream, self._stream = self._stream, None
            return self._from(stream, last)
        if self._kept is None:
            return self._read_again()
        return self._let_go(self._kept) if last else iter(self._kept)

    def _from(self, stream: Stream, last: bool) -> Iterator[Rows]:
        first = True
        for self.tensor, rows in stream:
            if first and not last and self.tensor.nbytes <= self._settings.shares.kept_bytes:
                self._kept = deque()
            first = False
            if rows is None:
                return
            if self._kept is not None:
                self._kept.append(rows)
            yield rows
            del rows  # before the next are taken

    def _read_again(self) -> Iterator[Rows]:
        slices = timed(self.tensor.slices(first_pass=False), self._settings.emit)
        with Ahead(slices, self._settings.shares.ahead) as again:
            yield from again

    @staticmethod
    def _let_go(kept: deque[Rows]) -> Iterator[Rows]:
        while kept:
            yield kept.popleft()


def timed(slices: Iterator[Rows], emit: Emit) -> Iterator[Rows]:
    """Pass the slices on, and emit for each its bytes and the seconds that reading it took."""
    while True:
        begun = time.perf_counter()
        rows = next(slices, None)
        if rows is None:
            return
        emit(Worked("read", _nbytes(rows), time.perf_counter() - begun))
        yield rows
        del rows  # before the next are read


def _nbytes(rows: Rows) -> int:
    return sum(stored.nbytes for stored in (rows.stored_base, *rows.stored_experts))
