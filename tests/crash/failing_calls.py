"""EIO once and ENOSPC from then on, at the system calls that change the output: exit code 4, then the same bytes."""

from __future__ import annotations

from collections import Counter

from crash.tracing import EVERY, NAMES, SEGMENTS, SIZES, SYNCS, WRITES, every_call, usable
from crash.workshop import Job, is_clean

ONCE, LASTING = "EIO once", "ENOSPC from then on"
TROUBLES = {ONCE: "error=EIO:when={}", LASTING: "error=ENOSPC:when={}+"}
# Of these there are hundreds: every second has a trouble, by turns.
NUMBERS = {
    (kind, trouble): EVERY[first::4]
    for kind in ("pwrite64", "fdatasync")
    for first, trouble in ((0, ONCE), (2, LASTING))
}
FEW = {"fallocate": ("shard 2",), "rename": ("finish",)}


def suite(job: Job, short: bool) -> str:
    if not usable():
        return "skipped: strace is missing or may not trace"
    kinds = FEW if short else dict.fromkeys((*WRITES, *SYNCS, *NAMES, *SIZES), SEGMENTS)
    out, counts = job.work / "out", Counter[str]()
    for kind, segments in kinds.items():
        for trouble, inject in TROUBLES.items():
            numbers = EVERY[::9] if short else NUMBERS.get((kind, trouble), EVERY)
            for where, result in every_call(job, out, kind, inject, numbers, segments):
                try:
                    job.check_no_half_model(out)
                    # 0: what failed was not needed, such as the note of who holds the lock
                    assert result.code == 0 or is_clean(result, 4), result
                    job.finish(out)
                except AssertionError as error:
                    raise AssertionError(f"{trouble}, {where}; first: {result}") from error
                counts["exit code 4" if result.code else "not needed"] += 1
    assert counts["exit code 4"] > counts["not needed"], counts
    told = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
    return f"{sum(counts.values())} failures ({told}), every output the same bytes afterwards"
