"""Forked processes that check one model type after another, under limits of time and memory."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

SECONDS, BYTES, AT_ONCE = 180, 6 << 30, 2
Check = Callable[[str, Path], tuple[str, str]]  # a model type, and an empty folder -> its outcome, and a text about it


@dataclass(frozen=True)
class Result:
    """The outcome of one model type, and what was said of it."""

    model_type: str
    outcome: str
    text: str


@dataclass
class Worker:
    """A forked process that checks one model after another: only the first pays for imports and compiled loops."""

    check: Check
    left: list[str]  # model types, the one in work first
    scratch: Path
    pid: int = 0
    since: float = 0.0  # when the one in work began

    def start(self) -> None:
        """Fork the process for all that is left."""
        self.since = time.monotonic()
        self.pid = os.fork()
        if not self.pid:
            try:
                resource.setrlimit(resource.RLIMIT_DATA, (BYTES, BYTES))
                for model_type in self.left:
                    self._checked(model_type)
            finally:
                os._exit(0)

    def results(self) -> Iterator[Result]:
        """Yield what has been found since the last call; a process that dies or takes too long is a result, too."""
        ended, status = os.waitpid(self.pid, os.WNOHANG)
        while self.left and (file := self.scratch / f"{self.left[0]}.json").is_file():
            yield Result(self.left.pop(0), *json.loads(file.read_text()))
            self.since = time.monotonic()
        if not ended and self.left and time.monotonic() - self.since > SECONDS:
            os.kill(self.pid, signal.SIGKILL)
            ended, status = os.waitpid(self.pid, 0)
        if ended and self.left:
            yield Result(self.left.pop(0), "wrong", f"its process ended with status {status}")
            if self.left:
                self.start()

    def _checked(self, model_type: str) -> None:
        with (
            open(os.devnull, "w") as nowhere,
            contextlib.redirect_stdout(nowhere),
            contextlib.redirect_stderr(nowhere),
            tempfile.TemporaryDirectory(prefix=f"{model_type}-", dir=self.scratch) as folder,
        ):
            found = self.check(model_type, Path(folder))
        part = self.scratch / f"{model_type}.part"
        part.write_text(json.dumps(found))
        part.rename(self.scratch / f"{model_type}.json")


def in_processes(check: Check, model_types: Sequence[str], scratch: Path) -> Iterator[Result]:
    """Check each model in one of a few processes."""
    workers = [Worker(check, list(model_types[i::AT_ONCE]), scratch) for i in range(min(AT_ONCE, len(model_types)))]
    for worker in workers:
        worker.start()
    while any(worker.left for worker in workers):
        time.sleep(0.05)
        for worker in workers:
            if worker.left:
                yield from worker.results()
