"""Signals that ask the program to end: SIGINT, SIGTERM, SIGHUP.

Before work starts there is nothing to take back, and an exception raised in the middle of an import is swallowed or
dressed up by it: the process just ends. During `work`, the first signal raises `Interrupted`, so that the run drops the
tensors in work and leaves what is finished; a second one ends the process at once, which is as good as a kill: the same
command goes on from there too. Library code that swallows the exception only delays it: `check`, called at every event
of the run, raises it again.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType

MESSAGE = b"interrupted: run the same command again to go on\n"
_SHOW_CURSOR = b"\x1b[?25h"


class Interrupted(BaseException):
    """No Exception, so that no handler takes it for a failure of its own."""


class _State:
    working = False
    received = 0  # the first signal's number


def install() -> None:
    """Handle the signals from now on."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), _handle)


def _handle(number: int, frame: FrameType | None) -> None:
    if not _State.working:
        os.write(2, b"interrupted\n")
        os._exit(128 + number)
    if not _State.received:
        _State.received = number
        raise Interrupted
    if os.isatty(2):
        os.write(2, _SHOW_CURSOR)  # a progress bar has hidden it
    os.write(2, MESSAGE)
    os._exit(128 + _State.received)


def received() -> int:
    """The number of the first signal that came during work; 0 if none has."""
    return _State.received


def check() -> None:
    """Raises Interrupted if a signal has come and the run goes on all the same."""
    if _State.received:
        raise Interrupted


@contextlib.contextmanager
def work() -> Iterator[None]:
    """The span in which a signal raises Interrupted."""
    _State.working, _State.received = True, 0
    try:
        yield
    finally:
        _State.working = False
