"""`pause` and `resume` reach a run from another terminal, within two seconds; none that is over is ever paused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import Place, Run
from merge_cases import recipe
from stopping import stop

from lowmem_aim.cli import pausing
from lowmem_aim.errors import DiskError, UsageError
from lowmem_aim.events import Event, Paused
from lowmem_aim.output import folder, requests
from lowmem_aim.output.folder import PRIVATE
from lowmem_aim.output.workspace import workspace
from lowmem_aim.system import interrupts
from lowmem_aim.system.lock import locked
from lowmem_aim.system.options import Options
from lowmem_aim.view.feed import reported

COMMAND = "lowmem-aim merge 'my recipe.yml' out"


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.01)


@pytest.fixture
def started(tmp_path: Path) -> Iterator[SimpleNamespace]:
    """A run at work in `out`, with two omegas; `told` are its events."""
    told: list[Event] = []
    out = tmp_path / "out"
    privates = [out / name / PRIVATE for name in ("omega-0.2", "omega-0.4")]
    for private in privates:
        private.mkdir(parents=True)
    first, second = (locked(private / "lock") for private in privates)
    with interrupts.work(), first, second, reported("merge", out, told.append) as feed:
        feed.record_in(privates)
        yield SimpleNamespace(out=out, privates=privates, told=told)


class TestARunAtWork:
    def test_it_pauses_and_goes_on_as_the_latest_request_or_key_says(self, started: SimpleNamespace) -> None:
        pausing.ask(started.out, "pause")
        assert interrupts.paused()
        until(lambda: Paused(True) in started.told)
        interrupts.toggle_pause()  # the key
        assert not interrupts.paused()
        pausing.ask(started.privates[1].parent, "pause")  # by one of its outputs
        pausing.ask(started.out, "pause")
        assert interrupts.paused()
        pausing.ask(started.out, "resume")
        assert not interrupts.paused()
        until(lambda: started.told[-1] != Paused(True) and Paused(False) in started.told)
        assert not [name for private in started.privates for name in os.listdir(private) if "request" in name]

    def test_nothing_but_a_word_that_this_tool_wrote_is_heeded(self, started: SimpleNamespace, tmp_path: Path) -> None:
        private = started.privates[0]
        (tmp_path / "elsewhere").write_text("pause")
        for spoilt in ("link", "pipe", "word", "long"):
            request = tmp_path / spoilt  # made elsewhere and moved: the run must not see half of it
            if spoilt == "link":
                request.symlink_to(tmp_path / "elsewhere")
            elif spoilt == "pipe":
                os.mkfifo(request)
            else:
                request.write_text("stop" if spoilt == "word" else "pause" * 1000)
            request.rename(private / requests.REQUEST)
            until(lambda: not os.path.lexists(private / requests.REQUEST))
        assert not interrupts.paused()
        assert (tmp_path / "elsewhere").read_text() == "pause"

    def test_a_file_that_vanishes_while_the_folder_is_looked_at_is_no_error(
        self, started: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        listed = os.scandir

        def with_another(place: Path) -> list[SimpleNamespace]:
            names = [*(entry.name for entry in listed(place)), requests.REQUEST]
            return [SimpleNamespace(path=os.path.join(place, name)) for name in names]

        monkeypatch.setattr(folder, "os", SimpleNamespace(**vars(os) | {"scandir": with_another}))
        pausing.ask(started.out, "pause")
        assert interrupts.paused()

    def test_a_run_that_does_not_answer_is_told_and_the_request_withdrawn(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(pausing, "ANSWER_SECONDS", 0.2)
        with workspace(tmp_path / "out") as space, reported("merge", tmp_path / "out", lambda event: None) as feed:
            feed.record_in([space.private])  # as from Python: nobody holds such a run
            with pytest.raises(UsageError, match="has not answered"):
                pausing.ask(tmp_path / "out", "pause")
            assert not (space.private / requests.REQUEST).exists()


# A run without work, in an output folder of its own.
RUN = """
import sys, time
from pathlib import Path
from lowmem_aim.cli import running, main as ends
from lowmem_aim.events import PhaseStarted, Worked
from lowmem_aim.output.workspace import workspace
from lowmem_aim.system import interrupts
from lowmem_aim.view.feed import reported

