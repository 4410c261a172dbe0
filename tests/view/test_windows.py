"""What is told fits the window: commands and words stay whole, and the cells of layers stand below each other."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from run_events import PLANNED, SAMPLE, STARTED, tensor

from lowmem_aim.events import Event, Paused, PhaseEnded, PhaseStarted
from lowmem_aim.output.folder import LOG, PRIVATE
from lowmem_aim.view.progress import Progress, seen
from lowmem_aim.view.screen import screen
from lowmem_aim.view.wrapping import wrapped, wrapped_command

ROOT = Path(__file__).parents[2]
pty = pytest.importorskip("pty")
WIDTHS = [40, 60, 80, 100, 120, 200]
COMMAND = "lowmem-aim merge 'my recipe.yml' out/merged --ram 1GB --expert '/models/it'\"'\"'s/a model' --threads 4"
LAYERS = 30


def merging(*events: Event, command: str = COMMAND) -> Progress:
    planned = replace(PLANNED, layers={str(number): 1 for number in range(LAYERS)})
    begun = PhaseStarted("merge", 10**6, "bytes")
    return seen([(0.0, replace(STARTED, command=command)), (1.0, planned), (2.0, begun), *((3.0, e) for e in events)])


def lines_of(run: Progress, width: int, height: int = 50) -> list[str]:
    return screen(run, width, height, keys=True).plain.split("\n")


@pytest.mark.parametrize("width", WIDTHS)
def test_the_command_that_resumes_is_never_cut(width: int) -> None:
    lines = lines_of(merging(SAMPLE), width)
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    command = text.partition("after a stop: ")[2].replace("\\\n", "")
    assert shlex.split(command) == shlex.split(COMMAND), "as a shell reads it, with its backslashes"


def test_in_a_window_too_short_for_the_command_it_is_left_out_whole() -> None:
    for height in range(1, 20):
        text = "\n".join(lines_of(merging(SAMPLE), 60, height))
        assert ("after a stop" in text) == ("--threads 4" in text)


@pytest.mark.parametrize("width", WIDTHS)
def test_a_paused_screen_says_what_the_keys_do_and_nothing_twice(width: int) -> None:
    text = "\n".join(lines_of(merging(SAMPLE, Paused(True), command="lowmem-aim merge r.yml out"), width))
    assert text.count("q stops, p resumes") == 1
    assert "pauses" not in text
    for told in ("paused", "resume", "goes on", "lowmem-aim merge"):
        assert text.count(told) <= 1, told


@pytest.mark.parametrize("width", [60, 80, 120, 200])
@pytest.mark.parametrize("layers", [2, 22, 30, 48, 80])
def test_cells_of_a_layer_stand_below_each_other(layers: int, width: int) -> None:
    """Of one layer alone something is kept, so that its column shows."""
    planned = replace(PLANNED, layers={str(number): 1 for number in range(layers)})
    one = layers // 2
    done = [tensor(f"{one}.{kind}", one, 1.0, (10.0, 9.0), kind=kind) for kind in ("mlp.up_proj", "q_proj")]
    run = seen([(0.0, STARTED), (0.0, planned), (0.0, PhaseStarted("merge", 9, "bytes")), *((1.0, e) for e in done)])
    lines = lines_of(run, width)
    [strip] = [line for line in lines if line.startswith("layers")]
    rows = [line for line in lines if line.startswith(("mlp.up_proj", "q_proj"))]
    cells = [re.search(r"[▁-█]+", line[28:]) for line in [strip, *rows]]
    places = {match.span() for match in cells if match}
    assert len(places) <= 1, lines
    if width - layers > 50:
        assert len(rows) == 2
        assert all(cells)


def test_the_rows_of_layers_are_in_their_order_however_they_are_merged() -> None:
    names = sorted(map(str, range(12)))  # as a file has them: 0, 1, 10, 11, 2
    planned = replace(PLANNED, title="ties", layers=dict.fromkeys(names, 1))
    begun = [(0.0, STARTED), (0.0, planned), (0.0, PhaseStarted("merge", 12, "bytes"))]
    run = seen([*begun, *((1.0, tensor(name, int(name), 1.0)) for name in names[:4])])
    [strip] = [line for line in lines_of(run, 60) if line.startswith("layers")]
    assert strip.split() == ["layers", "██████························██████"[:36], "4", "of", "12"]


def test_a_phase_that_was_not_needed_is_told_as_reused() -> None:
    planned = replace(PLANNED, phases=("calibrate", "compare", "merge", "finish"))
    run = seen([(0.0, STARTED), (1.0, planned)])
    assert "· calibrate" in "\n".join(lines_of(run, 80))
    run.see(2.0, PhaseStarted("compare", 3, "blocks"))
    assert "✓ calibrate reused  ▶ compare  · merge  · finish" in "\n".join(lines_of(run, 80))
    run.see(3.0, PhaseEnded("compare"))
    run.see(3.0, PhaseStarted("merge", 3, "bytes"))
    assert "✓ calibrate reused  ✓ compare 0:01  ▶ merge" in "\n".join(lines_of(run, 80))


# --- what is printed --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", WIDTHS)
def test_lines_break_between_words(width: int) -> None:
    line = "tensors   " + " ".join(f"word{number}," for number in range(40))
    broken = list(wrapped([line], width, 10))
    assert max(map(len, broken)) <= width
    assert " ".join(broken).split() == line.split()
    assert all(part.startswith(" " * 10) for part in broken[1:])
    assert list(wrapped([line], None)) == [line], "into a pipe it goes whole"


@pytest.mark.parametrize("command", [COMMAND, "lowmem-aim merge it's", "x" * 300, "a 'b c' \"d e\" f\\ g"])
def test_a_broken_command_is_still_that_command(command: str) -> None:
    for width in (20, *WIDTHS):
        lines = wrapped_command(command, width, "resume  ")
        assert max(map(len, lines)) <= width
        text = "\n".join(lines).removeprefix("resume  ")
        assert re.sub(r"[\s\\]", "", text) == re.sub(r"[\s\\]", "", command), "nothing is lost"


def on_a_terminal(columns: int, *arguments: str) -> list[str]:
    """The lines of a command on a terminal of that width."""
    ours, theirs = pty.openpty()
    try:
        import termios

        termios.tcsetwinsize(theirs, (24, columns))
        command = [sys.executable, "-m", "lowmem_aim", *arguments]
        plain = os.environ | {"TERM": "dumb"}
        with subprocess.Popen(command, stdout=theirs, stderr=theirs, cwd=ROOT, env=plain) as process:
            os.close(theirs)
            theirs = -1
            told = b""
            while True:
                try:
                    data = os.read(ours, 1 << 16)
                except OSError:  # its other end is closed
                    break
                told += data
            process.wait(60)
    finally:
        for descriptor in (ours, theirs):
            if descriptor >= 0:
                os.close(descriptor)
    return told.decode().replace("\r", "").splitlines()


@pytest.mark.parametrize("arguments", [("replay", "recorded"), ("status", "no/such/folder")])
def test_commands_break_their_lines_for_a_narrow_terminal(arguments: tuple[str, str], tmp_path: Path) -> None:
    """Tables and errors alike; what a pipe gets is not broken."""
    (tmp_path / "recorded" / PRIVATE).mkdir(parents=True)
    (tmp_path / "recorded" / PRIVATE / LOG).write_bytes((ROOT / "tests" / "data" / LOG).read_bytes())
    command = (arguments[0], str(tmp_path / arguments[1]))
    narrow = on_a_terminal(60, *command)
    done = subprocess.run([sys.executable, "-m", "lowmem_aim", *command], capture_output=True, text=True, cwd=ROOT)
    whole = (done.stdout + done.stderr).splitlines()
    longest = max(len(word) for line in whole for word in line.split())
    assert max(map(len, narrow)) <= max(60, longest + 7) < max(map(len, whole))
    assert " ".join(narrow).split() == " ".join(whole).split()
