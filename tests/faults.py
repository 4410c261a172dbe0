"""System calls that fail on one file of a run, as a disk, a network or a permission would make them fail."""

from __future__ import annotations

import builtins
import io
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Kinds of calls -> the functions that make them, each (module, name).
CALLS: dict[str, tuple[tuple[Any, str], ...]] = {
    "open": ((os, "open"), (io, "open"), (builtins, "open")),
    "list": ((os, "scandir"), (os, "listdir")),
    "look": ((os, "stat"), (os, "lstat")),
    "read": ((os, "preadv"), (os, "fstat")),
    "write": ((os, "write"), (os, "posix_fallocate"), (os, "ftruncate")),
    "sync": ((os, "fsync"), (os, "fdatasync")),
    "rename": ((os, "replace"),),
    "make": ((os, "mkdir"),),
    "remove": ((os, "unlink"), (os, "rmdir")),
}
_names = os.readlink  # kept: the functions above are replaced


def _file(what: Any) -> Path | None:
    """The file that a call was given, by its name or as an open one."""
    try:
        if isinstance(what, int):
            return Path(_names(f"/proc/self/fd/{what}"))
        return Path(os.fsdecode(what)) if isinstance(what, str | bytes | os.PathLike) else None
    except OSError:
        return None


@contextmanager
def _watched(kind: str, see: Callable[[Path, Any], None]) -> Iterator[None]:
    """Call `see` with the file, and with what names it in the call, before every call of a kind."""

    def watching(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            if arguments and (file := _file(arguments[0])) is not None:
                see(file, arguments[0])
            return real(*arguments, **named)

        return call

    there = [(module, name) for module, name in CALLS[kind] if hasattr(module, name)]
    before = [(module, name, getattr(module, name)) for module, name in there]
    for module, name, real in before:
        setattr(module, name, watching(real))
    try:
        yield
    finally:
        for module, name, real in before:
            setattr(module, name, real)


@contextmanager
def counted(kind: str, folder: Path) -> Iterator[Counter[Path]]:
    """Count the calls of a kind, by the file in `folder` that they are given."""
    counts: Counter[Path] = Counter()

    def see(file: Path, what: Any) -> None:
        if folder in file.parents:
            counts[file] += 1

    with _watched(kind, see):
        yield counts


@contextmanager
def failing(kind: str, file: Path, code: int, first: int = 1) -> Iterator[None]:
    """Let calls of a kind on `file` fail with the error number `code`, from the `first` such call on."""
    met = 0

    def see(seen: Path, what: Any) -> None:
        nonlocal met
        met += seen == file
        if seen == file and met >= first:
            of = () if isinstance(what, int) else (os.fspath(what),)
            raise OSError(code, os.strerror(code), *of)

    with _watched(kind, see):
        yield
