"""Merges that end early: stopped by an exception after some tensors, or held in a process of their own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lowmem_aim.events import Event, Notice, TensorDone
from lowmem_aim.jobs.merge import merge
from lowmem_aim.system.options import Options

SHARDS = Options(shard_bytes=40_000)  # several shards of a tiny Llama


class Stopped(BaseException):
    """As a signal would."""


def stopping_after(tensors: int, notices: list[str] | None = None) -> Callable[[Event], None]:
    """An Emit that stops the run when so many tensors are done; it adds what was noticed to `notices`."""
    left = [tensors]

    def emit(event: Event) -> None:
        if isinstance(event, Notice) and notices is not None:
            notices.append(event.text)
        if isinstance(event, TensorDone) and not event.earlier:
            left[0] -= 1
            if left[0] < 0:
                raise Stopped

    return emit


def stop(job: Any, out: Path, tensors: int, options: Options = SHARDS) -> None:
    """Merge into `out` until so many tensors are done."""
    with pytest.raises(Stopped):
        merge(job, out, options, stopping_after(tensors))


def held(
    hold: str,  # the full name of the function in which the merge stands still, "package.module.function"
    *arguments: object,  # of the command line
) -> subprocess.Popen[str]:
    """The program in a process of its own that is where `hold` is called, and stays there; the caller ends it."""
    module, _, function = hold.rpartition(".")
    code = (
        "import time, lowmem_aim.system.interrupts as i; i.install()\n"
        f"import {module} as module\n"
        "def stop(*a, **k):\n print('HOLD', flush=True)\n while True: time.sleep(0.01)\n"
        f"module.{function} = stop\n"
        "from lowmem_aim.cli.main import main; main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "HOLD\n"
    return process
