"""SIGKILL at each system call that changes the output, in turn; the same command goes on to the same bytes."""

from __future__ import annotations

from crash.tracing import EVERY, NAMES, SIZES, SYNCS, WRITES, every_call, usable
from crash.workshop import Job


def suite(job: Job, short: bool) -> str:
    if not usable():
        return "skipped: strace is missing or may not trace"
    kinds = ("rename", "fallocate") if short else (*WRITES, *SYNCS, *NAMES, *SIZES)
    out, counts = job.work / "out", dict.fromkeys(kinds, 0)
    for kind in kinds:
        for where, result in every_call(job, out, kind, "signal=SIGKILL:when={}", EVERY[::6] if short else EVERY):
            assert result.code == -9, f"{where}: {result}"
            job.check_no_half_model(out)
            job.check_told(out)
            job.finish(out)
            counts[kind] += 1
    told = ", ".join(f"{kind} {count}" for kind, count in counts.items() if count)
    assert counts["fallocate"] == 3, told  # one a shard: the counting is right
    return f"{sum(counts.values())} kills ({told}), every output the same bytes"
