"""A model's weights are changed after the finish: exit code 7, and the output as it was; times alone are no change."""

from __future__ import annotations

import os
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from crash.workshop import EXPERTS, Job, emptied, is_clean

from lowmem_aim.models.headers import read_header

TIMES = 48
SHORT_TIMES = 4


def suite(job: Job, short: bool) -> str:
    out, draw, counts = job.work / "out", random.Random(0), Counter[str]()
    shutil.copytree(job.work / "whole", emptied(out))
    times = SHORT_TIMES if short else TIMES
    for number in range(times):
        model = ("base", *EXPERTS)[number % 3]
        change, code = CHANGES[number // 3 % len(CHANGES)] if not short else CHANGES[number % len(CHANGES)]
        counts[_try(job, out, job.work / model / "model.safetensors", change, code, draw)] += 1
    assert all(counts.values()), counts
    told = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
    return f"{times} changes ({told}), the output as it was"


def _try(
    job: Job, out: Path, file: Path, change: Callable[[Path, random.Random], None], code: int, draw: random.Random
) -> str:
    good = job.work / "good.safetensors"
    shutil.copy2(file, good)
    where = f"{change.__name__}, {file.parent.name}"
    try:
        change(file, draw)
        for flags in ((), ("--fresh",)):
            done = job.attempt(out, lambda: None, *flags)
            assert done.code == 0 if code == 0 else is_clean(done, code), f"{where}: {done}"
            if code:
                assert f"`{file.parent.name}` no longer has the same `" in done.text, f"{where}: {done}"
            job.check_whole(out)
    finally:
        shutil.copy2(good, f"{file}.new")
        os.replace(f"{file}.new", file)
    done = job.attempt(out)
    assert done.code == 0, f"{where}, given back: {done}"
    return "refused: exit code 7" if code else "of times alone: finished"


def _one_bit(file: Path, draw: random.Random) -> None:
    """Flip one bit of a weight, in place."""
    info = draw.choice(list(read_header(file).values()))
    place = draw.randrange(info.begin, info.end)
    with file.open("r+b") as stream:
        stream.seek(place)
        byte = stream.read(1)[0]
        stream.seek(place)
        stream.write(bytes([byte ^ 1 << draw.randrange(8)]))


def _another_file(file: Path, draw: random.Random) -> None:
    """Put another file in the place of `file`, with its time."""
    times = file.stat()
    other = file.with_name("other")
    shutil.copyfile(file, other)
    _one_bit(other, draw)
    os.replace(other, file)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def _touched(file: Path, draw: random.Random) -> None:
    os.utime(file, (1, draw.randrange(2, 10**9)))


def _copied(file: Path, draw: random.Random) -> None:
    shutil.copyfile(file, file.with_name("other"))
    os.replace(file.with_name("other"), file)


CHANGES: tuple[tuple[Callable[[Path, random.Random], None], int], ...] = (
    (_one_bit, 7),
    (_touched, 0),
    (_another_file, 7),
    (_copied, 0),
)
