"""A tiny merge that runs in a tenth of a second: its models, its command, the bytes that must come out.

Every attempt is a fork of this process, which has torch imported and has merged once, and runs the program's own
command line. What the attempt says comes back through shared memory, so that failing writes cannot silence it.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import mmap
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Before torch is imported: forks must not inherit threads that are not there.
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ["JE_ARROW_MALLOC_CONF"] = "background_thread:false"

import tiny
from reading_here import read_here
from tqdm import tqdm

from lowmem_aim.cli.main import main
from lowmem_aim.errors import LowmemAimError
from lowmem_aim.output import writer as write
from lowmem_aim.output.folder import PRIVATE, STAGING, SUMS, is_finished
from lowmem_aim.output.journal import Journal
from lowmem_aim.output.records import PlanSize
from lowmem_aim.output.verify import verify
from lowmem_aim.output.writer import finished_prefix
from lowmem_aim.view.status import status_of

GROUP_BYTES = write.GROUP_BYTES  # as users have it
EXPERTS = ("math", "code")
SHARD_BYTES = 60_000  # three shards
_SAID_BYTES = 1 << 20


@dataclass(frozen=True)
class Ended:
    """How an attempt ended: exit code, or minus the signal that killed it; and what it said."""

    code: int
    text: str


@dataclass(frozen=True)
class Job:
    work: Path
    expected: dict[str, str]  # file name -> sha256, of an uninterrupted run
    flags: tuple[str, ...] = ()  # beside the usual ones

    def command(self, out: Path) -> list[str]:
        experts = [word for name in EXPERTS for word in ("--expert", str(self.work / name))]
        flags = ["--method", "ties", "--density", "0.5", "--shard-size", str(SHARD_BYTES), "--ram", "4GB", "--quiet"]
        return ["merge", str(out), "--base", str(self.work / "base"), *experts, *flags, *self.flags]

    def attempt(self, out: Path, before: Callable[[], object] = lambda: None, *flags: str) -> Ended:
        """Run the command in a fork; `before` prepares that process for its trouble."""
        process, said = start([*self.command(out), *flags], before)
        return ended(process, said)

    def here(self, out: Path) -> Ended:
        """The same in this process: quicker, for trouble that lies on the disk."""
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
            code = command_line(self.command(out))
        return Ended(code, said.getvalue())

    def finish(self, out: Path, *flags: str) -> None:
        """The same command must go on to the same bytes."""
        done = self.attempt(out, lambda: None, *flags)
        assert done.code == 0, f"the same command ended with {done.code}:\n{done.text}"
        self.check_whole(out)

    def check_whole(self, out: Path) -> None:
        assert digests(out) == self.expected, f"other bytes in {out}"
        assert is_finished(out), f"{out} does not count as finished"
        verify(out, f"{PRIVATE}/{SUMS}")

    def check_no_half_model(self, out: Path) -> None:
        """What could be loaded, or counts as finished, is all there."""
        if (out / "config.json").exists() or is_finished(out):
            assert digests(out) == self.expected, f"half a model in {out}"

    def check_told(self, out: Path) -> None:
        """Looking on from outside works, whatever the moment of the kill."""
        if (out / PRIVATE).is_dir():
            assert status_of(out).state == ("finished" if is_finished(out) else "interrupted")

    def killed(self, out: Path, owner: Any, name: str, number: int) -> None:
        """Leave an interrupted run in `out`: killed when `owner.name` is called for the `number`th time."""
        emptied(out)
        done = self.attempt(out, lambda: at_call(owner, name, number, kill))
        assert done.code == -9, done


def make_job(work: Path) -> Job:
    """Build the models in `work` and merge once, in this process, so that forks begin warm."""
    build_models(emptied(work), num_hidden_layers=1)
    write.GROUP_BYTES = 1  # every tensor is a commit of its own
    done = Job(work, {}).here(work / "whole")
    assert done.code == 0, done
    return Job(work, digests(work / "whole"))


def build_models(work: Path, **changes: Any) -> None:
    """A base and its experts; `changes` as `tiny.build` takes them."""
    read_here()
    tqdm.monitor_interval = 0  # its thread would be missing in the forks
    with contextlib.redirect_stderr(io.StringIO()):
        base = tiny.build("llama", work / "base", **changes)
    for seed, name in enumerate(EXPERTS, start=1):
        tiny.perturbed(base, work / name, scale=0.05, seed=seed)


def digests(out: Path) -> dict[str, str]:
    files = [file for file in out.iterdir() if file.is_file()]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def at_call(owner: Any, name: str, number: int, trouble: Callable[[], object], *, after: bool = False) -> None:
    """`trouble` comes when `owner.name` is called for the `number`th time: before its work, or after."""
    work, count = getattr(owner, name), iter(range(1, 100_000))

    def counted(*args: Any, **given: Any) -> Any:
        now = next(count) == number
        if now and not after:
            trouble()
        result = work(*args, **given)
        if now and after:
            trouble()
        return result

    setattr(owner, name, counted)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def finished_tensors(out: Path) -> int:
    """How many tensors the journal and the shards' bytes agree on."""
    count = 0
    with Journal(out / PRIVATE, read_only=True) as journal:
        for name in (journal.kept(PlanSize) or PlanSize()).shards:
            places = (out / PRIVATE / STAGING / name, out / name)
            found = [finished_prefix(place, journal.groups(name))[0] for place in places]
            count += max(prefix.tensors if prefix else 0 for prefix in found)
    return count


def emptied(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def start(command: list[str], before: Callable[[], object]) -> tuple[int, mmap.mmap]:
    """Fork, and run the program's command line there; the process and what it will have said."""
    assert len(os.listdir("/proc/self/task")) == 1, "a fork of several threads may hang"
    descriptor = os.memfd_create("said")
    os.truncate(descriptor, 2 * _SAID_BYTES)
    said = mmap.mmap(descriptor, 2 * _SAID_BYTES)
    process = os.fork()
    if process:
        os.close(descriptor)
        return process, said
    code = 70  # of a failure here, before or after the program
    try:
        os.lseek(descriptor, _SAID_BYTES, os.SEEK_SET)
        os.dup2(descriptor, 2)  # last words, by a plain write
        sys.stdout = sys.stderr = io.StringIO()
        before()
        code = command_line(command)
    except BaseException:
        traceback.print_exc()
    finally:
        said.write(sys.stderr.getvalue().encode()[:_SAID_BYTES])
        os._exit(code)


def ended(process: int, said: mmap.mmap) -> Ended:
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    with said:
        return Ended(code, said.read().replace(b"\0", b"").decode())


def is_clean(error: Ended, code: int) -> bool:
    """Whether it ended with an error for people, not with a traceback."""
    return error.code == code and error.text.startswith("error: ") and "Traceback" not in error.text


def refusal(work: Callable[[], object]) -> LowmemAimError | None:
    """The error for people that `work` ends with; any other exception goes through."""
    try:
        work()
    except LowmemAimError as error:
        return error
    return None


def command_line(command: list[str]) -> int:
    sys.argv = ["lowmem-aim", *command]
    try:
        main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0
