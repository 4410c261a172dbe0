"""A merge that is killed at random times, and begun again, until it is done."""

from __future__ import annotations

import contextlib
import functools
import os
import random
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from crash.workshop import GROUP_BYTES, build_models, digests, emptied, ended, start

from lowmem_aim.events import Advanced, Event, Notice, PhaseStarted, TensorDone
from lowmem_aim.measuring import snapshots
from lowmem_aim.output import writer as write
from lowmem_aim.output.folder import PRIVATE
from lowmem_aim.solving import kept_states
from lowmem_aim.view import dashboard
from lowmem_aim.view.status import Status, status_of

ATTEMPTS = 400  # for one merge: none should need so many
_LOOK = os.WEXITED | os.WNOHANG | os.WNOWAIT


def models_with_texts(folder: Path, shape: dict[str, int]) -> Path:
    """A base, its experts, and `texts.txt` of eight texts, in a new folder."""
    build_models(emptied(folder), **shape)
    texts = (f"A text of some words, the {number}th of them. " * 5 for number in range(8))
    (folder / "texts.txt").write_text("\n\n".join(texts))
    return folder


class Work:
    """A merge that takes some seconds, and what must come out."""

    def __init__(self, folder: Path, flags: Sequence[str]) -> None:
        """`folder` has the models, see `models_with_texts`."""
        self.folder = folder
        self.command = ["--base", str(folder / "base"), *flags]
        self._log = folder / "log"
        emptied(folder / "whole")
        started = time.monotonic()
        process, said = start(["merge", str(folder / "whole"), *self.command], self._follow)
        done = ended(process, said)
        assert done.code == 0, done
        self._took = time.monotonic() - started
        self.expected = digests(folder / "whole")

    def until_done(self, out: Path, draw: random.Random, killed: Callable[[Path, Status | None], None]) -> None:
        """Run and kill, again and again; `killed` is given the log of each killed run, and what its journal has."""
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
            killed(self._log, kept)
        raise AssertionError(f"it was not done after {ATTEMPTS} attempts")

    def _wait(self, process: int, deadline: float, phase: str = "no such") -> None:
        """Until then, or until a phase begins, or the process has ended."""
        while time.monotonic() < deadline and not os.waitid(os.P_PID, process, _LOOK):
            if self._log.is_file() and f"{phase} " in self._log.read_text():
                return
            time.sleep(0.002)

    def _follow(self) -> None:
        """A fork's setting: it writes down how far the run is, and keeps every calibrated block."""
        dashboard.showing = functools.partial(_written, self._log)
        snapshots.SECONDS = kept_states.SECONDS = 0.0
        write.GROUP_BYTES = GROUP_BYTES


@contextlib.contextmanager
def _written(file: Path, style: dashboard.Style) -> Iterator[dashboard.View]:
    with file.open("w", buffering=1) as log:

        class View(dashboard.Quiet):
            def __call__(self, event: Event) -> None:
                super().__call__(event)
                if isinstance(event, PhaseStarted | Advanced | TensorDone):
                    current = self.progress.current
                    print(current.phase if current else "", event.done, file=log)
                if isinstance(event, Notice):
                    print("told", event.text.replace(" ", "_"), file=log)

        yield View(time.monotonic)


def _looked_at(out: Path, before: Status | None) -> Status | None:
    """Check that a kill has left no model, and nothing less than before."""
    assert not (out / "config.json").exists() or (out / "model.safetensors").exists(), "a config beside no weights"
    if not (out / PRIVATE).is_dir():
        return before
    now = status_of(out)
    if before and now.state != "finished":
        assert now.tensors >= before.tensors, f"finished tensors were lost: {before}, then {now}"
        assert now.activations or now.blocks >= before.blocks, f"calibrated blocks were lost: {before}, then {now}"
    return now
