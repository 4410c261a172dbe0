"""Stages of a pipeline, each in threads of its own, with bounded queues between them: the slowest sets the pace.

An exception in a stage surfaces in the thread that takes its results. Whoever leaves early stops what is upstream.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")

_POLL_SECONDS = 0.05  # how soon a stage that waits to hand on notices that nobody wants it any more


class _End:
    """After the last item."""


class Ahead(Generic[T]):
    """Iterates over `items` in a thread of its own, at most `depth` items ahead of who iterates over this."""

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
        """Stop reading, and wait until it has stopped."""
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


class Workers:
    """Threads that work on several items at once; results come in the items' order. A context manager."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="compute")

    def map(self, work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """work(item) for each item; at most `count` + 1 are begun and not yet taken."""
        begun: deque[Future[R]] = deque()
        try:
            for item in items:
                begun.append(self._pool.submit(work, item))
                del item  # a slice must not outlive its work
                if len(begun) > self.count:
                    yield begun.popleft().result()
            while begun:
                yield begun.popleft().result()
        finally:
            for future in begun:
                future.cancel()

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
