"""The wall clock jumps a day forth and back all the time: progress is told sanely, the lock holds, runs go on."""

from __future__ import annotations

import os
import re
import sys
import time
from pathlib import Path

from crash.workshop import Job, at_call, emptied, ended, is_clean, kill, start

from lowmem_aim.jobs import merge as run
from lowmem_aim.output.journal import Journal

DAY = 86_400
_TIMES = re.compile(r"(-?)\b(\d+ d )?(\d+:)?(\d+):(\d\d)\b")


def suite(job: Job, short: bool) -> str:
    out = emptied(job.work / "out")
    told = 0
    for bars in (False, True):
        loud = [word for word in job.command(emptied(out)) if word != "--quiet"]
        done = ended(*start(loud, lambda bars=bars: _jumping(bars)))
        assert done.code == 0, done
        job.check_whole(out)
        told += _check_times(done.text)
    _locked_all_the_same(job, emptied(out))
    killed = job.attempt(emptied(out), lambda: (_jumping(), at_call(Journal, "keep_group", 6, kill)))
    assert killed.code == -9, killed
    for folder in ("base", "math"):
        _date(job.work / folder / "model.safetensors", time.time() + DAY)
    done = job.attempt(out, lambda: _jumping())
    assert done.code == 0, done
    job.check_whole(out)
    return f"{told} times told, all sane; a lock that holds, a run that goes on, inputs of tomorrow: the same bytes"


def _jumping(bars: bool = False) -> None:
    """From now on each look at the wall clock is a day off, by turns forth and back."""
    real, looks = time.time, iter(range(10**9))
    time.time = lambda: real() + (DAY if next(looks) % 2 else -DAY)
    if bars:
        os.environ |= {"TERM": "xterm"}
        os.environ.pop("CI", None)
        sys.stderr.isatty = lambda: True  # type: ignore[method-assign]


def _check_times(text: str) -> int:
    found = _TIMES.findall(text)
    assert found, f"no time was told: {text!r}"
    for sign, days, hours, minutes, _ in found:
        assert not sign, text
        assert not days, text
        assert not hours, text
        assert int(minutes) < 60, text
    return len(found)


def _locked_all_the_same(job: Job, out: Path) -> None:
    """A run that holds its folder while the clock jumps is not taken for dead."""
    ready, go = os.pipe(), os.pipe()

    def hold() -> None:
        _jumping()
        at_call(run, "publish", 1, lambda: (os.write(ready[1], b"1"), os.read(go[0], 1)))

    process, said = start(job.command(out), hold)
    os.read(ready[0], 1)
    second = job.attempt(out, _jumping)
    assert is_clean(second, 6), second
    os.write(go[1], b"1")
    done = ended(process, said)
    assert done.code == 0, done
    job.check_whole(out)
    for descriptor in (*ready, *go):
        os.close(descriptor)


def _date(file: Path, seconds: float) -> None:
    os.utime(file, (seconds, seconds))
