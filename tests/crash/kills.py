"""SIGKILL at random times until the merge is done, again and again: the same bytes, and little is done twice.

The times are uniform over what a run takes (start, calibration, merge); one in ten falls into the finish. After each
kill what had been done is compared with what the journal has of it. No more may be lost than one block of calibration
(here each is kept), or the group that is being committed, the one that is being filled and the tensors in work.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import os
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from crash.workshop import EXPERTS, GROUP_BYTES, Job, build_models, digests, emptied, ended, start

from lowmem_aim.events import Advanced, Event, PhaseStarted, TensorDone
from lowmem_aim.measuring import snapshots
from lowmem_aim.output import writer as write
from lowmem_aim.output.folder import PRIVATE
from lowmem_aim.view import dashboard
from lowmem_aim.view.status import Status, status_of

KILLS, FEW_KILLS = 60, 2
ATTEMPTS = 400  # for one merge: none should need so many
SHAPE = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6, "vocab_size": 4000}
_LOOK = os.WEXITED | os.WNOHANG | os.WNOWAIT
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
        phase, done = lines[-1].split() if lines else ("start", "0")
        self.kills[phase] += 1
        if phase == "calibrate" and not (kept and kept.activations):
            self.blocks = max(self.blocks, int(float(done)) - (kept.blocks if kept else 0))
        if phase == "merge":
            self.bytes = max(self.bytes, int(done) - (kept.bytes if kept else 0))

    def __str__(self) -> str:
        return ", ".join(f"{count} in {phase}" for phase, count in sorted(self.kills.items()))


def suite(job: Job, short: bool) -> str:
    work = Work(job.work.parent / "kills", SMALL_SHAPE if short else SHAPE)
    draw, toll, merges = random.Random(0), Toll(), 0
    while toll.kills.total() < (FEW_KILLS if short else KILLS):
        out = emptied(work.folder / "out")
        work.until_done(out, draw, toll)
        assert digests(out) == work.expected, f"other bytes in merge {merges}, after {toll}"
        merges += 1
    may_be_lost = 2 * GROUP_BYTES + work.in_work
    assert toll.blocks <= 1, f"{toll.blocks} blocks were lost"
    assert toll.bytes <= may_be_lost, f"{toll.bytes} bytes were lost, more than {may_be_lost}"
    lost = f"{toll.blocks} block or {toll.bytes / 1e6:.0f} MB (allowed: 1, {may_be_lost / 1e6:.0f} MB)"
    return f"{toll.kills.total()} kills ({toll}) in {merges} merges, the same bytes; one cost at most {lost}"


class Work:
    """A merge with AIM that takes some seconds, and what must come out."""

    def __init__(self, folder: Path, shape: dict[str, int]) -> None:
        self.folder = emptied(folder)
        build_models(folder, **shape)
        self.command = ["--base", str(folder / "base"), *("--method", "ties", "--density", "0.5", "--omega", "0.4")]
        self.command += [word for name in EXPERTS for word in ("--expert", str(folder / name))]
        texts = folder / "texts.txt"
        texts.write_text("\n\n".join(f"A text of some words, the {number}th of them. " * 5 for number in range(8)))
        self.command += ["--calibration", str(texts), "--block-size", "100", "--no-cache"]
        self._log = folder / "log"
        started = time.monotonic()
        process, said = start(["merge", str(folder / "whole"), *self.command], self._follow)
        done = ended(process, said)
        assert done.code == 0, done
        self._took = time.monotonic() - started
        self.expected = digests(folder / "whole")
        sizes = [shape["hidden_size"] * size * 4 for size in (shape["intermediate_size"], shape.get("vocab_size", 264))]
        self.in_work = 2 * max(sizes)  # bytes: one tensor is computed while the one before it is written

    def until_done(self, out: Path, draw: random.Random, toll: Toll) -> None:
        """Run and kill, again and again."""
        kept = None
        for _ in range(ATTEMPTS):
            self._log.unlink(missing_ok=True)
            process, said = start(["merge", str(out), *self.command], self._follow)
            if draw.random() < 0.1:  # the finish is short: by chance alone it would be hit once in a hundred times
                self._wait(process, time.monotonic() + 10 * self._took, "finish")
                self._wait(process, time.monotonic() + draw.uniform(0, 0.02))
            else:
                self._wait(process, time.monotonic() + draw.uniform(0, self._took * 0.8))
            os.kill(process, signal.SIGKILL)  # of one that has ended it is nothing
            done = ended(process, said)
            if done.code == 0:
                return
            assert done.code == -signal.SIGKILL, done
            kept = _looked_at(out, kept)
            toll.add(self._log, kept)
        raise AssertionError(f"it was not done after {ATTEMPTS} attempts")

    def _wait(self, process: int, deadline: float, phase: str = "no such") -> None:
        """Until then, or until a phase begins, or the process has ended."""
        while time.monotonic() < deadline and not os.waitid(os.P_PID, process, _LOOK):
            if self._log.is_file() and f"{phase} " in self._log.read_text():
                return
            time.sleep(0.002)

    def _follow(self) -> None:
        """In the fork: write down how far the run is, and keep every calibrated block."""
        dashboard.showing = functools.partial(_written, self._log)
        snapshots.SECONDS, write.GROUP_BYTES = 0.0, GROUP_BYTES


@contextlib.contextmanager
def _written(file: Path, style: dashboard.Style) -> Iterator[dashboard.View]:
    with file.open("w", buffering=1) as log:

        class View(dashboard.Quiet):
            def __call__(self, event: Event) -> None:
                super().__call__(event)
                if isinstance(event, PhaseStarted | Advanced | TensorDone):
                    current = self.progress.current
                    print(current.phase if current else "", event.done, file=log)

        yield View(time.monotonic)


def _looked_at(out: Path, before: Status | None) -> Status | None:
    """What a kill has left: no model, and nothing less than before."""
    assert not (out / "config.json").exists() or (out / "model.safetensors").exists(), "a config beside no weights"
    if not (out / PRIVATE).is_dir():
        return before
    now = status_of(out)
    if before and now.state != "finished":
        assert now.tensors >= before.tensors, f"finished tensors were lost: {before}, then {now}"
        assert now.activations or now.blocks >= before.blocks, f"calibrated blocks were lost: {before}, then {now}"
    return now
