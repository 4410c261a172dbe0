"""Pictures of a recorded run, kept as text: a merge of 1.1 B models with AIM, at each phase, in windows of four sizes.

`LOWMEM_AIM_SNAPSHOTS=write pytest tests/view/test_screen.py` draws them anew; look at what has changed.
"""

from __future__ import annotations

import io
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import Run
from rich.console import Console
from run_events import PLANNED, SAMPLE, STARTED, tensor

from lowmem_aim.events import Advanced, Event, Notice, Paused, PhaseEnded, PhaseStarted, RunEnded
from lowmem_aim.output.folder import LOG, PRIVATE
from lowmem_aim.view.plain_lines import Lines, first_lines, line_of
from lowmem_aim.view.progress import Progress, seen
from lowmem_aim.view.record import Timed, runs_in
from lowmem_aim.view.screen import screen
from lowmem_aim.view.summary import summary_lines

DATA = Path(__file__).parents[1] / "data"
SCREENS = DATA / "screens"
WINDOWS = [(60, 20), (80, 24), (120, 40), (200, 50)]
MOMENTS = {"plan": 3.0, "calibrate": 40.0, "merge-begins": 77.5, "merge": 97.0, "end": 1000.0}


@pytest.fixture(scope="module")
def recorded() -> list[Timed]:
    [run] = runs_in(DATA / LOG)
    return run


def at(run: list[Timed], second: float) -> Progress:
    progress = seen((t, event) for t, event in run if t <= second)
    progress.now = max(progress.now, min(second, run[-1][0]))
    return progress


def drawn(progress: Progress, width: int, height: int) -> str:
    return "\n".join(line.rstrip() for line in screen(progress, width, height, keys=True).plain.splitlines()) + "\n"


def kept(name: str, text: str) -> str:
    """The snapshot of that name; the text itself where snapshots are to be drawn anew."""
    file = SCREENS / name
    if os.environ.get("LOWMEM_AIM_SNAPSHOTS") == "write":
        SCREENS.mkdir(exist_ok=True)
        file.write_text(text)
    return file.read_text()


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize(("width", "height"), WINDOWS)
def test_the_screen_is_as_it_was_looked_at(moment: str, width: int, height: int, recorded: list[Timed]) -> None:
    text = drawn(at(recorded, MOMENTS[moment]), width, height)
    assert text == kept(f"{width}x{height}-{moment}.txt", text)


def test_there_is_no_snapshot_too_many() -> None:
    expected = {f"{width}x{height}-{moment}.txt" for width, height in WINDOWS for moment in MOMENTS} | {"lines.txt"}
    assert {file.name for file in SCREENS.iterdir()} == expected


