"""What a run looks like on a terminal and elsewhere; and the terminal afterwards, however the run ended."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import Run
from long_cases import others_long
from run_events import PLANNED, SAMPLE, STARTED

pty = pytest.importorskip("pty")
termios = pytest.importorskip("termios")
ROOT = Path(__file__).parents[2]

# A run without work: its events come until the test has seen what it wants.
RUN = """
import itertools, sys, time
from pathlib import Path
from lowmem_aim.cli import running, main as ends
from lowmem_aim.system import interrupts
from lowmem_aim.errors import DiskError
from lowmem_aim.events import *

def work(emit):
    emit(RunStarted("merge", "out", "lowmem-aim merge recipe.yml out", "1", 1, ""))
    emit(Planned("ties", ("merge",), "cpu", 2, 10**9, tensors=90, layers={"0": 9, "1": 9}, about={}))
    emit(PhaseStarted("merge", 90, "bytes"))
    for done in itertools.count():
        emit(TensorDone(f"layers.{done % 2}.w", (2, 2), "float32", "merge", done % 2, "w", min(done, 90)))
        emit(Worked("read", 1, 0.1))
        emit(Sampled(done, f"layers.{done % 2}.w", (2, 2), done, done, done, done, done, done, 1, 2, 3, None, None, 4))
        if done == 3:
            emit(Notice("something to know"))
            emit(Notice("beware", "warning"))
        told = Path(sys.argv[1])
        if how := told.exists() and told.read_text():  # it is there for a moment before its text is
            if how == "finish":
                emit(PhaseEnded("merge"))
                emit(RunEnded("finished", 0))
                return Path("out")
            raise {"error": DiskError("the disk is full", hint="free some"), "bug": ZeroDivisionError("oh")}[how]
        time.sleep(0.02)

interrupts.install()
try:
    running.run(work, "human")
except interrupts.Interrupted:
    sys.exit(ends._interrupted())
except DiskError as error:
    ends.report(error)
    sys.exit(4)
