"""The path of a run's events: to the view that shows them, and into the run's log.

    with reported("merge", out, emit) as feed:     RunStarted
        feed(Notice(...))                          shown and recorded
        feed.record_in([out/.lowmem_aim])          from here on in its log, with all that came before
                                                   RunEnded, with what went wrong if anything did

Once a second a sample of the run's state is added. Requests to pause from another terminal are heeded meanwhile.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import lowmem_aim
from lowmem_aim.errors import LowmemAimError
from lowmem_aim.events import (
    Emit,
    Event,
    Job,
    Notice,
    Paused,
    PhaseStarted,
    Planned,
    RunEnded,
    RunStarted,
    Sampled,
    Stage,
    Worked,
)
from lowmem_aim.output import requests
from lowmem_aim.output.folder import LOG, existing_folder, outputs_in, stages_in
from lowmem_aim.system import beginning, interrupts
from lowmem_aim.system.bugs import note_log
from lowmem_aim.system.faults import of_the_system
from lowmem_aim.system.files import partial_folder
from lowmem_aim.view.record import Log
from lowmem_aim.view.status import keeps_something
from lowmem_aim.view.summary import write_facts

SAMPLE_SECONDS = 1.0
PEAK_SECONDS = 0.1  # between two looks at memory, for its peak


class Feed:
    """An Emit that any thread may call: it shows and records each event."""

    def __init__(self, out: Path, emit: Emit, log: Log, began: float) -> None:
        """`began`: the time.monotonic() from which the log counts."""
        self._emit, self._log = emit, log
        self.recorded: list[Path] = []  # the folders whose logs this run writes to
        self.told: set[Notice] = set()  # by parts of the run, which tell each thing once
        self._began = began
        self._lock = threading.RLock()
        self.meters = Meters(out)

    def record_in(self, folders: Sequence[Path]) -> None:
        """Write to the log in each folder from now on, beginning with the events so far."""
        with self._lock:
            self._log.open(folders)
            self.recorded += folders

    def heed(self) -> None:
        """Pause, or go on, if another terminal has asked for it in a folder whose log this run writes to.

        A run that was started from Python cannot be paused: its requests stay where they are.
        """
        for private in list(self.recorded) if interrupts.at_work() else ():
            if word := requests.take(private):
                interrupts.pause(word == "pause")

    def __call__(self, event: Event) -> None:
        if isinstance(event, Worked):
            self.meters.add(event)
            self._emit(event)  # outside the lock: a pause may hold this thread here
            return
        with self._lock:
            if isinstance(event, Planned):
                self.meters.device = event.device
            if isinstance(event, PhaseStarted):
                self.meters.begin(event.done)
            self._log.add(time.monotonic() - self._began, event)
            self._emit(event)


class Part:
    """The feed of a job that is part of a larger run: its events are shown and recorded with that run's.

    What it plans carries the title of the larger run, what several parts notice is told once, and the folders of a part
    get no log.
    """

    def __init__(self, feed: Feed, title: str) -> None:
        self._feed, self._title = feed, title
        self._told = feed.told

    @property
    def recorded(self) -> list[Path]:
        """The folders with a log of the larger run."""
        return self._feed.recorded

    def record_in(self, folders: Sequence[Path]) -> None:
        """Leave the folders without a log: that of the larger run holds everything."""

    def __call__(self, event: Event) -> None:
        if isinstance(event, Notice):
            if event in self._told:
                return
            self._told.add(event)
        self._feed(replace(event, title=f"{self._title}: {event.title}") if isinstance(event, Planned) else event)


AnyFeed = Feed | Part


class Meters:
    """Sums of what the stages did, and the use of memory and disk."""

    def __init__(self, out: Path) -> None:
        self.device = "cpu"
        self._out = existing_folder(out)
        self._lock = threading.Lock()
        self._bytes: dict[Stage, int] = {"read": 0, "compute": 0, "write": 0}
        self._seconds: dict[Stage, float] = {"read": 0.0, "compute": 0.0, "write": 0.0}
        self._item, self._done = "", 0.0
        self._shape: tuple[int, ...] = ()
        self._ram_peak = 0

    def begin(self, done: float) -> None:
        """Begin a phase, of which `done` is finished; the item of the phase before is forgotten."""
        with self._lock:
            self._item, self._shape, self._done = "", (), done

    def add(self, worked: Worked) -> None:
        """Add what a stage did to the sums."""
        with self._lock:
            self._bytes[worked.stage] += worked.nbytes
            self._seconds[worked.stage] += worked.seconds
            if worked.item:
                self._item, self._shape = worked.item, worked.shape
            if worked.done is not None:
                self._done = worked.done

    def look(self) -> int:
        """Read the bytes of anonymous memory, and keep their peak."""
        from lowmem_aim.system.memory import anonymous_bytes  # torch: not where only files are read

        ram = anonymous_bytes()
        self._ram_peak = max(self._ram_peak, ram)
        return ram

    def sample(self) -> Sampled:
        """The state of the run now, as an event."""
        from lowmem_aim.system.memory import file_cache_bytes, vram_bytes

        vram, vram_peak = vram_bytes(self.device)
        ram = self.look()
        with self._lock:
            return Sampled(
                done=self._done,
                item=self._item,
                shape=self._shape,
                read_bytes=self._bytes["read"],
                compute_bytes=self._bytes["compute"],
                write_bytes=self._bytes["write"],
                read_seconds=round(self._seconds["read"], 3),
                compute_seconds=round(self._seconds["compute"], 3),
                write_seconds=round(self._seconds["write"], 3),
                ram=ram,
                ram_peak=self._ram_peak,
                file_cache=file_cache_bytes(),
                vram=vram,
                vram_peak=vram_peak,
                disk_free=self._disk_free(),
            )

    def _disk_free(self) -> int | None:
        with contextlib.suppress(OSError):
            return shutil.disk_usage(self._out).free
        return None


@contextlib.contextmanager
def _sampling(feed: Feed) -> Iterator[None]:
    """Emit a sample every SAMPLE_SECONDS during the block, and one at its end."""
    stop = threading.Event()

    def body() -> None:
        due = time.monotonic() + SAMPLE_SECONDS
        paused = False
        while not stop.wait(PEAK_SECONDS):
            with contextlib.suppress(Exception):  # one failure is no reason to stop sampling
                feed.meters.look()
            feed.heed()
            if interrupts.paused() != paused:
                paused = not paused
                feed(Paused(paused))
            if time.monotonic() >= due:
                due += SAMPLE_SECONDS
                with contextlib.suppress(Exception):
                    feed(feed.meters.sample())

    thread = threading.Thread(target=body, daemon=True, name="sample")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        with contextlib.suppress(Exception):
            feed(feed.meters.sample())


@contextlib.contextmanager
def reported(job: Job, out: Path, emit: Emit, command: str = "") -> Iterator[Feed]:
    """Report a run: RunStarted before the block, samples during it, and RunEnded after it, whatever happens.

    `command` is what to type to resume the run, should it be interrupted.
    """
    log = Log()
    feed = Feed(out, emit, log, beginning.began() if command else time.monotonic())
    feed(started(job, out, command))
    try:
        with _sampling(feed):
            yield feed
    except BaseException as error:
        interrupts.note_kept(any(map(keeps_something, _folders(job, out))))
        feed(ended(error))
        for private in feed.recorded[:1]:
            if os.path.isfile(private / LOG):  # else nothing was finished, and the folder is gone
                note_log(error, private / LOG)
        raise
    else:
        feed(RunEnded("finished", 0))
    finally:
        log.close()
        for private in feed.recorded:
            # Without a folder nothing was finished. A report about a run must never be what makes it fail.
            with contextlib.suppress(Exception):
                if private.is_dir():
                    write_facts(private)


def _folders(job: Job, out: Path) -> list[Path]:
    """The folders in which a run keeps what a later one can build on."""
    with contextlib.suppress(LowmemAimError):  # a name too long, or a folder that cannot be read
        if job == "plan":
            return []
        if job == "sweep":
            return [out]
        return [partial_folder(out)] if job != "merge" else [*outputs_in(out), *stages_in(out)]
    return []


def started(job: Job, out: Path, command: str = "") -> RunStarted:
    """The event of a run that begins now."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return RunStarted(job, str(out), command, lowmem_aim.__version__, os.getpid(), now)


def ended(error: BaseException) -> RunEnded:
    """The event of a run that ends by an exception."""
    if interrupts.received() or isinstance(error, interrupts.Interrupted | KeyboardInterrupt):
        return RunEnded("interrupted", 128 + (interrupts.received() or 2), hint=interrupts.message())
    told = of_the_system(error) if isinstance(error, OSError) else error
    if not isinstance(told, LowmemAimError):
        told = LowmemAimError(f"{type(error).__name__}: {error}")
    return failed(told, error)


def failed(told: LowmemAimError, error: BaseException) -> RunEnded:
    """The event of a run that fails by `error`, of which `told` is what the user is told."""
    text = "".join(traceback.format_exception(error))
    first = next(iter(told.problems), "")
    return RunEnded("failed", told.exit_code, told.problems, told.hint, text, first, told.hints)
