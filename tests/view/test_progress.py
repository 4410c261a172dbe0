"""A run as its events tell it: amounts, rates, what is left, the bottleneck, what is kept; pauses do not count."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from run_events import MB, PLANNED, SAMPLE, STARTED, tensor

from lowmem_aim.events import (
    Advanced,
    Event,
    Notice,
    Paused,
    PhaseEnded,
    PhaseStarted,
    RunEnded,
)
from lowmem_aim.units import clock
from lowmem_aim.view.progress import Progress, seen
from lowmem_aim.view.screen import screen
from lowmem_aim.view.summary import facts, summary_lines


def samples(until: int, **a_second: float) -> list[tuple[float, Event]]:
    """One a second in which each figure grows evenly."""
    return [
        (
            float(t),
            replace(SAMPLE, **{name: type(getattr(SAMPLE, name))(value * t) for name, value in a_second.items()}),
        )
        for t in range(until + 1)
    ]


def merging(*events: tuple[float, Event], begun: float = 0.0, total: int = 100) -> Progress:
    start: list[tuple[float, Event]] = [(0.0, STARTED), (0.0, PLANNED), (begun, PhaseStarted("merge", total, "bytes"))]
    return seen([*start, *events])


def test_rates_are_those_of_the_last_seconds() -> None:
    slow = samples(20, read_bytes=10 * MB)
    fast = [
        (t + 20, replace(event, read_bytes=200 * MB + event.read_bytes))  # type: ignore[union-attr]
        for t, event in samples(10, read_bytes=50 * MB)
    ]
    assert merging(*slow).rate("read") == pytest.approx(10 * MB)
    assert merging(*slow, *fast).rate("read") == pytest.approx(50 * MB)
    assert merging(*slow, *fast).history("read", 4) == pytest.approx([50 * MB] * 4)


def test_the_busiest_stage_is_the_bottleneck() -> None:
    run = merging(*samples(10, read_seconds=0.3, compute_seconds=0.9, write_seconds=0.5))
    assert run.bottleneck() == "compute"
    assert run.busy("write") == pytest.approx(0.5)
    assert merging(*samples(10, read_seconds=0.1)).bottleneck() is None, "nothing is at work"


def test_what_is_left_is_told_by_the_rate() -> None:
    run = merging(*((float(t), Advanced(t)) for t in range(1, 26)))
    assert run.left() == pytest.approx(75)


def test_what_is_left_is_told_by_the_last_part_where_the_pace_has_changed() -> None:
    slow = [(float(t), Advanced(t / 100)) for t in range(1, 101)]
    fast = [(100.0 + t, Advanced(1 + t)) for t in range(1, 61)]
    assert merging(*slow, *fast).left() == pytest.approx(39, rel=0.01)


def test_nothing_is_said_to_be_left_before_anything_is_done() -> None:
    assert merging().left() is None
    assert merging((5.0, SAMPLE)).left() is None
    assert Progress().left() is None


def test_a_pause_counts_neither_in_what_is_left_nor_in_the_bottleneck() -> None:
    before = [(float(t), Advanced(t)) for t in range(1, 11)]
    paused = merging(*before, (10.0, Paused(True)), (1000.0, replace(SAMPLE, read_seconds=900.0)))
    assert paused.left() == pytest.approx(90)
    assert paused.bottleneck() is None
    assert paused.working == pytest.approx(10)
    going_on = merging(*before, (10.0, Paused(True)), (1010.0, Paused(False)), (1011.0, Advanced(11)))
    assert going_on.left() == pytest.approx(89)
    assert going_on.idle == pytest.approx(1000)


def test_what_earlier_runs_have_done_is_no_progress_of_this_one() -> None:
    earlier = [(0.0, tensor(str(n), 0, 25.0 * n, earlier=True)) for n in (1, 2)]
    run = merging(*earlier, (10.0, tensor("3", 1, 75.0)))
    assert run.left() == pytest.approx(10), "25 in 10 seconds, 25 to go"
    assert (run.tensors, run.earlier) == (3, 2)


def test_amounts_never_go_back_or_beyond_the_total() -> None:
    run = merging((1.0, Advanced(50)), (2.0, replace(SAMPLE, item="x", done=40.0)), (3.0, Advanced(170)))
    assert run.current is not None
    assert run.current.done == 100


def test_a_sample_of_the_last_phase_is_none_of_the_next() -> None:
    run = seen([(0.0, PhaseStarted("calibrate", 9, "blocks")), (1.0, replace(SAMPLE, item="layers.3", done=3.5))])
    assert run.current is not None
    assert (run.current.done, run.item) == (3.5, "layers.3")
    run.see(2.0, PhaseEnded("calibrate"))
    assert run.current is None
    run.see(2.0, PhaseStarted("merge", 100, "bytes"))
    assert run.item == ""


def test_rates_and_the_bottleneck_are_those_of_the_phase_under_way() -> None:
    work = [replace(SAMPLE, read_bytes=100 * t, read_seconds=0.9 * t) for t in range(4)]
    run = seen([(0.0, PhaseStarted("merge", 100, "bytes")), *((float(t), sample) for t, sample in enumerate(work[:3]))])
    assert (run.rate("read"), run.bottleneck()) == (100, "read")
    run.see(2.1, PhaseEnded("merge"))
    run.see(2.1, PhaseStarted("finish", 1, "files"))
    run.see(3.0, work[3])
    assert (run.is_measured, run.rate("read"), run.bottleneck()) == (False, 0, None)
    assert "busy" not in screen(run, 80, 24).plain
    run.see(4.0, replace(work[3], read_bytes=310))
    assert (run.is_measured, run.rate("read"), run.bottleneck()) == (True, 10, None)


def test_a_phase_takes_as_long_in_the_summary_as_everywhere_else() -> None:
    planned = replace(PLANNED, phases=("merge", "finish"))
    for begun, merged, end in ((0.7, 12.5 + 0.7, 13.9), (0.2, 1.8, 3.4), (0.4, 0.8, 1.2), (0.4, 1.9, 3.4)):
        run = seen([(0.1, STARTED), (0.1, planned), (begun, PhaseStarted("merge", 1, "bytes"))])
        run.see(merged, PhaseEnded("merge"))
        run.see(merged, PhaseStarted("finish", 1, "files"))
        run.see(end, PhaseEnded("finish"))
        run.see(end, RunEnded("finished", 0))
        told = next(summary_lines(run))
        for name in ("merge", "finish"):
            assert f"{name} {clock(run.phases[name].seconds(run.now))}" in told, told


def test_what_is_kept_is_weighted_by_the_delta() -> None:
    run = merging(
        (1.0, tensor("a", 0, 10, (10.0, 9.0))), (2.0, tensor("b", 1, 20, (90.0, 45.0))), (3.0, tensor("n", None, 30))
    )
    assert run.kept_share() == pytest.approx(0.54)
    assert run.kept_by(0) == pytest.approx({"0": 0.9, "1": 0.5})
    assert run.kept_by(1) == pytest.approx({"q_proj": 0.54})


def test_of_several_outputs_each_has_its_own_share() -> None:
    run = merging(
        (1.0, tensor("a", 0, 10, (10.0, 9.0), output="omega-0.8")),
        (1.0, tensor("a", 0, 10, (10.0, 5.0), output="omega-0.2")),
    )
    assert {name: kept.share for name, kept in run.kept_by_output.items()} == {"omega-0.8": 0.9, "omega-0.2": 0.5}
    assert run.kept_share() == pytest.approx(0.9), "the first output's"


def test_without_a_delta_there_is_no_share() -> None:
    assert merging((1.0, tensor("a", 0, 10, (0.0, 0.0)))).kept_share() is None


def test_warnings_and_the_end_are_kept() -> None:
    run = merging((1.0, Notice("a", "warning")), (2.0, Notice("b")), (3.0, RunEnded("failed", 4, ("full",))))
    assert run.warnings == ["a"]
    assert run.ended is not None
    assert run.ended.exit_code == 4


def test_a_run_of_days_keeps_no_more_samples_than_are_drawn() -> None:
    run = merging(*samples(1000))
    assert len(run.samples) == run.samples.maxlen


def test_the_parts_of_a_run_add_up_to_its_time_start_and_plan_included() -> None:
    """The parts add up, too, when a phase runs once for each of several outputs."""
    planned = replace(PLANNED, phases=("calibrate", "compare", "merge", "finish"))
    events: list[tuple[float, Event]] = [(2.4, STARTED), (3.0, planned)]
    for begin, phase in ((6.3, "compare"), (9.0, "compare"), (12.4, "merge"), (30.1, "finish")):
        events += [(begin, PhaseStarted(phase, 3, "blocks")), (begin + 2.45, PhaseEnded(phase))]  # type: ignore[arg-type]
    run = seen([*events, (33.3, RunEnded("finished", 0))])
    assert run.spent() == pytest.approx(
        {"start": 2.4, "plan": 3.9, "calibrate": 0, "compare": 4.9, "merge": 2.45, "finish": 2.45, "other": 17.2}
    )
    assert run.is_reused("calibrate")
    first = next(summary_lines(run))
    assert first == (
        "finished in 0:33 (start 0:03, plan 0:04, calibrate reused, compare 0:05, merge 0:02, finish 0:02, other 0:17)"
    )
    parts = [int(minutes) * 60 + int(seconds) for minutes, seconds in re.findall(r" (\d+):(\d\d)", first)]
    assert parts[0] == sum(parts[1:]) == 33


def test_layers_are_in_their_order_in_run_json() -> None:
    run = seen([(0.0, STARTED), (0.0, replace(PLANNED, layers=dict.fromkeys(map(str, range(12)), 1)))])
    run.see(1.0, PhaseStarted("merge", 12, "bytes"))
    for name in sorted(map(str, range(12))):  # as a file has them
        run.see(2.0, tensor(name, int(name), 1.0, (2.0, 1.0)))
    assert list(facts(run)["kept"]["layers"]) == [str(number) for number in range(12)]


def test_the_summary_has_a_scale_on_which_layers_differ() -> None:
    run = seen([(0.0, STARTED), (0.0, PLANNED), (1.0, PhaseStarted("merge", 12, "bytes"))])
    for layer, left in enumerate((96.6, 91.2, 94.0)):
        run.see(2.0, tensor(f"{layer}", layer, 1.0, (100.0, left)))
    [line] = [line for line in summary_lines(run) if line.startswith("  by layer")]
    assert line == "  by layer  █▁▅ from ▁ 91% to █ 97%; least in 1 (91.2%), most in 0 (96.6%)"
    assert any(line.startswith("  by layer  ▄▅") for line in summary_lines(run, 14)), "means, where not all fit a line"
