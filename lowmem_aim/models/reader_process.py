"""The child process of `Reader`, as its parent sees it: questions go in, answers come back, deadlines are kept.

One JSON object a line, both ways. A question is answered by two lines: the first once its imports are done, the second
with the answer: {"answer": ...}, or {"error": class, "problems": [...], "hints": [...]}. If a child is late, too large
or dead, that is an error of this question only.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import psutil

import lowmem_aim
from lowmem_aim import errors
from lowmem_aim.errors import printable
from lowmem_aim.system.files import temporary_folder
from lowmem_aim.system.process_limits import is_limited
from lowmem_aim.units import shown

MEMORY_BYTES = 2_000_000_000  # that an answer may take, above the imports
SECONDS = 60  # for an answer
IMPORT_SECONDS = 300  # for torch and transformers, on a cold and slow disk
LONGEST_ANSWER = 256_000_000  # characters; a vocabulary of 262,000 tokens has 7 million
_LOOK_SECONDS = 0.1  # between two looks at the child's memory, where the system cannot limit it


# The signals of those who end processes, and of a system without memory.
_FROM_OUTSIDE = {getattr(signal, name, None) for name in ("SIGKILL", "SIGTERM", "SIGHUP", "SIGINT")}


class ReaderFailed(Exception):
    """The child did not answer; the text says why, and continues `reading the config ...`."""


class ReaderKilled(ReaderFailed):
    """The child was ended from outside, which says nothing about the files that it was reading."""


@dataclass
class ReaderProcess:
    """A running child. Make it with `start`, and `end` it."""

    process: subprocess.Popen[str]
    lines: queue.SimpleQueue[str]  # of the child's answers; "" once it has closed its end
    stderr: IO[bytes]
    scratch: tempfile.TemporaryDirectory[str]  # the child's temporary folder: killed, it cannot remove its files
    _imports_bytes: int = 0  # in RAM before the answer was begun; see `_resident_bytes`

    @classmethod
    def start(cls) -> ReaderProcess:
        """Start the child, which imports nothing large before it is asked something that needs it. Raises DiskError."""
        # Both are closed and removed by `end`.
        scratch = temporary_folder()
        stderr = tempfile.TemporaryFile(dir=scratch.name)  # noqa: SIM115
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "lowmem_aim.models.reader_program", str(MEMORY_BYTES), str(2 * SECONDS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            encoding="utf-8",
            env=environment_of_child(scratch.name),
            start_new_session=True,  # Ctrl-C at the terminal is the parent's
        )
        lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=_forward, args=(process.stdout, lines), daemon=True).start()
        return cls(process, lines, stderr, scratch)

    def ask(self, question: Mapping[str, Any]) -> Any:
        """The answer. Raises the error that is the answer, and ReaderFailed; then the child must be ended."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):  # a dead child: told below
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
        self._line(IMPORT_SECONDS)
        self._imports_bytes = self._resident_bytes()
        return answer_or_raise(json.loads(self._line(SECONDS)))

    def _line(self, seconds: float) -> str:
        until = time.monotonic() + seconds
        while True:
            try:
                line = self.lines.get(timeout=_LOOK_SECONDS)
            except queue.Empty:
                self._look(until)
                continue
            if not line.endswith("\n"):
                raise self._failure()
            return line

    def _look(self, until: float) -> None:
        """Raise ReaderFailed if the child is late, or has grown beyond what it may where nothing else limits it."""
        if time.monotonic() > until:
            raise ReaderFailed(f"takes more than {SECONDS} seconds")
        if self._imports_bytes and self._resident_bytes() > self._imports_bytes + MEMORY_BYTES:
            raise ReaderFailed(f"takes more than {shown(MEMORY_BYTES)} of memory")

    def _resident_bytes(self) -> int:
        """Bytes that the child has in RAM; 0 if the child is gone, or the system limits its memory."""
        if not is_limited():
            with contextlib.suppress(psutil.Error):
                return int(psutil.Process(self.process.pid).memory_info().rss)
        return 0

    def _failure(self) -> ReaderFailed:
        """Why the child is gone: what it last said, else that it was killed, or ended for its memory."""
        self.process.wait()
        self.stderr.seek(0)
        said = self.stderr.read()[-2000:].decode("utf-8", "replace").strip().splitlines()
        if -self.process.returncode in _FROM_OUTSIDE:
            return ReaderKilled(
                "was stopped: the process that reads it was killed, by somebody or by a system short of memory"
            )
        if said and not any(word in said[-1].lower() for word in ("memory", "alloc")):  # as std::bad_alloc
            return ReaderFailed(f"fails: {printable(said[-1])}")
        # Compiled code that gets no memory aborts with no word.
        return ReaderFailed(f"takes more than {shown(MEMORY_BYTES)} of memory")

    def end(self) -> None:
        """End the child, whatever it does."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.stderr):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        self.scratch.cleanup()


def answer_or_raise(line: Mapping[str, Any]) -> Any:
    """The answer in a line, or the LowmemAimError that it stands for, raised."""
    if "error" in line:
        raise getattr(errors, line["error"])(line["problems"], line["hints"])
    return line["answer"]


def environment_of_child(scratch: str) -> dict[str, str]:
    """Environment variables for a child with the temporary folder `scratch`.

    With them it finds this package, uses no network of its own accord and no GPU, and starts no threads.
    """
    paths = [str(Path(lowmem_aim.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        **dict.fromkeys(("TMPDIR", "TEMP", "TMP"), scratch),
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }


def _forward(stream: IO[str] | None, lines: queue.SimpleQueue[str]) -> None:
    """Put the child's lines into the queue; in a thread of its own, because pipes have no deadlines."""
    assert stream is not None
    with stream:
        with contextlib.suppress(OSError, ValueError):
            while (line := stream.readline(LONGEST_ANSWER)).endswith("\n"):
                lines.put(line)
        lines.put("")
