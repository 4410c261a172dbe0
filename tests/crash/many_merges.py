"""Fifty merges in one process: its memory does not grow, and no descriptor stays open."""

from __future__ import annotations

import gc
import os
import statistics
from pathlib import Path

from crash.workshop import Job, emptied

from lowmem_aim.system.memory import anonymous_bytes

MERGES, WARM = 50, 10
SHORT_MERGES, SHORT_WARM = 6, 2
GROWTH = 0.01


def suite(job: Job, short: bool) -> str:
    merges, warm = (SHORT_MERGES, SHORT_WARM) if short else (MERGES, WARM)
    memory: list[int] = []
    descriptors: list[int] = []
    for _ in range(merges):
        out = emptied(job.work / "out")
        done = job.here(out)
        assert done.code == 0, done
        gc.collect()
        memory.append(anonymous_bytes())
        descriptors.append(len(list(Path("/proc/self/fd").iterdir())))
    job.check_whole(out)
    assert len(os.listdir("/proc/self/task")) == 1, "threads were left"
    assert descriptors[-1] == descriptors[warm - 1], descriptors
    # Of ten: a single merge takes some MB more or less than the one before, as threads come and go.
    growth = statistics.median(memory[-warm:]) / statistics.median(memory[warm : 2 * warm]) - 1
    assert short or growth < GROWTH, [size >> 10 for size in memory]
    return f"{merges} merges: memory {growth:+.2%} between the second {warm} and the last, as many descriptors"
