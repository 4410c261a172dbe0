"""Files and processes that a process can reach, limited by itself for good: Landlock, on Linux 5.13 and later."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterable
from pathlib import Path

_CREATE, _ADD, _RESTRICT = 444, 445, 446  # system calls, the same on all machines
_CAPABILITIES = 0x20080522  # the version of the form in which they are given
_ASK_VERSION, _BENEATH, _NO_NEW_RIGHTS = 1, 1, 38
# Rights of Landlock, as bits: what can be done to a file, and with what lies in a folder.
_READ = 0b1101  # execute, read a file, list a folder
_READ_FILE = 0b101
_WRITE = 0b1_1111_1111_0010  # write, remove, and make anything: the first version's
_MOVE, _TRUNCATE = 1 << 13, 1 << 14  # of versions 2 and 3
_WRITE_FILE = 0b10 | _TRUNCATE
_NO_SOCKETS_NO_SIGNALS = 0b11  # to processes that are not confined with this one: version 6


def cannot_confine() -> str:
    """Why no process can be confined here; an empty string if one can."""
    if sys.platform != "linux":
        return "only Linux can do that"
    return "" if _version() > 0 else "this Linux has no Landlock"


def confine(readable: Iterable[str | Path], writable: Iterable[str | Path]) -> None:
    """Let this thread, and all that it starts, reach these files and folders alone. Those that are missing are skipped.

    What is `writable` can be read, too. Processes outside can be neither looked into nor sent signals, and rights of
    root are gone. Files that are open stay open. Each further call takes more away, and nothing gives it back. Raises
    OSError where the system cannot do it.
    """
    rights = _rights(_version())
    ruleset = _call(_CREATE, _Ruleset(rights, 0, _NO_SOCKETS_NO_SIGNALS if _version() >= 6 else 0))
    try:
        for paths, allowed in ((readable, _READ), (writable, _READ | rights)):
            for path in paths:
                _allow(ruleset, path, allowed & rights)
        # Root may look into any process, so that root's rights go first; no program that is started gives them back.
        if (
            _library().prctl(_NO_NEW_RIGHTS, 1, 0, 0, 0)
            or _library().capset(ctypes.byref(_Whose(_CAPABILITIES, 0)), ctypes.byref(_Capabilities()))
            or _library().syscall(_RESTRICT, ruleset, 0)
        ):
            raise _failure()
    finally:
        os.close(ruleset)


class _Ruleset(ctypes.Structure):
    _fields_ = (("files", ctypes.c_uint64), ("network", ctypes.c_uint64), ("scope", ctypes.c_uint64))


class _Rule(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("allowed", ctypes.c_uint64), ("parent", ctypes.c_int32))


class _Whose(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("process", ctypes.c_int))  # process 0: this one


class _Capabilities(ctypes.Structure):
    """The rights of root that a process has: none."""

    _fields_ = (("sets", ctypes.c_uint32 * 6),)


def _library() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _failure() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))


def _version() -> int:
    """The version of Landlock that the system has; -1 if it has none."""
    return int(_library().syscall(_CREATE, None, ctypes.c_size_t(0), _ASK_VERSION))


def _rights(version: int) -> int:
    """All rights that are taken away, by the version: a system refuses those that it does not know."""
    return _READ | _WRITE | (_MOVE if version >= 2 else 0) | (_TRUNCATE if version >= 3 else 0)


def _call(number: int, ruleset: _Ruleset) -> int:
    made = int(_library().syscall(number, ctypes.byref(ruleset), ctypes.c_size_t(ctypes.sizeof(ruleset)), 0))
    if made < 0:
        raise _failure()
    return made


def _allow(ruleset: int, path: str | Path, allowed: int) -> None:
    try:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    try:
        if not os.path.isdir(place):
            allowed &= _READ_FILE | _WRITE_FILE
        if _library().syscall(_ADD, ruleset, _BENEATH, ctypes.byref(_Rule(allowed, place)), 0):
            raise _failure()
    finally:
        os.close(place)
