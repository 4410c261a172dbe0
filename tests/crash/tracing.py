"""Attempts under strace, which is attached at a chosen point of the run, so that calls are counted from there on.

strace counts each thread's calls apart. Within a segment of the run - up to its first shard, each shard, the finish - a
kind of call is made by one thread only, so that in segments every call has a number of its own.
"""

from __future__ import annotations

import functools
import os
import shutil
import socket
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from crash.workshop import Ended, Job, emptied, ended, start

from lowmem_aim.jobs import merge as run
from lowmem_aim.output import shards

SEGMENTS = ("start", "shard 1", "shard 2", "shard 3", "finish")
WRITES = ("write", "pwrite64")
SYNCS = ("fsync", "fdatasync")
NAMES = ("rename", "unlink", "unlinkat", "rmdir", "mkdir")
SIZES = ("ftruncate", "fallocate")
EVERY = range(1, 1000)


def usable() -> bool:
    """Whether there is strace, and it may trace (a container may forbid ptrace)."""
    if not shutil.which("strace"):
        return False
    return subprocess.run(["strace", "-o", os.devnull, "true"], capture_output=True).returncode == 0


def traced(job: Job, out: Path, arguments: list[str], segment: str = "", flags: Sequence[str] = ()) -> Ended:
    """An attempt with strace attached during a segment, or from the start to the end."""
    here, there = socket.socketpair()
    process, said = start([*job.command(out), *flags], functools.partial(_watch, segment, here, there))
    there.close()
    with here:
        if here.recv(1):  # else it ended before
            strace = _attached(process, arguments)
            here.send(b"1")
            if here.recv(1):
                strace.terminate()  # it lets go of the attempt, which goes on
                strace.wait()
                here.send(b"1")
            result = ended(process, said)
            with strace:  # waits for it
                return result
    return ended(process, said)


def every_call(
    job: Job, out: Path, kind: str, inject: str, numbers: Iterable[int] = EVERY, segments: Iterable[str] = SEGMENTS
) -> Iterator[tuple[str, Ended]]:
    """Attempts from scratch with trouble at each call of a kind in turn: (where, how it ended).

    `inject` as strace takes it, with `{}` for the number.
    """
    log = out.with_name("strace.log")
    for segment in segments:
        for number in numbers:
            emptied(out)
            trouble = f"inject={kind}:{inject.format(number)}"
            result = traced(job, out, ["-o", str(log), "-e", f"trace={kind}", "-e", trouble], segment)
            if result.code >= 0 and "(INJECTED)" not in log.read_text():
                break
            yield f"{kind} {number} of {segment}", result
    emptied(out)


def _attached(process: int, arguments: list[str]) -> subprocess.Popen[str]:
    command = ["strace", "-f", "-p", str(process), *arguments]
    strace = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert strace.stderr is not None
    line = strace.stderr.readline()
    assert "attached" in line, line
    return strace


def _watch(segment: str, here: socket.socket, there: socket.socket) -> None:
    """In the attempt: have strace attached where the segment begins, and detached where it ends."""
    here.close()  # it ends if the parent does
    asked: list[str] = []

    def begin(name: str) -> None:
        if name == (segment or "start") or (segment and len(asked) == 1):
            asked.append(name)
            there.send(b"1")  # no `write`: that might be counted
            assert there.recv(1)

    count = iter(range(1, 100))
    writer, publish = shards.ShardWriter, run.publish

    def begin_shard(*args: Any, **given: Any) -> Any:
        begin(f"shard {next(count)}")
        return writer(*args, **given)

    def begin_finish(*args: Any, **given: Any) -> Any:
        begin("finish")
        return publish(*args, **given)

    shards.ShardWriter, run.publish = begin_shard, begin_finish  # type: ignore[assignment, misc]
    begin("start")
