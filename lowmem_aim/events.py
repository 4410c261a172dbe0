"""All that a user interface may see of a run: frozen dataclasses, emitted by the work and drawn by `dashboard`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class PhaseStarted:
    """A phase begins; `total` is its amount of work in `unit`s."""

    phase: Literal["download", "calibrate", "compare", "merge", "finish", "verify"]
    total: int
    unit: Literal["blocks", "bytes", "files"]


@dataclass(frozen=True)
class Advanced:
    """`done` of the current phase's units are finished so far; `item` names the last one."""

    done: int
    item: str = ""


@dataclass(frozen=True)
class PhaseEnded:
    phase: Literal["download", "calibrate", "compare", "merge", "finish", "verify"]


@dataclass(frozen=True)
class Notice:
    """Something that the user should know and that stops nothing."""

    text: str
    level: Literal["info", "warning"] = "info"


Event = PhaseStarted | Advanced | PhaseEnded | Notice
Emit = Callable[[Event], None]


def silent(event: Event) -> None:
    """The Emit of callers that show nothing."""
