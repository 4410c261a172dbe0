"""A sweep on the screen and in plain lines: the points done, the table so far, the front."""

from __future__ import annotations

import pytest
from run_events import PLANNED, SAMPLE, STARTED, tensor

from lowmem_aim.events import Event, PhaseStarted, PointScored
from lowmem_aim.view.plain_lines import Lines
from lowmem_aim.view.progress import seen
from lowmem_aim.view.screen import screen

EXPERT = PointScored("math", {"gsm8k": 0.6, "ifeval": 0.2}, 0, 3, expert=True)
PLAIN = PointScored("ties", {"gsm8k": 0.5, "ifeval": 0.3}, 1, 3, gain=0.21, front=("math", "ties"))
RELAXED = PointScored(
    "ties-omega-0.4", {"gsm8k": 0.55, "ifeval": 0.35}, 2, 3, gain=0.25, front=("math", "ties-omega-0.4")
)


def drawn(*events: Event, width: int = 100, height: int = 40) -> list[str]:
    run = seen([(0.0, STARTED), (1.0, PLANNED), *((2.0 + n, event) for n, event in enumerate(events))])
    return [line.rstrip() for line in screen(run, width, height).plain.splitlines()]


def test_the_screen_has_the_best_points_first_and_marks_the_front() -> None:
    lines = drawn(EXPERT, PLAIN, RELAXED)
    [at] = [number for number, line in enumerate(lines) if line.startswith("points")]
    assert lines[at].split() == ["points", "2", "of", "3", "scored;", "2", "on", "the", "front"]
    assert lines[at + 1].split() == ["gsm8k", "ifeval", "HV", "gain"]
    assert lines[at + 2].split() == ["ties-omega-0.4", "0.55", "0.35", "0.2500", "front"]
    assert lines[at + 3].split() == ["ties", "0.5", "0.3", "0.2100"]


@pytest.mark.parametrize(("width", "height"), [(40, 12), (60, 20), (80, 24), (200, 50)])
def test_it_fits_every_window(width: int, height: int) -> None:
    many = [PointScored(f"ties-{n}", dict.fromkeys("abcdefgh", 0.1), n, 99, gain=n / 100) for n in range(30)]
    lines = drawn(PhaseStarted("merge", 10, "bytes"), *many, SAMPLE, width=width, height=height)
    assert len(lines) <= height
    assert max(map(len, lines)) <= width
    assert any("29 of 99" in line for line in drawn(*many, width=width, height=height))


def test_what_was_counted_of_one_merge_is_not_of_the_next() -> None:
    assert seen([(0.0, PLANNED), (1.0, tensor("a", 0, 1.0)), (2.0, PLANNED)]).tensors == 0


def test_each_point_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    lines = Lines(lambda: 1.0)
    for event in (STARTED, PLANNED, EXPERT, PLAIN, PLANNED, RELAXED):
        lines(event)
    told = capsys.readouterr().err.splitlines()
    assert "expert math: gsm8k 0.6, ifeval 0.2" in told
    assert "ties: gsm8k 0.5, ifeval 0.3; HV gain 0.2100, on the front; 1 of 3 points" in told
    assert sum("threads" in line for line in told) == 1  # what is the same for all is told once