def work(emit):
    out = Path(sys.argv[1])
    with reported("merge", out, emit) as feed, workspace(out) as space:
        feed.record_in([space.private])
        feed(PhaseStarted("merge", 90, "bytes"))
        print("ready", flush=True)
        while True:
            feed(Worked("read", 1, 0.1))
            time.sleep(0.01)

interrupts.install()
try:
    running.run(work, "plain")
except interrupts.Interrupted:
    sys.exit(ends._interrupted())
"""


def test_a_paused_process_says_so_and_can_be_ended(tmp_path: Path, run: Run) -> None:
    out = tmp_path / "out"
    words = [sys.executable, "-c", RUN, str(out)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            paused = run("pause", out)
            assert (paused.code, paused.out) == (0, "")
            assert f"`lowmem-aim resume {out}`" in paused.err
            until(lambda: bool(json.loads(run("status", out, "--json").out)["paused"]))
            assert run("status", out).out.startswith(f"paused: the run is process {process.pid} ")
            process.send_signal(signal.SIGINT)
            _, told = process.communicate(timeout=30)
            assert process.returncode == 130
            assert "paused\n" in told
        finally:
            process.kill()


class TestNobodyToAsk:
    def test_of_an_interrupted_run_the_command_is_told(self, llama: Path, tmp_path: Path, run: Run) -> None:
        out = tmp_path / "out"
        stop(recipe(llama, "linear"), out, 3, Options(shard_bytes=40_000, command=COMMAND))
        for word in ("resume", "pause"):
            done = run(word, out)
            assert (done.code, done.out) == (2, "")
            assert "it was interrupted" in done.err
            assert f"hint: to resume it, type: {COMMAND}\n" in done.err
            assert not (out / PRIVATE / requests.REQUEST).exists()

    def test_of_an_interrupted_calibration_too(self, tmp_path: Path, run: Run) -> None:
        private = tmp_path / "a.safetensors.partial" / PRIVATE
        private.mkdir(parents=True)
        with reported("calibrate", tmp_path, lambda event: None, COMMAND) as feed:
            feed.record_in([private])
        for name in ("a.safetensors", "a.safetensors.partial"):
            assert f"to resume it, type: {COMMAND}" in run("resume", tmp_path / name).err

    def test_a_finished_one_and_an_empty_folder(self, place: Place) -> None:
        assert place.merge().code == 0
        for word in ("pause", "resume"):
            done = place.run(word, place.out)
            assert done.code == 2
            assert "is finished" in done.err
            done = place.run(word, place.folder / "base")
            assert done.code == 2
            assert "no run is active in" in done.err
        assert place.run("verify", place.out).code == 0


class TestOldRequests:
    """They are for the run that was there when they were made."""

    def test_a_run_removes_them_when_it_begins_and_when_it_ends(self, tmp_path: Path) -> None:
        private = tmp_path / "out" / PRIVATE
        private.mkdir(parents=True)
        requests.leave(private, "pause")  # as after kill -9
        with workspace(tmp_path / "out"):
            assert not (private / requests.REQUEST).exists()
            requests.leave(private, "pause")
        assert not (private / requests.REQUEST).exists()

    def test_one_beside_a_finished_output_is_no_part_of_it(self, place: Place) -> None:
        assert place.merge().code == 0
        requests.leave(place.out / PRIVATE, "pause")
        assert place.run("verify", place.out).code == 0
        assert "is finished already" in place.merge().err
        assert not (place.out / PRIVATE / requests.REQUEST).exists()

    def test_also_when_it_fails(self, tmp_path: Path) -> None:
        def fails() -> None:
            with workspace(tmp_path / "out") as space:
                requests.leave(space.private, "pause")
                raise DiskError("full")

        with pytest.raises(DiskError):
            fails()
        assert not (tmp_path / "out").exists()
