"""Killed, or failed by the disk, at each system call from the start through calibration, which keeps every block.

Each call has one of the troubles, by turns: an attempt takes half a second.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

from crash.tracing import EVERY, NAMES, SYNCS, WRITES, every_call, usable
from crash.workshop import Job, build_models, digests, emptied, is_clean

from lowmem_aim.measuring import snapshots

KILLED = "kills"
TROUBLES = {KILLED: "signal=SIGKILL:when={}", "EIO": "error=EIO:when={}", "ENOSPC": "error=ENOSPC:when={}+"}


def suite(job: Job, short: bool) -> str:
    if not usable():
        return "skipped: strace is missing or may not trace"
    snapshots.SECONDS = 0.0
    job = _with_aim(job.work.parent / "calibrated")
    out, counts = job.work / "out", Counter[str]()
    for kind in ("fsync",) if short else (*WRITES, *SYNCS, *NAMES):
        for first, trouble in enumerate(TROUBLES):
            numbers = EVERY[first : first + 1] if short else EVERY[first::3]
            for where, result in every_call(job, out, kind, TROUBLES[trouble], numbers, segments=("start",)):
                wanted = result.code == -9 if trouble == KILLED else result.code == 0 or is_clean(result, 4)
                assert wanted, f"{trouble}, {where}: {result}"
                job.check_no_half_model(out)
                job.finish(out)
                counts[trouble] += 1
    told = ", ".join(f"{count} {trouble}" for trouble, count in counts.items())
    return f"{told}; every output the same bytes"


def _with_aim(work: Path) -> Job:
    build_models(emptied(work), num_hidden_layers=2)
    texts = work / "texts.txt"
    texts.write_text("A text of some words, and of some more words after them.\n\nAnother text.")
    flags = ("--omega", "0.4", "--calibration", str(texts), "--block-size", "32", "--no-cache")
    job = Job(work, {}, flags)
    done = job.here(work / "whole")
    assert done.code == 0, done
    return replace(job, expected=digests(work / "whole"))