"""


@dataclass
class Screen:
    """A process with a terminal of its own."""

    process: int
    terminal: int
    file: Path  # what it is to do next
    before: list[object]
    seen: bytes = b""
    code: int | None = None

    def read(self, seconds: float = 0.1) -> None:
        end = time.monotonic() + seconds
        while select.select([self.terminal], [], [], max(end - time.monotonic(), 0))[0]:
            try:
                data = os.read(self.terminal, 1 << 16)
            except OSError:  # its other end is closed
                return
            if not data:
                return
            self.seen += data

    def wait_for(self, text: str, since: int = 0) -> None:
        """`since`: so many bytes are older."""
        deadline = time.monotonic() + 60
        while text not in self.plain(since):
            assert time.monotonic() < deadline, f"`{text}` never came: {self.plain()[-2000:]}"
            self.read()

    def press(self, key: str) -> None:
        os.write(self.terminal, key.encode())

    def end(self) -> int:
        """Its exit code."""
        deadline = time.monotonic() + 60
        while self.code is None:
            assert time.monotonic() < deadline, "it does not end"
            self.read()
            found, status = os.waitpid(self.process, os.WNOHANG)
            if found:
                self.code = os.waitstatus_to_exitcode(status)
        self.read()
        return self.code

    def plain(self, since: int = 0) -> str:
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self.seen[since:].decode("utf-8", "replace")).replace("\r", "")

    @property
    def shows_cursor(self) -> bool:
        codes = re.findall(rb"\x1b\[\?25([hl])", self.seen)
        return not codes or codes[-1] == b"h"

    def settings(self) -> list[object]:
        return termios.tcgetattr(self.terminal)


@contextlib.contextmanager
def on_a_terminal(
    tmp_path: Path, rows: int = 24, columns: int = 80, shell: str = "", **environment: str
) -> Iterator[Screen]:
    """`shell`: commands of bash, in which `RUN` is the run."""
    script = tmp_path / "script.py"
    script.write_text(RUN)
    file = tmp_path / "next"
    child, terminal = pty.fork()
    if not child:
        plain = {
            name: value for name, value in os.environ.items() if name not in ("CI", "NO_COLOR", "COLUMNS", "LINES")
        }
        wanted = plain | {"TERM": "xterm-256color", "PYTHONPATH": str(ROOT)} | environment
        command = [sys.executable, str(script), str(file)]
        if shell:
            command = ["/bin/bash", "-c", shell.replace("RUN", shlex.join(command))]
        with contextlib.suppress(BaseException):
            os.execve(command[0], command, wanted)
        os._exit(99)
    termios.tcsetwinsize(terminal, (rows, columns))
    screen = Screen(child, terminal, file, termios.tcgetattr(terminal))
    try:
        yield screen
    finally:
        if screen.code is None:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        with contextlib.suppress(OSError):
            os.close(terminal)


# --- a terminal is as it was, whatever happens ------------------------------------------------------------------------


@pytest.mark.parametrize(("how", "code", "told"), [("finish", 0, "out"), ("error", 4, "error: the disk is full")])
def test_at_the_end_the_dashboard_is_gone_and_the_terminal_as_before(
    how: str, code: int, told: str, tmp_path: Path
) -> None:
    with on_a_terminal(tmp_path) as screen:
        screen.wait_for("busy")
        assert screen.settings() != screen.before, "keys are read without Enter"
        screen.file.write_text(how)
        assert screen.end() == code
        assert screen.settings() == screen.before
        assert screen.shows_cursor
        last_drawn = screen.seen.rindex(b"\x1b[2K")  # the dashboard's lines are erased one by one
        assert b"busy" not in screen.seen[last_drawn:]
        assert told in screen.plain()[-400:]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_the_terminal_as_it_was(number: signal.Signals, tmp_path: Path) -> None:
    with on_a_terminal(tmp_path) as screen:
        screen.wait_for("busy")
        os.kill(screen.process, number)
        assert screen.end() == 128 + number
        assert screen.settings() == screen.before
        assert screen.shows_cursor
        assert screen.plain().endswith("interrupted: run the same command again to resume\n")


def test_a_killed_run_leaves_a_cursor(tmp_path: Path) -> None:
    with on_a_terminal(tmp_path) as screen:
        screen.wait_for("busy")
        os.kill(screen.process, signal.SIGKILL)
        assert screen.end() == -signal.SIGKILL
        assert screen.shows_cursor


def test_a_terminal_that_is_gone_ends_the_run_at_once(tmp_path: Path) -> None:
    with on_a_terminal(tmp_path) as screen:
        screen.wait_for("busy")
        os.close(screen.terminal)
        deadline = time.monotonic() + 30
        while screen.code is None:
            assert time.monotonic() < deadline, "it goes on for nobody"
            found, status = os.waitpid(screen.process, os.WNOHANG)
            screen.code = os.waitstatus_to_exitcode(status) if found else None
            time.sleep(0.02)
        assert screen.code == 128 + signal.SIGHUP


# --- keys and signals -------------------------------------------------------------------------------------------------


def test_q_stops_the_run_as_ctrl_c_does(tmp_path: Path) -> None:
    with on_a_terminal(tmp_path) as screen:
        screen.wait_for("q stops")
        screen.press("q")
        assert screen.end() == 130
        assert screen.settings() == screen.before


def test_p_pauses_and_goes_on(tmp_path: Path) -> None:
    with on_a_terminal(tmp_path) as screen:
        screen.wait_for("something to know")
        screen.press("p")
        time.sleep(0.5)
        screen.file.write_text("finish")  # while it is paused it does not get there
        time.sleep(0.5)
        assert os.waitpid(screen.process, os.WNOHANG) == (0, 0)
        screen.press("P")
        assert screen.end() == 0


def test_a_paused_run_can_be_stopped(tmp_path: Path) -> None:
    with on_a_terminal(tmp_path) as screen:
        screen.wait_for("something to know")
        screen.press("p")
        time.sleep(0.5)
        screen.press("q")
        assert screen.end() == 130


@pytest.mark.skipif(not Path("/bin/bash").exists(), reason="only a shell stops and continues a job")
def test_ctrl_z_gives_the_terminal_back_until_the_run_goes_on(tmp_path: Path) -> None:
    with on_a_terminal(tmp_path, shell="set -m; RUN; echo stopped $?; read; fg; echo ended $?") as screen:
        screen.wait_for("busy")
        screen.press("\x1a")
        screen.wait_for("stopped 148")
        assert screen.settings() == screen.before
        assert screen.shows_cursor
        drawn = len(screen.seen)
        screen.press("\n")
        screen.wait_for("busy", drawn)
        assert screen.settings() != screen.before
        screen.file.write_text("finish")
        screen.wait_for("ended 0")
        assert screen.settings() == screen.before


@pytest.mark.long  # eight seconds, most of them waiting
@pytest.mark.skipif(not Path("/bin/bash").exists(), reason="only a shell stops and continues a job")
def test_keys_work_again_when_a_run_comes_back_from_the_background(tmp_path: Path) -> None:
    with on_a_terminal(tmp_path, shell="set -m; RUN; echo stopped $?; bg; read; fg; echo ended $?") as screen:
        screen.wait_for("busy")
        screen.press("\x1a")
        screen.wait_for("stopped 148")
        screen.read(2.5)
        in_background = len(screen.seen)
        screen.read(2.5)
        assert "busy" not in screen.plain(in_background), "it draws over the shell's prompt"
        screen.press("\n")
        screen.wait_for("q stops", in_background)
        screen.press("q")
        screen.wait_for("ended 130")
        assert screen.settings() == screen.before


@pytest.mark.skipif(not Path("/bin/bash").exists(), reason="only a shell stops and continues a job")
def test_a_run_ends_in_the_background_as_well(tmp_path: Path) -> None:
    with on_a_terminal(tmp_path, shell="set -m; RUN; echo stopped $?; bg; wait; echo ended $?") as screen:
        screen.wait_for("busy")
        screen.press("\x1a")
        screen.wait_for("stopped 148")
        screen.file.write_text("finish")
        screen.wait_for("ended 0")
        assert screen.settings() == screen.before


def test_sigusr1_tells_how_it_stands(tmp_path: Path) -> None:
    with on_a_terminal(tmp_path) as screen:
        screen.wait_for("busy")
        os.kill(screen.process, signal.SIGUSR1)
        screen.wait_for("merge: ")
        screen.file.write_text("finish")
        assert screen.end() == 0


def test_another_size_of_the_window_is_drawn_anew(tmp_path: Path) -> None:
    with on_a_terminal(tmp_path, columns=120) as screen:
        screen.wait_for("<- the bottleneck")
        before = len(screen.seen)
        termios.tcsetwinsize(screen.terminal, (20, 50))
        deadline = time.monotonic() + 30
        while b"\x1b[J" not in screen.seen[before:]:
            assert time.monotonic() < deadline, "the old picture is not erased"
            screen.read()
        screen.read(2.0)
        after = screen.seen[before:].partition(b"\x1b[J")[2].decode()
        frames = re.sub(r"\x1b\[\d*[AK]", "\n", after)  # to another line, or this one again
        drawn = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", frames).replace("\r", "")
        assert "busy" in drawn
        assert max(map(len, drawn.splitlines())) <= 50
        screen.file.write_text("finish")
        assert screen.end() == 0


# --- where there is no terminal to draw on ----------------------------------------------------------------------------


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}, {"CI": "true"}])
def test_plain_lines_have_no_escape_bytes(environment: dict[str, str], tmp_path: Path) -> None:
    with on_a_terminal(tmp_path, **environment) as screen:
        screen.wait_for("warning: beware")
        os.kill(screen.process, signal.SIGUSR1)
        screen.wait_for("RAM 1 bytes of ")
        screen.file.write_text("finish")
        assert screen.end() == 0
        assert b"\x1b" not in screen.seen
        assert "merge: done in" in screen.plain()


def test_into_a_pipe_go_plain_lines(llama: Path, tmp_path: Path, known: None) -> None:
    models = ["--base", llama / "base", "--expert", llama / "math", "--expert", llama / "code"]
    done = subprocess.run(
        [sys.executable, "-m", "lowmem_aim", "merge", tmp_path / "out", "--method", "linear", *models],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        env=os.environ | {"TERM": "xterm-256color"},
    )
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stderr
    assert done.stdout == f"{tmp_path / 'out'}\n"
    for told in ("merge: done in", "finished in", "hf upload", "lm_eval", "convert_hf_to_gguf"):
        assert told in done.stderr


STREAMS = ["2>&-", "<&- 2>&-", "2>/dev/full", ">&- 2>&-", "<&- >&- 2>/dev/full"]


@pytest.mark.parametrize("streams", others_long(STREAMS, ("2>&-", "<&- >&- 2>/dev/full")))
def test_a_merge_ends_well_whoever_listens(streams: str, llama: Path, tmp_path: Path, known: None) -> None:
    models = ["--base", llama / "base", "--expert", llama / "math", "--expert", llama / "code"]
    command = [sys.executable, "-m", "lowmem_aim", "merge", tmp_path / "out", "--method", "linear", *models]
    line = f"{shlex.join(map(str, command))} {streams}"
    done = subprocess.run(line, shell=True, stdout=subprocess.PIPE, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0
    assert done.stdout in (f"{tmp_path / 'out'}\n", "")
    assert (tmp_path / "out" / "config.json").is_file()


def test_a_full_device_is_an_error_of_the_disk(llama: Path, tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    command = f"{shlex.quote(sys.executable)} -m lowmem_aim methods > /dev/full"
    done = subprocess.run(command, shell=True, stderr=subprocess.PIPE, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 4
    assert "a bug" not in done.stderr


@pytest.mark.parametrize("name", ["-x", "a b", "a'b", "a\x1b[31m\nb", "über"])
def test_the_next_commands_can_be_typed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lowmem_aim.view.summary import next_commands

    monkeypatch.chdir(tmp_path)
    Path(name).mkdir()
    lines = list(next_commands(Path(name)))
    assert all(line.isprintable() for line in lines)
    [upload] = [line for line in lines if line.lstrip().startswith("upload")]
    script = f'hf() {{ shift 2; test -d "$1" && echo there; }}; {upload.split(None, 1)[1]}'
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=30)
    assert done.stdout == "there\n", done.stderr


def test_of_several_outputs_the_commands_name_one_that_is_there(tmp_path: Path) -> None:
    from lowmem_aim.output.folder import PRIVATE
    from lowmem_aim.view.summary import next_commands

    for name in ("omega-0.2", "omega-0.6"):
        (tmp_path / "out" / name / PRIVATE).mkdir(parents=True)
    text = "\n".join(next_commands(tmp_path / "out"))
    assert f"{tmp_path / 'out' / 'omega-0.2'}" in text
    assert "likewise omega-0.6" in text


def test_what_is_private_is_not_uploaded() -> None:
    from huggingface_hub.utils import filter_repo_objects

    files = ["config.json", ".lowmem_aim/run.log", "omega-0.2/.lowmem_aim/run.json"]
    assert list(filter_repo_objects(files, ignore_patterns=["*.lowmem_aim/*"])) == ["config.json"]


def test_lines_come_at_most_every_thirty_seconds() -> None:
    from io import StringIO

    from lowmem_aim.events import PhaseStarted
    from lowmem_aim.view import plain_lines

    now = [0.0]
    told = StringIO()
    view = plain_lines.Lines(lambda: now[0])
    with contextlib.redirect_stderr(told):
        for event in (STARTED, PLANNED, PhaseStarted("merge", 100, "bytes")):
            view(event)
        before = told.getvalue().count("\n")
        for second in range(600):
            now[0] = float(second)
            view(SAMPLE)
    assert told.getvalue().count("\n") - before == 19


# --- JSON lines -------------------------------------------------------------------------------------------------------


def test_json_lines_are_all_that_stdout_gets(llama: Path, tmp_path: Path, run: Run) -> None:
    from lowmem_aim.events import RunEnded, RunStarted
    from lowmem_aim.view.record import from_line

    more = ("--expert", llama / "math", "--expert", llama / "code")
    done = run("merge", tmp_path / "out", "--method", "linear", "--base", llama / "base", *more, "--json")
    assert done.code == 0, done.err
    assert done.err == ""
    events = [from_line(line) for line in done.out.splitlines()]
    assert all(events), "each line is an event"
    first, last = events[0], events[-1]
    assert first is not None
    assert last is not None
    assert isinstance(first[1], RunStarted)
    assert isinstance(last[1], RunEnded)
    assert first[1].out == str(tmp_path / "out")
    times = [event[0] for event in events if event]
    assert times == sorted(times)


def test_json_lines_tell_of_an_error_too(llama: Path, tmp_path: Path, run: Run) -> None:
    done = run(
        "merge", tmp_path / "out", "--method", "ties", "--base", llama / "none", "--expert", llama / "math", "--json"
    )
    assert done.code == 3
    assert done.err.startswith("error: ")
    last = json.loads(done.out.splitlines()[-1])
    assert (last["event"], last["outcome"], last["exit_code"]) == ("run_ended", "failed", 3)
    assert last["problems"]
