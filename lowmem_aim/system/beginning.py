"""The moment at which the command began, before anything slow was imported: loading it belongs to its time too."""

from __future__ import annotations

import time

_began: list[float] = []


def note() -> None:
    """Note that the command begins now."""
    _began[:] = [time.monotonic()]


def began() -> float:
    """The time.monotonic() of `note`; of now in a process that was not started as the command."""
    return _began[0] if _began else time.monotonic()
