"""Steps of a pipeline, each in threads of its own, with bounded queues between them: the slowest sets the pace.

An exception in a step is raised in the thread that takes the step's results. Leaving a step early stops the steps
before it.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, TypeVar

T = TypeVar("T")

_POLL_SECONDS = 0.05  # how soon a step that waits for space in a queue notices that it is to stop


class _End:
    """Marks the end of the items."""


class Ahead(Generic[T]):
    """An iterator over `items` that reads in a thread of its own, at most `depth` items ahead of its user.

    A context manager: leaving it stops the thread.
    """

    def __init__(self, items: Iterable[T], depth: int) -> None:
        self._items = items
        self._queue: queue.Queue[T | _End | BaseException] = queue.Queue(depth)
        self._unwanted = threading.Event()
        self._thread = threading.Thread(target=self._body, daemon=True, name="read ahead")
        self._thread.start()

    def _body(self) -> None:
        try:
            for item in self._items:
                if not self._put(item):
                    return
                del item  # before the next is read
            self._put(_End())
        except BaseException as error:  # to be raised where the items are taken
            self._put(error)

    def _put(self, item: T | _End | BaseException) -> bool:
        while not self._unwanted.is_set():
            try:
                self._queue.put(item, timeout=_POLL_SECONDS)
                return True
            except queue.Full:
                continue
        return False

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        item = self._queue.get()
        if isinstance(item, _End):
            raise StopIteration
        if isinstance(item, BaseException):
            raise item
        return item

    def close(self) -> None:
        """Stop reading, and wait until the thread has ended."""
        self._unwanted.set()
        self._thread.join()
        while not self._queue.empty():  # let go of what nobody will take
            self._queue.get_nowait()

    def __enter__(self) -> Ahead[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(eq=False)
class Pass:
    """Work on each of some items; the results are taken in the items' order, by the thread that runs the jobs."""

    items: Iterable[Any]
    work: Callable[[Any], Any]
    take: Callable[[Any], None]
    last: bool  # of its job
    done: Callable[[], None] = lambda: None  # called when all results are taken
    open: int = 1  # results to come, and one until all items are begun

    def close_one(self) -> None:
        """Count one result as taken; call `done` after the last."""
        self.open -= 1
        if not self.open:
            self.done()


Job = Iterator[Pass]  # its passes; each is asked for when the one before has been taken whole


class Workers:
    """Threads that compute the passes of a sequence of jobs. A context manager."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="compute")
        self._begun: deque[tuple[Future[Any], Pass]] = deque()  # in the order in which they are taken

    def run(self, jobs: Iterable[Job]) -> None:
        """Run all jobs to their end.

        The next job's first pass begins before the end of this job is awaited, so that the threads always have
        something to do; results of last passes still come in the order of the jobs. Raises whatever work or `take`
        raises.
        """
        current: tuple[Job, Pass] | None = None
        for job in jobs:
            first = next(job)
            if not first.last:
                self._begin(first)
            if current:
                self._go_on(*current)
            if first.last:
                self._begin(first)
            current = (job, first)
        if current:
            self._go_on(*current)
        while self._begun:
            self._take()

    def _go_on(self, job: Job, begun: Pass) -> None:
        """Run a job until its last pass has begun."""
        while not begun.last:
            while begun.open:
                self._take()
            begun = next(job)
            self._begin(begun)

    def _begin(self, begun: Pass) -> None:
        for item in begun.items:
            begun.open += 1
            self._begun.append((self._pool.submit(begun.work, item), begun))
            del item  # a slice must not stay in memory longer than the work on it
            if len(self._begun) > self._count + 1:
                self._take()
        begun.close_one()

    def _take(self) -> None:
        future, begun = self._begun.popleft()
        begun.take(future.result())
        begun.close_one()

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._begun.clear()
