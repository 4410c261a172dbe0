"""A terminal under a dashboard: keys without Enter, Ctrl-Z, and everything as it was before, however the run ends.

POSIX only in parts: where there is no termios, keys are not read; where there is no SIGTSTP, nothing is to be done.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from types import FrameType

from lowmem_aim.system import interrupts

try:
    import termios
    import tty
except ImportError:  # Windows
    termios = tty = None  # type: ignore[assignment]

POLL_SECONDS = 0.2


def listens() -> bool:
    """Whether keys can be read: stdin is a terminal, and this process is in its foreground."""
    return termios is not None and os.isatty(0) and in_foreground(0)


def in_foreground(descriptor: int = 2) -> bool:
    """Whether a terminal is this process's to draw on: a shell's job may be in the background."""
    try:
        return os.tcgetpgrp(descriptor) == os.getpgrp()
    except AttributeError:  # no job control here
        return True
    except OSError:
        return False


@contextlib.contextmanager
def keys(actions: Mapping[str, Callable[[], None]]) -> Iterator[bool]:
    """Call an action, in a thread of its own, when its key is pressed; gives whether keys are read at all."""
    if not listens():
        yield False
        return
    before = termios.tcgetattr(0)
    stop = threading.Event()

    def restore() -> None:
        stop.set()
        if listens():  # in the background it would stop the process, and the shell has its own settings
            with contextlib.suppress(termios.error):  # the terminal is gone
                termios.tcsetattr(0, termios.TCSADRAIN, before)

    def body() -> None:
        ours = True
        while not stop.is_set():
            if not listens():
                ours = False
                stop.wait(POLL_SECONDS)
                continue
            if not ours:  # back in the foreground: the shell has set it as it was
                _without_enter()
                ours = True
            if (pressed := _pressed()) and not stop.is_set():
                actions.get(pressed, lambda: None)()

    with interrupts.restoring(restore):
        _without_enter()
        threading.Thread(target=body, daemon=True, name="keys").start()
        yield True


def _pressed() -> str:
    """The next key, waited for a moment; empty if there is none."""
    try:
        waiting = select.select([0], [], [], POLL_SECONDS)[0]
        return os.read(0, 1).decode("ascii", "ignore").lower() if waiting and listens() else ""
    except (OSError, ValueError):
        return ""


def _without_enter() -> None:
    """Keys come at once and are not echoed; Ctrl-C and Ctrl-Z still are signals."""
    if listens():
        with contextlib.suppress(termios.error):
            tty.setcbreak(0, termios.TCSADRAIN)


def stop_run() -> None:
    """As Ctrl-C does."""
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)  # wakes it wherever it waits
    else:
        signal.raise_signal(signal.SIGINT)


@contextlib.contextmanager
def suspendable(before: Callable[[], None], after: Callable[[], None]) -> Iterator[None]:
    """On Ctrl-Z: `before`, the terminal as it was, the process stops; when it goes on: `after`."""
    if not hasattr(signal, "SIGTSTP") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stopped(number: int, frame: FrameType | None) -> None:
        cooked = termios.tcgetattr(0) if listens() else None
        with contextlib.suppress(Exception):  # the signal may have come in the midst of drawing
            before()
        if cooked:
            lines = [*cooked[:3], cooked[3] | termios.ECHO | termios.ICANON, *cooked[4:]]
            termios.tcsetattr(0, termios.TCSADRAIN, lines)
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTSTP)  # here the process sleeps
        signal.signal(signal.SIGTSTP, stopped)
        if cooked:
            _without_enter()
        with contextlib.suppress(Exception):
            after()

    old = signal.signal(signal.SIGTSTP, stopped)
    try:
        yield
    finally:
        signal.signal(signal.SIGTSTP, old)


def is_interactive() -> bool:
    """Whether stderr is a terminal that a dashboard may be drawn on."""
    plain = ("NO_COLOR", "CI")
    return sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb" and not any(map(os.environ.get, plain))
