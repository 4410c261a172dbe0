"""Merge + AIM of every causal language model that transformers has, against a plain computation.

    python tests/architectures/all_causal_models.py [MODEL_TYPE ...]

Each is built tiny, by a shrunk config, and two experts of it are merged with ties and AIM in float32. The result is
compared tensor by tensor with `tests/plain.py`. Each runs in a forked process, under limits of time and memory.
The exit code is 1 if any result is wrong, or worse than docs/architectures.md says; otherwise the page is written anew.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import shrinking  # noqa: E402
import tables  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from small_merges import merged_and_compared  # noqa: E402
from tables import Result  # noqa: E402

SECONDS, BYTES, AT_ONCE = 180, 6 << 30, 2


def main() -> int:
    chosen = sys.argv[1:] or shrinking.model_types()
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    results: list[Result] = []
    with tempfile.TemporaryDirectory(prefix="architectures-") as scratch:
        os.environ["XDG_CACHE_HOME"] = str(Path(scratch) / "cache")
        for result in in_processes(chosen, Path(scratch)):
            results.append(result)
            print(f"{result.model_type:28} {result.outcome:8} {result.text}", flush=True)
    known = tables.documented()
    worse = [problem for result in results for problem in tables.worse_than_documented(result, known)]
    if not worse:
        tables.write(results)
    print("\n".join(["", tables.summary(results), *worse]))
    return 1 if worse else 0


# --- processes ------------------------------------------------------------------------------------------------------


@dataclass
class Worker:
    """A forked process that checks one model after another: only the first pays for imports and compiled loops."""

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
                    _check(model_type, self.scratch)
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


def in_processes(model_types: Sequence[str], scratch: Path) -> Iterator[Result]:
    """Check each model in one of a few processes."""
    workers = [Worker(list(model_types[i::AT_ONCE]), scratch) for i in range(min(AT_ONCE, len(model_types)))]
    for worker in workers:
        worker.start()
    while any(worker.left for worker in workers):
        time.sleep(0.05)
        for worker in workers:
            if worker.left:
                yield from worker.results()


def _check(model_type: str, scratch: Path) -> None:
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
        tempfile.TemporaryDirectory(prefix=f"{model_type}-", dir=scratch) as folder,
    ):
        found = merged_and_compared(model_type, Path(folder))
    part = scratch / f"{model_type}.part"
    part.write_text(json.dumps([found.kind, found.text]))
    part.rename(scratch / f"{model_type}.json")


if __name__ == "__main__":
    sys.exit(main())
