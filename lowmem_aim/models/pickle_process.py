"""The child process that loads pickled tensors (`models.pickle_program`), as its parent sees it."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from lowmem_aim.errors import ModelError, printable
from lowmem_aim.models.pickle_program import PAGES_GONE, PIECE_BYTES
from lowmem_aim.models.reader_process import LONGEST_ANSWER, answer_or_raise, environment_of_child
from lowmem_aim.system.dtypes import BY_NAME, Dtype
from lowmem_aim.system.files import temporary_folder

MEMORY_BYTES = 2_000_000_000  # that the child may take beyond twice the size of a file
SECONDS = 120  # for opening a file, torch's import included; more for a large one that is read whole


@dataclass(frozen=True)
class PickledTensor:
    """A tensor of a pickled file."""

    name: str
    dtype: Dtype
    shape: tuple[int, ...]
    same_as: str  # the first name that the file has for the same elements; mostly its own


@dataclass
class PickleReader(contextlib.AbstractContextManager["PickleReader"]):
    """A running child. Make it with `start`, and use it as a context manager."""

    process: subprocess.Popen[bytes]
    stderr: IO[bytes]
    scratch: tempfile.TemporaryDirectory[str]
    network: str = ""  # why the child could use the network; empty: it cannot
    _file: Path | None = None  # the one that is open

    @classmethod
    def start(cls) -> PickleReader:
        """Start the child. Raises DiskError."""
        # Both are closed and removed at the end.
        scratch = temporary_folder()
        stderr = tempfile.TemporaryFile(dir=scratch.name)  # noqa: SIM115
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "lowmem_aim.models.pickle_program", str(MEMORY_BYTES), str(SECONDS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            env=environment_of_child(scratch.name),
            start_new_session=True,  # Ctrl-C at the terminal is the parent's
        )
        reader = cls(process, stderr, scratch)
        try:
            reader.network = str(reader._answer("this model"))
        except BaseException:
            reader.close()
            raise
        return reader

    def open(self, file: Path, whole: bool) -> list[PickledTensor]:
        """Open a file, and close the one before; its tensors. With `whole` it is read into memory, not mapped.

        Raises ModelError for a file that cannot be mapped or holds anything but tensors, MemoryBudgetError.
        """
        self._file = file
        found = self._ask({"open": str(file), "whole": whole})
        return [PickledTensor(t["name"], BY_NAME[t["dtype"]], tuple(t["shape"]), t["same_as"]) for t in found]

    def data(self, name: str) -> Iterator[bytes]:
        """Yield the bytes of a tensor of the open file in pieces; all of them must be taken.

        Raises ModelError, MemoryBudgetError.
        """
        assert self.process.stdout is not None
        left = int(self._ask({"hand_over": name}))
        while left:
            piece = self.process.stdout.read(min(left, PIECE_BYTES))
            if not piece:
                raise self._failure(f"`{printable(str(self._file))}`")
            left -= len(piece)
            yield piece

    def _ask(self, question: Mapping[str, Any]) -> Any:
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):  # a dead child: told below
            self.process.stdin.write(json.dumps(question).encode() + b"\n")
            self.process.stdin.flush()
        return self._answer(f"`{printable(str(self._file))}`")

    def _answer(self, what: str) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline(LONGEST_ANSWER)
        if not line.endswith(b"\n"):
            raise self._failure(what)
        return answer_or_raise(json.loads(line))

    def _failure(self, what: str) -> ModelError:
        """The error for a child that is gone."""
        ended_by = -self.process.wait()
        if ended_by in (getattr(signal, "SIGBUS", None), -PAGES_GONE):
            return ModelError(f"{what} was cut off while it was being read, or its disk failed")
        if ended_by == getattr(signal, "SIGALRM", None):
            return ModelError(f"{what} takes more than {SECONDS} seconds to open")
        self.stderr.seek(0)
        said = self.stderr.read()[-2000:].decode("utf-8", "replace").strip().splitlines()
        cause = printable(said[-1]) if said and ended_by < 0 else "it was killed, perhaps by a system short of memory"
        return ModelError(f"the process that reads {what} ended: {cause}", "give the same command again")

    def close(self) -> None:
        """End the child, whatever it does."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.stderr):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        self.scratch.cleanup()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
