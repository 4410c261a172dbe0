"""Events as lines of JSON: `--json` prints them, OUT/.lowmem_aim/run.log holds them, `replay` reads them again.

A line is an object: `t` (seconds since the run began), `event` (its kind) and the event's fields; the first of a run,
`run_started`, also has `schema`. docs/events.md is the reference. A reader skips kinds and fields that it does not
know, and lines that are cut off: within one schema things are only added.

The log is for people and for `replay`. It is not synced: a merge resumes from the journal, not from the log.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from lowmem_aim import events
from lowmem_aim.events import Event, RunStarted, Sampled, Worked
from lowmem_aim.output.folder import LOG
from lowmem_aim.system.files import open_regular, open_to_read

SCHEMA = 1
# Samples are kept once a second at first, and further apart the longer a run takes: a day's log has 1 MB of them.
SPARSER_AFTER_SECONDS = 600.0

Timed = tuple[float, Event]


def _snake(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


KINDS: dict[str, type[Any]] = {
    _snake(kind.__name__): kind
    for kind in vars(events).values()
    if isinstance(kind, type) and dataclasses.is_dataclass(kind) and kind is not Worked
}


def to_line(t: float, event: Event) -> str:
    """One event as a line of JSON, without the newline. `t` is in seconds since the run began."""
    first = {"schema": SCHEMA} if isinstance(event, RunStarted) else {}
    fields = {field.name: getattr(event, field.name) for field in dataclasses.fields(event)}
    return json.dumps({"t": round(t, 3), "event": _snake(type(event).__name__), **first, **fields}, default=dict)


def from_line(line: str) -> Timed | None:
    """The time and the event of a line; None if this version has no such event, or a value is of a wrong type."""
    try:
        found = json.loads(line, parse_constant=_refused)
        kind, known = KINDS[found["event"]], _fields(found["event"])
        values = {name: _tuples(value) for name, value in found.items() if name in known}
        if not all(_fits(value, known[name]) for name, value in values.items()) or not _fits(found["t"], float):
            return None
        return float(found["t"]), kind(**values)
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
        return None


@functools.cache  # evaluating the annotations takes longer than all else that is done with a line
def _fields(kind: str) -> dict[str, Any]:
    return get_type_hints(KINDS[kind])


def _refused(constant: str) -> float:
    raise ValueError(f"{constant} is no JSON")


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value from JSON has a field's type: the log is a file, and anybody may have edited it."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is Literal:
        return value in inner
    if origin is tuple:
        ends = len(inner) == 2 and inner[1] is Ellipsis
        hints = [inner[0]] * len(value) if ends and isinstance(value, tuple) else inner
        return isinstance(value, tuple) and len(value) == len(hints) and all(map(_fits, value, hints))
    if origin is Mapping:
        return isinstance(value, dict) and all(_fits(part, inner[1]) for part in value.values())
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return hint is Any or (isinstance(value, hint) and isinstance(value, bool) == (hint is bool))


def runs_in(log: Path) -> list[list[Timed]]:
    """The events of each run that wrote to a log, in order; empty if there is no log."""
    runs: list[list[Timed]] = []
    with contextlib.suppress(OSError), open_to_read(log, follow=False) as stream:
        lines = io.TextIOWrapper(stream, encoding="utf-8", errors="replace")
        for timed in map(from_line, lines):
            if timed and isinstance(timed[1], RunStarted):
                runs.append([])
            if timed and runs:
                runs[-1].append(timed)
    return runs


class Log:
    """The log of a run. Events are held back until `open` says to which files they go."""

    def __init__(self) -> None:
        self._held: list[str] = []
        self._descriptors: list[int] = []
        self._next_sample = 0.0

    def add(self, t: float, event: Event) -> None:
        """Add an event, `t` seconds after the run began. Worked events and most samples are left out."""
        if isinstance(event, Worked) or (isinstance(event, Sampled) and not self._wanted(t)):
            return
        self._held.append(to_line(t, event) + "\n")
        if self._descriptors:
            self._write(self._descriptors, self._take())

    def _wanted(self, t: float) -> bool:
        if t < self._next_sample:
            return False
        self._next_sample = t + t / SPARSER_AFTER_SECONDS
        return True

    def _take(self) -> bytes:
        data, self._held = "".join(self._held).encode("utf-8", "surrogatepass"), []
        return data

    def open(self, folders: Iterable[Path]) -> None:
        """Append to run.log in each folder from now on, beginning with the events held back.

        A log that cannot be written is left out; no error is raised.
        """
        for folder in folders:
            with contextlib.suppress(OSError):  # a run without a log is no failure
                flags = os.O_RDWR | os.O_APPEND | os.O_CREAT
                self._descriptors.append(open_regular(folder / LOG, flags, follow=False))
        self._write([d for d in self._descriptors if _is_cut_off(d)], b"\n")
        self._write(self._descriptors, self._take())

    def _write(self, descriptors: Iterable[int], data: bytes) -> None:
        for descriptor in descriptors:
            left = memoryview(data)
            with contextlib.suppress(OSError):  # a full disk is reported when shards are written
                while left:
                    left = left[os.write(descriptor, left) :]

    def close(self) -> None:
        """Close the files."""
        descriptors, self._descriptors = self._descriptors, []
        for descriptor in descriptors:
            with contextlib.suppress(OSError):
                os.close(descriptor)


def _is_cut_off(descriptor: int) -> bool:
    """Whether the last line has no newline, as a killed run may leave it."""
    end = os.lseek(descriptor, 0, os.SEEK_END)
    if not end:
        return False
    os.lseek(descriptor, end - 1, os.SEEK_SET)
    return os.read(descriptor, 1) != b"\n"
