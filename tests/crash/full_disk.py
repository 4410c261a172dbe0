"""A small tmpfs as the disk: too small is seen before work; filled up by another file, the run ends with code 4."""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from crash.workshop import Job, at_call, emptied, is_clean

from lowmem_aim.jobs import merge as run
from lowmem_aim.output import shards
from lowmem_aim.output.journal import Journal

TOO_SMALL, ENOUGH = "20m", "60m"  # small files are reckoned with 50 MB
MOMENTS: tuple[tuple[Any, str, int], ...] = (
    (shards, "ShardWriter", 1),
    (shards, "ShardWriter", 2),
    (Journal, "keep_group", 1),
    (Journal, "keep_group", 7),
    (run, "publish", 1),
)
FEW_MOMENTS = (MOMENTS[1], MOMENTS[3], MOMENTS[4])


def suite(job: Job, short: bool) -> str:
    disk = emptied(job.work / "disk")
    disk.mkdir()
    if os.geteuid() or not _mount(disk, TOO_SMALL):
        return "skipped: only root can mount a tmpfs"
    with _unmounted(disk):
        done = job.attempt(disk / "out")
        assert is_clean(done, 4), done
        assert not list(disk.iterdir()), "it had begun"
    assert _mount(disk, ENOUGH)
    with _unmounted(disk):
        moments = FEW_MOMENTS if short else MOMENTS
        for owner, name, number in moments:
            out = emptied(disk / "out")
            done = job.attempt(out, functools.partial(at_call, owner, name, number, functools.partial(_fill, disk)))
            assert is_clean(done, 4), (name, number, done)
            job.check_no_half_model(out)
            (disk / "filler").unlink()
            job.finish(out)
    return f"too small is seen before work; full at {len(moments)} moments, every output the same bytes afterwards"


def _mount(folder: Path, size: str) -> bool:
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    return subprocess.run(command, capture_output=True).returncode == 0


@contextlib.contextmanager
def _unmounted(folder: Path) -> Iterator[None]:
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def _fill(disk: Path) -> None:
    piece = bytes(4096)
    with (disk / "filler").open("wb", buffering=0) as stream, contextlib.suppress(OSError):
        while True:
            stream.write(piece)
