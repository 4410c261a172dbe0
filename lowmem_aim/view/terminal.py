"""The terminal while a dashboard is shown: keys without Enter, Ctrl-Z, and its settings restored however the run ends.

Parts are for POSIX only: without termios no keys are read, and without SIGTSTP there is no Ctrl-Z to handle.
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
    """Whether this process may draw on a terminal: as a shell's job it may be in the background."""
    try:
        return os.tcgetpgrp(descriptor) == os.getpgrp()
    except AttributeError:  # no job control here
        return True
    except OSError:
        return False


@contextlib.contextmanager
def keys(actions: Mapping[str, Callable[[], None]]) -> Iterator[bool]:
    """Call an action, in a thread of its own, when its key is pressed. Yields whether keys are read at all."""
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
            if not ours:  # back in the foreground: the shell has restored its own settings
                _without_enter()
                ours = True
            if (pressed := _pressed()) and not stop.is_set():
                actions.get(pressed, lambda: None)()

    with interrupts.restoring(restore):
        _without_enter()
        threading.Thread(target=body, daemon=True, name="keys").start()
        yield True


def _pressed() -> str:
    """The next key that comes within POLL_SECONDS; empty if none does."""
    try:
        waiting = select.select([0], [], [], POLL_SECONDS)[0]
        return os.read(0, 1).decode("ascii", "ignore").lower() if waiting and listens() else ""
    except (OSError, ValueError):
        return ""


def _without_enter() -> None:
    """Have keys come at once and without an echo; Ctrl-C and Ctrl-Z are still signals."""
    if listens():
        with contextlib.suppress(termios.error):
            tty.setcbreak(0, termios.TCSADRAIN)


def stop_run() -> None:
    """Interrupt the run, as Ctrl-C does."""
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)  # wakes it wherever it waits
    else:
        signal.raise_signal(signal.SIGINT)


@contextlib.contextmanager
def suspendable(before: Callable[[], None], after: Callable[[], None]) -> Iterator[None]:
    """Handle Ctrl-Z during the block: call `before`, restore the terminal, and stop the process.

    When the process goes on, call `after`.
    """
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
