"""What `status` and `replay` tell of a run that sleeps, was killed, or was quit before anything was kept."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import Run
from merge_cases import recipe
from run_events import PLANNED, SAMPLE, STARTED, tensor
from stopping import SHARDS

from lowmem_aim.events import Advanced, Event, PhaseStarted, RunEnded, TensorDone
from lowmem_aim.jobs.calibrate import calibrate
from lowmem_aim.jobs.merge import merge
from lowmem_aim.measuring import snapshots
from lowmem_aim.output.folder import LOG, PRIVATE
from lowmem_aim.recipe.recipe import Aim
from lowmem_aim.system import interrupts
from lowmem_aim.system.files import partial_folder
from lowmem_aim.system.interrupts import GOES_ON, STARTS_OVER, Interrupted
from lowmem_aim.view.progress import Progress
from lowmem_aim.view.record import to_line
from lowmem_aim.view.status import status_of

ROOT = Path(__file__).parents[2]
HOLD = "import sys, time; from pathlib import Path; from lowmem_aim.system.lock import locked\n"
HOLD += "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"


def log_of(out: Path, *events: tuple[float, Event]) -> Path:
    (out / PRIVATE).mkdir(parents=True)
    (out / PRIVATE / LOG).write_text("".join(to_line(t, event) + "\n" for t, event in events))
    return out


def begun(done: float = 30.0) -> list[tuple[float, Event]]:
    phase = PhaseStarted("merge", 100, "bytes")
    return [(0.0, STARTED), (1.0, PLANNED), (2.0, phase), (3.0, SAMPLE), (3.0, tensor("a", 0, done))]


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="no process can be stopped here")
def test_a_stopped_run_is_told_from_a_working_one(tmp_path: Path, run: Run) -> None:
    out = log_of(tmp_path / "out", *begun())
    command = [sys.executable, "-c", HOLD, str(out / PRIVATE / "lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as process:
        try:
            assert process.stdout
            process.stdout.readline()
            assert run("status", out).out.startswith("running by process")
            process.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, process.pid, os.WSTOPPED)
            told = run("status", out).out
            assert told.startswith(f"stopped: process {process.pid} on ")
            assert f"`kill -CONT {process.pid}`" in told.splitlines()[0]
            assert status_of(out).state == "running", "for programs it is alive"
            process.send_signal(signal.SIGCONT)
            deadline = time.monotonic() + 30
            while status_of(out).stopped:
                assert time.monotonic() < deadline
            assert run("status", out).out.startswith("running by process")
            assert "merge: 30%, 30 bytes of 100 bytes" in told, "as on its screen"
        finally:
            process.kill()


class Quit:
    """A user who presses q once so many tensors are done."""

    def __init__(self, tensors: int) -> None:
        self.left, self.run = tensors, Progress()

    def __call__(self, event: Event) -> None:
        self.run.see(0.0, event)
        if isinstance(event, TensorDone | PhaseStarted):
            self.left -= isinstance(event, TensorDone) and not event.earlier
            if self.left <= 0 and not self.run.ended:
                raise Interrupted


@pytest.mark.parametrize(("tensors", "message"), [(0, STARTS_OVER), (5, GOES_ON)])
def test_a_run_that_is_quit_says_whether_anything_is_kept(
    tensors: int, message: str, llama: Path, tmp_path: Path, each_tensor: None, run: Run
) -> None:
    out, user = tmp_path / "out", Quit(tensors)
    with interrupts.work(), pytest.raises(Interrupted):
        merge(recipe(llama, "linear"), out, SHARDS, user)
    assert interrupts.message() == message
    assert user.run.ended == RunEnded("interrupted", 130, hint=message)
    told = run("status", out)
    assert (told.out.splitlines() or [""])[0] == ("" if tensors == 0 else GOES_ON)
    if not tensors:
        assert "kept nothing leaves nothing" in told.err
        assert "kept something" in run("replay", out).err
        return
    # The next run begins with the fraction that `status` tells.
    again = Quit(0)
    again.left = 1
    with interrupts.work(), pytest.raises(Interrupted):
        merge(recipe(llama, "linear"), out, SHARDS, again)
    first = next(iter(again.run.phases["merge"].marks))[1]
    assert f" {first / again.run.phases['merge'].total:.0%}, " in told.out


def test_a_replay_ends_with_the_summary_and_says_interrupted_where_the_run_was(tmp_path: Path, run: Run) -> None:
    out = log_of(tmp_path / "killed", *begun())
    told = run("replay", out).err
    assert re.search(r"(?m)^interrupted after 0:03 \(plan 0:02, merge 0:01\)$", told)
    assert "the process was killed" in told
    assert STARTS_OVER in told, "there is no journal"
    assert "  again     lowmem-aim merge recipe.yml out" in told
    drawn = run("replay", out, "--size", "80x24").out
    assert "interrupted  merge 30%, 30 bytes of 100 bytes" in drawn

    stopped = RunEnded("interrupted", 130, hint=GOES_ON)
    told = run("replay", log_of(tmp_path / "quit", *begun(), (4.0, stopped))).err
    assert "interrupted after 0:04" in told
    assert "  resume    lowmem-aim merge recipe.yml out" in told
    assert "killed" not in told

    failed = RunEnded("failed", 4, ("the disk is full",), "free some")
    told = run("replay", log_of(tmp_path / "failed", *begun(), (4.0, failed))).err
    assert "failed after 0:04" in told
    assert "  problem   the disk is full\n  hint      free some\n" in told


class TestACalibration:
    """`status FILE` tells of the calibration into that file, while it is made and afterwards."""

    def test_that_was_interrupted(
        self, llama: Path, texts: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        file, aim = tmp_path / "a.safetensors", Aim(calibration=str(texts))
        monkeypatch.setattr(snapshots, "SECONDS", 0.0)
        with interrupts.work(), pytest.raises(Interrupted):
            calibrate(str(llama / "base"), aim, file, emit=_stop_after_a_block)
        for name in (file, partial_folder(file)):
            told = run("status", name)
            assert (told.code, "/3 blocks are calibrated" in told.out) == (0, True), told
        (found,) = [json.loads(line) for line in run("status", file, "--json").out.splitlines()]
        assert (found["blocks_total"], "output" in found) == (3, False)

    def test_that_is_finished(self, measured: Path, llama: Path, tmp_path: Path, run: Run) -> None:
        told = run("status", measured)
        assert (told.code, told.err) == (0, "")
        assert re.match(r"finished: activations for \d+ weights, measured on \d+ sequences, \d+ tokens", told.out)
        assert json.loads(run("status", measured, "--json").out)["state"] == "finished"
        assert run("status", next((llama / "base").glob("*.safetensors"))).code == 3
        assert run("status", tmp_path / "none.safetensors").code == 2


def _stop_after_a_block(event: Event) -> None:
    if isinstance(event, Advanced) and event.done == 2:
        raise Interrupted
