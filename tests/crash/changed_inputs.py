"""An expert's file changes while it is read: exit code 3, and nothing of the change stays in what is finished.

The change comes between a check of the file and the use of what is then read: the worst moment there is.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from crash.workshop import Job, at_call, emptied, is_clean

from lowmem_aim.models.tensor_files import TensorFiles

MOMENTS = (1, 4, 9, 14, 20, 25, 30, 36)  # checks; there are three models with a dozen tensors
SHORT_MOMENTS = (9,)


def suite(job: Job, short: bool) -> str:
    file, good, counts = job.work / "math" / "model.safetensors", job.work / "good.safetensors", Counter[str]()
    shutil.copy2(file, good)
    for mode in ("mmap", "pread"):
        for number in SHORT_MOMENTS if short else MOMENTS:
            for change in CHANGES:
                counts[_try(job, file, change, number, mode, good)] += 1
    assert counts["exit code 3"] > counts["the file as it was"], counts
    return ", ".join(f"{count} changes: {outcome}" for outcome, count in counts.items()) + "; then the same bytes"


def _try(job: Job, file: Path, change: Callable[[Path], None], number: int, mode: str, good: Path) -> str:
    out, where = emptied(job.work / "out"), f"{change.__name__} at check {number}, {mode}"
    trouble = functools.partial(change, file)
    try:
        done = job.attempt(
            out, lambda: at_call(TensorFiles, "_check_unchanged", number, trouble, after=True), "--read", mode
        )
        job.check_no_half_model(out)
        # A file that is replaced or removed is read to its end all the same: it is still open.
        kept = change in (_replace, _remove) and done.code == 0
        assert kept or is_clean(done, 3), f"{where}: {done}"
    finally:
        shutil.copy2(good, f"{file}.new")
        os.replace(f"{file}.new", file)
    job.finish(out)
    return "the file as it was" if kept else "exit code 3"


def _cut_off(file: Path) -> None:
    os.truncate(file, 5000)


def _cut_within_a_page(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 100)


def _edit(file: Path) -> None:
    """Every weight, in place."""
    size, header = file.stat().st_size, int.from_bytes(file.read_bytes()[:8], "little")
    with file.open("r+b") as stream:
        stream.seek(8 + header)
        stream.write(b"\x01" * (size - 8 - header))


def _replace(file: Path) -> None:
    other = file.with_name("other")
    shutil.copyfile(file, other)
    _edit(other)
    os.replace(other, file)


def _remove(file: Path) -> None:
    file.unlink()


CHANGES = (_cut_off, _cut_within_a_page, _edit, _replace, _remove)
