"""SIGKILL at random times until the merge is done, again and again: the same bytes, and little is done twice.

The times are uniform over what a run takes (start, calibration, merge); one in ten falls into the finish. After each
kill what had been done is compared with what the journal has of it. No more may be lost than one block of calibration
(here each is kept), or the group that is being committed, the one that is being filled and the tensors in work.
"""

from __future__ import annotations

import collections
import random
from dataclasses import dataclass, field
from pathlib import Path

from crash.killing import Work, models_with_texts
from crash.workshop import EXPERTS, GROUP_BYTES, Job, digests, emptied

from lowmem_aim.view.status import Status

KILLS, FEW_KILLS = 60, 2
SHAPE = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6, "vocab_size": 4000}
SMALL_SHAPE = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4}


@dataclass
class Toll:
    """What all kills have cost."""

    kills: collections.Counter[str] = field(default_factory=collections.Counter)  # by the phase that they fell into
    blocks: int = 0  # the most that one kill cost
    bytes: int = 0

    def add(self, log: Path, kept: Status | None) -> None:
        """`log`: what the killed process had done; `kept`: what the journal has of it."""
        lines = log.read_text().split("\n")[:-1] if log.is_file() else []
        lines = [line for line in lines if not line.startswith("told ")]
        phase, done = lines[-1].split() if lines else ("start", "0")
        self.kills[phase] += 1
        if phase == "calibrate" and not (kept and kept.activations):
            self.blocks = max(self.blocks, int(float(done)) - (kept.blocks if kept else 0))
        if phase == "merge":
            self.bytes = max(self.bytes, int(done) - (kept.bytes if kept else 0))

    def __str__(self) -> str:
        return ", ".join(f"{count} in {phase}" for phase, count in sorted(self.kills.items()))


def suite(job: Job, short: bool) -> str:
    shape = SMALL_SHAPE if short else SHAPE
    folder = models_with_texts(job.work.parent / "kills", shape)
    flags = ["--method", "ties", "--density", "0.5", "--omega", "0.4", "--no-cache"]
    flags += ["--calibration", str(folder / "texts.txt"), "--block-size", "100"]
    work = Work(folder, [*flags, *(word for name in EXPERTS for word in ("--expert", str(folder / name)))])
    draw, toll, merges = random.Random(0), Toll(), 0
    while toll.kills.total() < (FEW_KILLS if short else KILLS):
        out = emptied(work.folder / "out")
        work.until_done(out, draw, toll.add)
        assert digests(out) == work.expected, f"other bytes in merge {merges}, after {toll}"
        merges += 1
    # Two tensors: one is computed while the one before it is written.
    largest = shape["hidden_size"] * max(shape["intermediate_size"], shape.get("vocab_size", 264)) * 4
    may_be_lost = 2 * GROUP_BYTES + 2 * largest
    assert toll.blocks <= 1, f"{toll.blocks} blocks were lost"
    assert toll.bytes <= may_be_lost, f"{toll.bytes} bytes were lost, more than {may_be_lost}"
    lost = f"{toll.blocks} block or {toll.bytes / 1e6:.0f} MB (allowed: 1, {may_be_lost / 1e6:.0f} MB)"
    return f"{toll.kills.total()} kills ({toll}) in {merges} merges, the same bytes; one cost at most {lost}"
