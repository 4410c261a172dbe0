"""A program of this package run in a process apart: no variables of the user's, a folder of its own, and a deadline.

What goes in and what comes back lies in files, and not in pipes: a process that is left behind could keep a pipe open
for ever.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import lowmem_aim
from lowmem_aim.system.files import temporary_folder

_PATH = "/usr/local/bin:/usr/bin:/bin"
_LONGEST_WORDS = 2000  # bytes of what a process has said on its standard error


@dataclass(frozen=True)
class Ended:
    """A process that has ended: its results, its exit status and its last words."""

    results: bytes  # what it has written to its standard output, from the beginning
    code: int | None  # its exit status, -N for the signal N; None: its time was over
    said: str  # the last line of its standard error


def run_apart(
    program: str,
    words: Sequence[object],
    content: bytes,
    seconds: float,
    longest: int,
    variables: Mapping[str, str] | None = None,
) -> Ended:
    """Run a module of this package in a process apart until it ends, or until its time is over.

    The process gets the id of this one and `words` as arguments, and `content` on its standard input. It begins in the
    current folder; its own folder is its HOME. At most `longest` bytes of its results are taken. Of whatever it has
    started, what is in its session ends with it. Raises DiskError.
    """
    with temporary_folder() as folder, contextlib.ExitStack() as open_files:
        text, results, said = (open_files.enter_context(tempfile.TemporaryFile()) for _ in range(3))
        text.write(content)
        text.seek(0)
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", f"lowmem_aim.{program}", str(os.getpid()), *map(str, words)],
            stdin=text,
            stdout=results,
            stderr=said,
            env={**_environment(folder), **(variables or {})},
            start_new_session=True,  # Ctrl-C at the terminal is the parent's
        )
        code = None
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = process.wait(seconds)
        finally:
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)  # what it has started too
            process.wait()
        results.seek(0)
        return Ended(results.read(longest), code, _last_line(said))


def _environment(folder: str) -> dict[str, str]:
    """Variables for the process: where Python finds this package, and nothing of the user's."""
    return {
        "PYTHONPATH": package_folder(),
        "PATH": _PATH,
        "HOME": folder,
        "TMPDIR": folder,
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def package_folder() -> str:
    """The folder that this package lies in."""
    return str(Path(lowmem_aim.__file__).parents[1])


def _last_line(said: IO[bytes]) -> str:
    size = said.seek(0, os.SEEK_END)
    said.seek(max(0, size - _LONGEST_WORDS))
    lines = said.read().decode("utf-8", "replace").strip().splitlines()
    return lines[-1] if lines else ""
