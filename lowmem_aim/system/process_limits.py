"""Limits that a process sets itself before it reads what nobody has vetted: of its memory, its time, its network."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from pathlib import Path

_PAGES_FILE = Path("/proc/self/statm")
_PARENT_DEATH_SIGNAL = 1  # of Linux' prctl
_LOOK_SECONDS = 1.0  # between two looks for the parent, where no system tells of its end
_NEW_USER, _NEW_NETWORK = 0x10000000, 0x40000000  # CLONE_NEWUSER and CLONE_NEWNET of Linux


def is_limited() -> bool:
    """Whether the system limits a process's memory for data (RLIMIT_DATA, which counts all of it on Linux only)."""
    return sys.platform == "linux" and _PAGES_FILE.exists()


def limit_memory(more_bytes: int) -> None:
    """Allow this process so much more memory than it has now, if the system can do that."""
    if not is_limited():
        return
    import resource

    data_now = int(_PAGES_FILE.read_text().split()[5]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = data_now + more_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


def lift_limit() -> None:
    """Take the limit of this process's memory away again."""
    if is_limited():
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))


def end_after(seconds: int) -> None:
    """End this process after some seconds, whatever it does then; 0: not at all. A parent that was killed cannot."""
    if hasattr(signal, "alarm"):  # not on Windows
        signal.alarm(seconds)


def end_with_parent(parent: int) -> None:
    """End this process as soon as its parent, the process with this id, is gone, even if that was killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    elif hasattr(os, "getppid"):
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    if os.getppid() != parent:  # it was gone before that
        os._exit(1)


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_LOOK_SECONDS)
    os._exit(1)


def resident_bytes() -> int:
    """The bytes of RAM that this process has, where its memory is limited; else 0."""
    if not is_limited():
        return 0
    import resource

    return int(_PAGES_FILE.read_text().split()[1]) * resource.getpagesize()


def peak_bytes() -> int:
    """The most bytes of RAM that this process has had, where its memory is limited; else 0."""
    if not is_limited():
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # of Linux, in units of 1024 bytes


def leave_network() -> str:
    """Take this process's network away for good; returns why that cannot be done, or an empty string.

    It then lives in a network namespace of its own, in which nothing can be reached, this machine itself neither. To be
    called while the process has one thread: systems allow those without privileges no other.
    """
    if sys.platform != "linux":
        return "only Linux can do that"
    library = ctypes.CDLL(None, use_errno=True)
    # A new user namespace gives an ordinary user the right to the other one; whoever has the right needs none.
    for flags in (_NEW_NETWORK, _NEW_USER | _NEW_NETWORK):
        if library.unshare(flags) == 0:
            return ""
    return os.strerror(ctypes.get_errno())


def limit_for_good(memory_bytes: int, file_bytes: int, seconds: int) -> None:
    """Allow this process, and those that it starts, each so much memory, files of this size and processor time.

    Nothing in the process can lift these limits again. Systems may not have some of them.
    """
    import resource

    limits = {
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_FSIZE: file_bytes,
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_CORE: 0,
    }
    for kind, most in limits.items():
        _, hard = resource.getrlimit(kind)
        wanted = most if hard == resource.RLIM_INFINITY else min(most, hard)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(kind, (wanted, wanted))
