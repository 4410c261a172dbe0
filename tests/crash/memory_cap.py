"""The system refuses memory beyond --ram and a fifth (RLIMIT_DATA): the merge ends with the same bytes.

The limit counts what is reserved, used or not; what the imports have reserved and not used is added to it.
"""

from __future__ import annotations

import functools
import resource
from pathlib import Path

import torch
from crash.workshop import Job, build_models, digests, emptied

from lowmem_aim.system.memory import anonymous_bytes

# Three models of some 165 MB in bfloat16: one in memory would not fit.
SIZES = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4, "vocab_size": 32768}
WORK_BYTES = 160 << 20  # what --ram leaves: for the compiled loops, what ties holds, and slices
HOPELESS_BYTES = 16 << 20


def suite(job: Job, short: bool) -> str:
    if short:
        return "skipped: not in the short form"
    large = Job(emptied(job.work / "large"), {})
    build_models(large.work, dtype=torch.bfloat16, **SIZES)
    out = large.work / "out"
    done = large.attempt(out)
    assert done.code == 0, done
    expected = digests(out)
    ram = anonymous_bytes() + WORK_BYTES
    limit = _reserved_bytes() + ram * 6 // 5 - anonymous_bytes()
    flags = ("--ram", str(ram), "--read", "pread")
    refused = large.attempt(emptied(out), functools.partial(_cap, _reserved_bytes() + HOPELESS_BYTES), *flags)
    assert refused.code, "the limit does not bite"
    done = large.attempt(emptied(out), functools.partial(_cap, limit), *flags)
    assert done.code == 0, done
    assert digests(out) == expected, "other bytes"
    emptied(out)
    return f"--ram {ram >> 20} MB, a limit of {limit >> 20} MB reserved: the same bytes"


def _cap(limit: int) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def _reserved_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData:"))
