"""Requests from the user to a run: end (SIGINT, SIGTERM, SIGHUP), pause, or report progress (SIGUSR1).

Before work starts there is nothing to undo, and an exception in the middle of an import may be swallowed or wrapped:
the process just ends. During `work`, the first signal raises `Interrupted`, so that the run drops the tensors in work
and keeps what is finished. A second signal ends the process at once, which is as good as a kill: the same command
resumes from there too. If library code swallows the exception, `check`, called at every event of the run, raises it
again.

SIGBUS is not a request: the system sends it when pages of a mapped file are gone, because an input was cut off during
the run or its disk failed. No Python code can go on from there; during `work` the process at least says so and ends
with the exit code of a bad input. Finished work stays, as after a kill.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import ClassVar, NoReturn

from lowmem_aim.errors import ModelError

GOES_ON = "interrupted: run the same command again to resume"
STARTS_OVER = "interrupted before anything was kept: the same command starts from the beginning"
PAGES_GONE = b"""error: an input file was cut off, or its disk failed, while it was being read

hint: repair the file and run the same command again; what is finished is kept
"""
ENDING = ("SIGINT", "SIGTERM", "SIGHUP")  # the exit code is 128 plus the signal's number
AT_ONCE = b"interrupted at once: the same command goes on from what was kept, if anything was\n"
_SHOW_CURSOR = b"\x1b[?25h"
_POLL_SECONDS = 0.1


class Interrupted(BaseException):
    """The first signal has come during `work`.

    Not an Exception, so that no handler takes it for a failure of its own.
    """


class _State:
    working = False
    received = 0  # the first signal's number
    put_off = False  # the first signal raises nothing for a moment
    paused = False
    kept = True  # whether the run that was interrupted has kept something
    at_end: ClassVar[list[Callable[[], None]]] = []  # calls that restore the terminal before the process ends
    tell: ClassVar[list[Callable[[], None]]] = []  # calls that print the progress


def install() -> None:
    """Install the handlers of the signals that end a run or ask for its progress."""
    for name in ENDING:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), _handle)
    if hasattr(signal, "SIGUSR1"):  # without a handler, SIGUSR1 would end a process that has only just started
        signal.signal(signal.SIGUSR1, _tell)


def _handle(number: int, frame: FrameType | None) -> None:
    if not _State.working:
        os.write(2, b"interrupted\n")
        os._exit(128 + number)
    if not _State.received:
        _State.received = number
        if _State.put_off:
            return
        raise Interrupted
    _end(AT_ONCE, 128 + _State.received)


def _end(message: bytes, code: int) -> NoReturn:
    for restore in _State.at_end:
        with contextlib.suppress(Exception):
            restore()
    try:
        if os.isatty(2):
            os.write(2, _SHOW_CURSOR)  # the dashboard has hidden it
        os.write(2, message)
    finally:  # also if nobody reads stderr any more
        os._exit(code)


# A C handler, because it is called in the thread that touched the page; Python's handlers run in the main thread.
_pages_gone = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda number: _end(PAGES_GONE, ModelError.exit_code))


def received() -> int:
    """The number of the first signal that came during `work`; 0 if none has."""
    return _State.received


def note_kept(kept: bool) -> None:
    """Note whether the run that is being interrupted has kept something, for the closing message."""
    _State.kept = kept


def message(kept: bool | None = None) -> str:
    """Return what an interrupted run tells about the next one. `kept`: whether there is something to build on."""
    return GOES_ON if (_State.kept if kept is None else kept) else STARTS_OVER


def check() -> None:
    """Raise Interrupted, in the main thread, if a signal has come and the run goes on all the same."""
    if _State.received and threading.current_thread() is threading.main_thread():
        raise Interrupted


@contextlib.contextmanager
def put_off() -> Iterator[None]:
    """Raise Interrupted for a signal in the block only at its end: the block's changes belong together.

    For the main thread, and for moments: meanwhile the run does not answer.
    """
    _State.put_off = True
    try:
        yield
    finally:
        _State.put_off = False
    check()


@contextlib.contextmanager
def restoring(terminal: Callable[[], None]) -> Iterator[None]:
    """Call `terminal` at the end of the block, and also before a second signal ends the process at once."""
    _State.at_end.append(terminal)
    try:
        yield
    finally:
        _State.at_end.remove(terminal)
        terminal()


@contextlib.contextmanager
def telling(how: Callable[[], None]) -> Iterator[None]:
    """Call `how` at every SIGUSR1 during the block."""
    _State.tell.append(how)
    try:
        yield
    finally:
        _State.tell.remove(how)


def _tell(number: int, frame: FrameType | None) -> None:
    for how in _State.tell:
        with contextlib.suppress(Exception):
            how()


def at_work() -> bool:
    """Whether this is during `work`: only then does a run heed signals and pauses."""
    return _State.working


def toggle_pause() -> None:
    """Make the threads that read and compute wait, or let them go on."""
    pause(not _State.paused)


def pause(paused: bool) -> None:
    """Make the threads that read and compute wait, or let them go on; the latest call counts."""
    _State.paused = paused


def paused() -> bool:
    """Whether the run is paused."""
    return _State.paused


def hold() -> None:
    """Wait until the run is not paused, or was asked to end."""
    while _State.paused and not _State.received:
        time.sleep(_POLL_SECONDS)


@contextlib.contextmanager
def work() -> Iterator[None]:
    """Mark the block as work: in it, a signal raises Interrupted."""
    if hasattr(signal, "SIGBUS"):
        ctypes.CDLL(None).signal(int(signal.SIGBUS), _pages_gone)
    _State.working, _State.received, _State.paused, _State.kept = True, 0, False, True
    try:
        yield
    finally:
        _State.working = False
