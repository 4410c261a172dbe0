"""SIGKILL at random times, again and again, of merges whose methods solve: the same bytes.

Hidden states are kept before every block, so that runs which go on find some; what they lose is at most one block.
"""

from __future__ import annotations

import collections
import random
from dataclasses import dataclass, field
from pathlib import Path

from crash.killing import Work, models_with_texts
from crash.workshop import EXPERTS, Job, digests, emptied

from lowmem_aim.view.status import Status

METHODS = ("covariance", "regmean", "regmean_plus")
KILLS, FEW_KILLS = 20, 1  # of each method
SHAPE = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6}
SMALL_SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}
WENT_ON = "told resuming:_the_texts_have_passed"


@dataclass
class Toll:
    """The kills, and the runs after them that went on from hidden states."""

    kills: collections.Counter[str] = field(default_factory=collections.Counter)  # by the phase that they fell into
    went_on: int = 0

    def add(self, log: Path, kept: Status | None) -> None:
        """`log`: what the killed process had done."""
        lines = log.read_text().split("\n")[:-1] if log.is_file() else []
        phases = [line.split()[0] for line in lines if not line.startswith("told ")]
        self.kills[phases[-1] if phases else "start"] += 1
        self.went_on += any(line.startswith(WENT_ON) for line in lines)


def suite(job: Job, short: bool) -> str:
    folder = models_with_texts(job.work.parent / "solving", SMALL_SHAPE if short else SHAPE)
    told = [_killed(method, folder, short) for method in METHODS]
    return "; ".join(told) + "; always the same bytes"


def _killed(method: str, folder: Path, short: bool) -> str:
    texts = "" if method == "covariance" else f"={folder / 'texts.txt'}"
    experts = [word for name in EXPERTS for word in ("--expert", f"{folder / name}{texts}")]
    work, draw, toll, merges = Work(folder, ["--method", method, *experts]), random.Random(0), Toll(), 0
    while toll.kills.total() < (FEW_KILLS if short else KILLS):
        out = emptied(folder / "out")
        work.until_done(out, draw, toll.add)
        assert digests(out) == work.expected, f"other bytes in merge {merges} by {method}, after {toll}"
        merges += 1
    assert short or method == "covariance" or toll.went_on, f"no run went on from hidden states: {toll}"
    phases = ", ".join(f"{count} in {phase}" for phase, count in sorted(toll.kills.items()))
    again = f", {toll.went_on} went on from hidden states" if texts else ""
    return f"{method}: {toll.kills.total()} kills ({phases}) in {merges} merges{again}"