def test_plain_lines_of_the_whole_run(recorded: list[Timed], capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    lines = Lines(lambda: now)
    for now, event in recorded:  # noqa: B007  # the lines' clock
        lines(event)
    text = capsys.readouterr().err
    assert text == kept("lines.txt", text)
    assert text.isprintable() or "\x1b" not in text


@pytest.mark.parametrize(("width", "height"), [*WINDOWS, (20, 1), (30, 3), (40, 5), (500, 200)])
def test_it_fits_any_window_at_any_time(width: int, height: int, recorded: list[Timed]) -> None:
    progress = Progress()
    for number, (t, event) in enumerate(recorded):
        progress.see(t, event)
        if number % 10:
            continue
        picture = screen(progress, width, height, keys=True)
        console = Console(file=io.StringIO(), width=width, color_system=None)
        rows = console.render_lines(picture, console.options.update(height=None), pad=False)
        assert 1 <= len(rows) <= height
        assert all(sum(segment.cell_length for segment in row) <= width for row in rows)


@pytest.mark.parametrize("height", range(1, 14))
def test_what_matters_most_stays_in_a_short_window(height: int, recorded: list[Timed]) -> None:
    text = drawn(at(recorded, MOMENTS["merge"]), 80, height)
    assert re.search(r"merge +█.* left$", text, re.MULTILINE), "how far it is"
    if height >= 2:
        assert "lowmem-aim" in text
    if height >= 5:
        assert "now " in text


def test_a_pause_shows_while_everything_is_checked(recorded: list[Timed]) -> None:
    progress = at(recorded, MOMENTS["plan"])
    assert "then paused" not in drawn(progress, 60, 20)
    progress.see(3.1, Paused(True))
    assert "checking everything before work, then paused" in drawn(progress, 60, 20)


def test_colour_adds_nothing_to_the_text(recorded: list[Timed]) -> None:
    progress = at(recorded, MOMENTS["merge"])
    told = {}
    for system in ("truecolor", None):
        console = Console(file=io.StringIO(), width=120, color_system=system, force_terminal=bool(system))
        console.print(screen(progress, 120, 40, keys=True))
        told[system] = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b[" in told["truecolor"]
    assert re.sub(r"\x1b\[[0-9;]*m", "", told["truecolor"]) == told[None]


@pytest.mark.parametrize(
    ("title", "named"),
    [(PLANNED.title, "AIM"), ("ties + AIM control (uniform) + ACM", "AIM control + ACM"), ("linear", "relaxing")],
)
def test_layers_are_coloured_by_what_is_kept(title: str, named: str) -> None:
    run = seen([(0.0, STARTED), (0.0, replace(PLANNED, title=title)), (0.0, PhaseStarted("merge", 100, "bytes"))])
    for layer, after in ((0, 1.0), (1, 9.0)):
        for number in range(PLANNED.layers[str(layer)]):
            run.see(1.0, tensor(f"{layer}.{number}", layer, 10.0, (10.0, after)))
    picture = screen(run, 80, 24)
    console = Console(file=io.StringIO(), width=80, color_system="truecolor", force_terminal=True)
    [strip] = [line for line in picture.split("\n") if line.plain.startswith("layers")]
    colours = {segment.style.color.name for segment in strip.render(console) if segment.style and segment.style.color}
    assert len(colours & {name for name in colours if name.startswith("#")}) == 2
    assert strip.plain.endswith(f"  {named} kept 37%")


def started(*events: Event) -> Progress:
    return seen([(0.0, STARTED), (0.0, PLANNED), *((1.0, event) for event in events)])


def test_warnings_stay_on_the_screen() -> None:
    warnings = [Notice(f"beware of {number}", "warning") for number in range(5)]
    text = drawn(started(*warnings, Notice("by the way")), 80, 24)
    assert [f"beware of {number}" in text for number in range(5)] == [False, False, True, True, True]
    assert "by the way" not in text, "it stands above the screen"


def test_the_screen_names_the_command_that_resumes() -> None:
    assert "after a stop: lowmem-aim merge recipe.yml out" in drawn(started(), 80, 24)


def test_a_paused_run_says_so() -> None:
    run = started(PhaseStarted("merge", 100, "bytes"), Paused(True))
    text = drawn(run, 80, 24)
    assert "paused" in text
    assert "p resumes" in text


def test_a_failed_run_says_why() -> None:
    assert "the disk is full" in drawn(started(RunEnded("failed", 4, ("the disk is full",))), 80, 24)


def test_vram_has_a_bar_of_its_own() -> None:
    planned = replace(PLANNED, device="cuda", vram_budget=24 * 10**9)
    sample = replace(SAMPLE, vram=6 * 10**9, vram_peak=12 * 10**9)
    text = drawn(seen([(0.0, STARTED), (0.0, planned), (1.0, sample)]), 80, 24)
    [line] = [line for line in text.splitlines() if line.startswith("VRAM")]
    assert "6.0 GB, peak 12.0 GB of 24.0 GB" in line
    bar = line[10 : line.index("  6.0")]
    assert bar.count("█") == pytest.approx(len(bar) / 4, abs=1)
    assert bar.index("│") == pytest.approx(len(bar) / 2, abs=1)


@pytest.mark.parametrize("layers", [1, 7, 60, 126, 1000])
def test_any_number_of_layers_has_a_strip(layers: int) -> None:
    planned = replace(PLANNED, title="ties", layers={str(number): 1 for number in range(layers)})
    half = [(1.0, tensor(f"{number}", number, 1.0)) for number in range(layers // 2)]
    run = seen([(0.0, STARTED), (0.0, planned), (0.0, PhaseStarted("merge", 10**6, "bytes")), *half])
    [strip] = [line for line in drawn(run, 80, 24).splitlines() if line.startswith("layers")]
    assert len(strip) <= 80
    cells, _, figures = strip[10:].partition("  ")
    assert figures == f"{layers // 2} of {layers}"
    assert cells.count("█") == pytest.approx(len(cells) * (layers // 2) / layers, abs=3)


# --- replay -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out" / PRIVATE).mkdir(parents=True)
    (tmp_path / "out" / PRIVATE / LOG).write_bytes((DATA / LOG).read_bytes())
    return tmp_path / "out"


def test_replay_prints_the_screen_of_a_moment(out: Path, run: Run) -> None:
    done = run("replay", out, "--at", MOMENTS["merge"], "--size", "80x24")
    assert done.code == 0, done.err
    printed = "\n".join(line.rstrip() for line in done.out.splitlines()) + "\n"
    assert printed == (SCREENS / "80x24-merge.txt").read_text()


def test_replay_into_a_pipe_gives_the_plain_lines(out: Path, run: Run) -> None:
    done = run("replay", out)
    assert done.code == 0
    lines = (SCREENS / "lines.txt").read_text()
    assert done.err.startswith(lines)
    assert done.err[len(lines) :].startswith(
        "finished in 1:55 (plan 0:09, calibrate 1:05, merge 0:39, finish 0:00, other"
    )


def test_replay_draws_an_svg(out: Path, run: Run, tmp_path: Path) -> None:
    done = run("replay", out, "--at", MOMENTS["merge"], "--svg", tmp_path / "run.svg")
    assert done.code == 0
    svg = (tmp_path / "run.svg").read_text()
    assert svg.startswith("<svg")
    assert "ties&#160;+&#160;AIM" in svg
    assert set(re.findall(r"https?://[^/\"\s]+", svg)) == {"http://www.w3.org", "https://www.textualize.io"}, "no fonts"


def test_replay_overwrites_nothing(out: Path, run: Run, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    done = run("replay", out, "--svg", tmp_path / "mine")
    assert done.code == 2
    assert "exists already" in done.err
    assert (tmp_path / "mine").read_text() == "mine"


def test_nothing_in_a_log_reaches_a_terminal_as_a_command(recorded: list[Timed]) -> None:
    evil = "\x1b[31mEVIL\n"
    planned = replace(PLANNED, title=evil, device=evil, about={"title": evil, "x": 1})
    start = replace(STARTED, out=evil, command=evil)
    run = seen(
        [
            (0.0, start),
            (0.0, planned),
            (1.0, PhaseStarted("merge", 100, "bytes")),
            (2.0, replace(SAMPLE, item=evil, done=3.0)),
            (2.0, tensor(evil, 0, 4.0, (2.0, 1.0), kind=evil)),
            (2.0, Notice(evil, "warning")),
        ]
    )
    told = [*screen(run, 120, 40).plain.split("\n"), *first_lines(planned), line_of(run), *summary_lines(run)]
    run.see(3.0, RunEnded("failed", 4, (evil,)))
    told += screen(run, 120, 40).plain.split("\n")
    assert all(line.isprintable() for line in told)
    assert any("EVIL" in line for line in told)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--run", "2"), "there is no run 2"),
        (("--run", "0"), "there is no run 0"),
        (("--size", "80"), "not a screen size"),
        (("--size", "9999x9999"), "not a screen size"),
        (("--speed", "0"), "--speed"),
        (("--speed", "nan"), "--speed"),
        (("--at", "inf"), "--at"),
    ],
)
def test_replay_refuses_what_it_cannot_do(more: tuple[str, ...], message: str, out: Path, run: Run) -> None:
    done = run("replay", out, *more)
    assert done.code == 2
    assert message in done.err


def test_replay_of_no_run_is_an_error(tmp_path: Path, run: Run) -> None:
    done = run("replay", tmp_path)
    assert done.code == 2
    assert "holds no recorded run" in done.err


def test_a_part_of_a_block_is_told_as_on_the_screen() -> None:
    run = started(PhaseStarted("calibrate", 30, "blocks"), replace(SAMPLE, item="layers.2", done=2.7))
    assert "9%  2.7 of 30 blocks" in drawn(run, 80, 24)
    assert line_of(run).startswith("calibrate: 9%, 2.7 of 30 blocks")


def test_a_calibration_by_itself_has_a_row_of_layers_to_its_end() -> None:
    run = started(replace(PLANNED, title="activations", phases=("calibrate",), layers={"0": 1, "1": 1, "2": 1}))
    assert "layers    ·········  0 of 3" in drawn(run, 80, 24)
    run.see(1.0, PhaseStarted("calibrate", 3, "blocks"))
    run.see(2.0, Advanced(2, "model.layers.1"))
    assert "layers    ██████···  2 of 3" in drawn(run, 80, 24)
    run.see(3.0, PhaseEnded("calibrate"))
    assert "layers    █████████  3 of 3" in drawn(run, 80, 24)
