"""The points of a sweep as tasks of Ray, on this machine or on a cluster whose nodes share the sweep's folder.

Each task merges and scores one point, with its share of a node's cores and memory, and a GPU if the device is one. What
a task has finished lies in the folder: if its worker dies, Ray starts the task again, and it resumes. The driver holds
the folder, and tells what tasks have scored as they end.

Ray sends tasks and their results as pickle: whoever can reach a cluster can run code on it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lowmem_aim.errors import LockedError, LowmemAimError, UsageError, printable
from lowmem_aim.events import Emit, Event, Notice
from lowmem_aim.jobs.one_point import make_and_score
from lowmem_aim.jobs.swept import Swept
from lowmem_aim.output.sweep_folder import lock_in
from lowmem_aim.recipe.points import Point
from lowmem_aim.system import interrupts
from lowmem_aim.system.lock import locked_error, locked_if_free
from lowmem_aim.system.options import Options
from lowmem_aim.units import counted, shown
from lowmem_aim.view.feed import Feed, Part
from lowmem_aim.view.record import Log

LOCAL = "local"
RETRIES = 10  # of a task whose worker dies: more often, and it is the task that kills it
# A worker that Ray has given up may still be at work, cut off from the cluster, and hold the lock of its point.
PATIENCE_SECONDS = 60.0
POLL_SECONDS = 0.5
STORE_BYTES = 80_000_000  # for results, which are small: Ray would take a third of the memory


@dataclass(frozen=True)
class Share:
    """The part of a node that one task gets."""

    cores: int
    ram: int  # bytes
    gpus: int

    def options(self, options: Options) -> Options:
        """The options of a task: Ray shows it no GPU but its own."""
        device = "cuda" if self.gpus and options.device.startswith("cuda") else options.device
        return replace(options, threads=self.cores, ram=self.ram, device=device, fresh=False)


def share_of(nodes: Iterable[dict[str, float]], options: Options) -> Share:
    """The share of a task; `nodes`: the resources of each. All cores of the smallest node, unless `threads` says less.

    Raises UsageError if no node has so much.
    """
    able = [node for node in nodes if node.get("CPU", 0) >= 1]
    gpus = int(options.device.startswith("cuda") or (options.device == "auto" and any(n.get("GPU") for n in able)))
    able = [node for node in able if node.get("GPU", 0) >= gpus]
    wanted = "a GPU" if gpus else "a core"
    if able:
        cores = options.threads or int(min(node["CPU"] for node in able))
        wanted = counted(cores, "core") + f" and {shown(options.ram or 0)} of memory" * (options.ram is not None)
        able = [node for node in able if node["CPU"] >= cores and node.get("memory", 0) >= (options.ram or 0)]
    if not able:
        raise UsageError(f"no node of the Ray cluster has {wanted} for a task", "ask for less, or start larger nodes")
    ram = options.ram or int(min(node.get("memory", 0) * cores / node["CPU"] for node in able))
    return Share(cores, ram, gpus)


def made_by_ray(
    points: Sequence[Point], swept: Swept, out: Path, options: Options, emit: Emit, *, address: str, at_once: int
) -> Generator[Point]:
    """Make and score the points, at most `at_once` at a time, and yield each when it is scored.

    Raises UsageError if there is no such cluster, or none with the resources, and the errors of `merge` and `evaluate`
    in a task; the other tasks are ended then.
    """
    if not points:
        return
    with _connected(address) as ray:
        share = share_of((node["Resources"] for node in ray.nodes() if node["Alive"]), options)
        emit(Notice(f"each task of Ray gets {_words(share)}"))
        task = ray.remote(_made).options(
            num_cpus=share.cores, memory=share.ram, num_gpus=share.gpus, max_retries=RETRIES
        )
        common = (replace(swept, points=()), out, share.options(options))
        waiting, running = list(points), dict[Any, Point]()
        try:
            while waiting or running:
                while waiting and len(running) < at_once:
                    point = waiting.pop(0)
                    running[task.remote(point, *common)] = point
                ended, _ = ray.wait(list(running), num_returns=1, timeout=POLL_SECONDS)
                interrupts.check()
                for one in ended:
                    for notice in _result(ray, one):
                        emit(notice)
                    yield running.pop(one)
        finally:
            for one in running:
                ray.cancel(one, force=True)


def _words(share: Share) -> str:
    return f"{counted(share.cores, 'core')}, {shown(share.ram)} of memory" + ", and a GPU" * share.gpus


@contextlib.contextmanager
def _connected(address: str) -> Iterator[Any]:
    """Ray, connected to the cluster, or to one that is started here. Raises UsageError if none answers."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is told to its makers
    import ray

    own = {"include_dashboard": False, "object_store_memory": STORE_BYTES} if address == LOCAL else {}
    try:
        with _own_signals():
            ray.init(address=address, log_to_driver=False, logging_level="ERROR", **own)
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        text = f"no Ray cluster answers at `{printable(address)}`: {printable(said)}"
        raise UsageError(text, "`--ray local` starts one on this machine") from error
    try:
        with contextlib.redirect_stdout(_WithoutRay(sys.stdout)):
            yield ray
    finally:
        ray.shutdown()


class _WithoutRay:
    """Standard output without what Ray's threads print there: it is for results, and for lines of JSON."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        """An attribute of the stream."""
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write the text, unless a thread of Ray does."""
        if threading.current_thread().name.startswith("ray_"):
            return len(text)
        return int(self._stream.write(text))


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Keep this process's answers to signals: Ray sets its own, by which a run would end without a word."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def _result(ray: Any, one: Any) -> list[Notice]:
    """The warnings of a task. Raises what it has raised, and LowmemAimError for one whose worker died every time."""
    try:
        found: list[Notice] = ray.get(one)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, LowmemAimError):
            raise error.cause from error
        raise
    except ray.exceptions.RayError as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise LowmemAimError(
            f"a task of Ray could not be finished: {printable(said)}",
            "look at Ray's logs on its node; the same command goes on from what is finished",
        ) from error
    return found


def _made(point: Point, swept: Swept, out: Path, options: Options) -> list[Notice]:
    """Make and score a point, in a worker of Ray; returns its warnings."""
    notices: list[Notice] = []

    def emit(event: Event) -> None:
        if isinstance(event, Notice) and event.level == "warning":
            notices.append(event)

    feed = Feed(out, emit, Log(), time.monotonic())
    lock = lock_in(out, point.name)
    with locked_if_free(lock, PATIENCE_SECONDS) as held:
        if not held:
            raise LockedError(locked_error(lock, None).problems, f"another process makes `{point.name}`; try later")
        make_and_score(point, swept, out, options, Part(feed, point.name))
    return notices
