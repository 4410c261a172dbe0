"""A command's work while it is shown: signals heeded, events drawn, and at the end the path of what was made."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lowmem_aim.cli import formats
from lowmem_aim.system import interrupts

if TYPE_CHECKING:
    from lowmem_aim.events import Emit, Event
    from lowmem_aim.view.dashboard import Style


def refuse_if_running(out: Path) -> None:
    """Raise LockedError if a run holds `out`, before anything slow is imported; the run itself checks again."""
    from lowmem_aim.system.lock import is_held, locked_error, owner_of

    lock = out / ".lowmem_aim" / "lock"
    if is_held(lock):
        raise locked_error(lock, owner_of(lock))


def run(work: Callable[[Emit], Path | None], style: Style, merges: bool = False) -> None:
    """Run a command's work with its progress shown, then print the path of what it made. `merges`: that is a model."""
    from lowmem_aim.events import RunEnded, Sampled, Worked
    from lowmem_aim.view import summary
    from lowmem_aim.view.dashboard import showing
    from lowmem_aim.view.wrapping import columns_of

    with interrupts.work(), showing(style) as view:

        def checked(event: Event) -> None:
            if isinstance(event, Worked):
                interrupts.hold()
            if not isinstance(event, Sampled | RunEnded):  # these are shown also when the run is being ended
                interrupts.check()
            view(event)

        try:
            made = work(checked)
            if not view.progress.ended:  # no run, but `verify` or `evaluate --fetch`
                view(RunEnded("finished", 0))
        finally:
            if style == "json" and view.progress.ended:
                formats.answered()
    if style in ("human", "plain") and view.progress.planned:
        columns = columns_of(sys.stderr)
        told = summary.summary_lines(view.progress, columns)
        with contextlib.suppress(OSError):  # nobody reads it any more
            for line in (*told, *(summary.next_commands(made, columns) if made and merges else ())):
                click.echo(line, err=True)
    if made and style != "json":
        print_path(made)


def print_path(made: Path) -> None:
    """Print what was made on stdout, byte for byte: the encoding of stdout may lack a letter of the path."""
    click.echo(os.fsencode(made) if hasattr(sys.stdout, "buffer") else click.format_filename(made))
