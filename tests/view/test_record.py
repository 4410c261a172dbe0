"""Events as JSON lines, and the log: what was written is what is read, whatever has become of the file."""

from __future__ import annotations

import json
import typing
from pathlib import Path
from typing import Any

import pytest

from lowmem_aim import events
from lowmem_aim.events import Notice, RunEnded, RunStarted, Sampled, TensorDone, Worked
from lowmem_aim.output.folder import LOG
from lowmem_aim.view.record import KINDS, SCHEMA, Log, from_line, runs_in, to_line

STARTED = RunStarted("merge", "out", "lowmem-aim merge a b", "1.0", 1, "2026-01-01T00:00:00+00:00")
SAMPLE = Sampled(0.5, "x", (2, 3), 1, 2, 3, 0.1, 0.2, 0.3, 4, 5, 6, None, None, 7)
EXAMPLES: list[Any] = [
    STARTED,
    events.Planned("ties", ("merge",), "cpu", 2, 9, None, 3, {"": 1, "0": 2}, {"title": "ties"}),
    events.PhaseStarted("merge", 10, "bytes", 2.5),
    events.Advanced(1.5, "layers.0"),
    events.Snapshot(1.5),
    TensorDone("a.weight", (2, 3), "bfloat16", "merge", 0, "a", 12, (2.0, 1.5)),
    events.PhaseEnded("merge"),
    SAMPLE,
    events.Paused(True),
    events.PointScored("a", {"x": 0.5}, 1, 2, False, 0.25, ("a", "b"), True),
    Notice("careful: \x1b[2J \ud800", "warning"),
    RunEnded("failed", 4, ("full",), "free some space", "Traceback"),
]


def test_every_kind_of_event_comes_back_as_it_was() -> None:
    assert {type(event) for event in EXAMPLES} == set(KINDS.values()), "an example of each"
    for event in EXAMPLES:
        line = to_line(1.25, event)
        assert "\n" not in line
        assert from_line(line) == (1.25, event)


def test_all_but_the_frequent_ones_are_recorded() -> None:
    assert set(typing.get_args(events.Event)) - set(KINDS.values()) == {Worked}


def test_the_first_line_names_the_schema() -> None:
    assert json.loads(to_line(0.0, STARTED))["schema"] == SCHEMA


@pytest.mark.parametrize("line", ["", "{", "[]", "7", '{"t": 1}', '{"t": 1, "event": "from_the_future"}', "\0"])
def test_what_is_no_known_event_is_skipped(line: str) -> None:
    assert from_line(line) is None


@pytest.mark.parametrize(
    "line",
    [
        '{"t": "x", "event": "notice", "text": "a"}',
        '{"t": NaN, "event": "notice", "text": "a"}',
        '{"t": 1, "event": "notice", "text": 5}',
        '{"t": 1, "event": "notice", "text": "a", "level": "\u001b[31m"}',
        '{"t": 1, "event": "phase_started", "phase": "merge", "total": "x", "unit": "bytes"}',
        '{"t": 1, "event": "phase_started", "phase": "\u001b[2J", "total": 1, "unit": "bytes"}',
        '{"t": 1, "event": "phase_started", "phase": "merge", "total": true, "unit": "bytes"}',
        '{"t": 1, "event": "advanced", "done": Infinity}',
        '{"t": 1, "event": "planned", "title": null, "phases": [], "device": "", "threads": 1, "ram_budget": 1}',
        '{"t": 1, "event": "planned", "title": "", "phases": ["merge"], "device": "", "threads": 1, "ram_budget": 1, '
        '"layers": [1]}',
        f'{{"t": {"9" * 400}, "event": "notice", "text": "a"}}',
        "[" * 200_000,
    ],
)
def test_a_line_with_values_that_cannot_be_is_skipped(line: str) -> None:
    assert from_line(line) is None


def test_a_log_that_somebody_was_at_is_told_as_far_as_it_goes(tmp_path: Path) -> None:
    from lowmem_aim.view.progress import seen
    from lowmem_aim.view.summary import facts

    good = [to_line(float(number), event) for number, event in enumerate(EXAMPLES)]
    (tmp_path / LOG).write_text("\n".join(["{", *good, '{"t": 1, "event": "tensor_done", "kept": ["a", "b"]}', ""]))
    [run] = runs_in(tmp_path / LOG)
    assert len(run) == len(EXAMPLES)
    assert facts(seen(run))["outcome"] == "failed"


def test_a_field_that_is_not_known_is_skipped() -> None:
    assert from_line('{"t": 1, "event": "notice", "text": "x", "level": "info", "colour": "red"}') == (1.0, Notice("x"))


class TestLog:
    def test_what_came_before_it_was_opened_is_in_it(self, tmp_path: Path) -> None:
        log = Log()
        log.add(0.0, STARTED)
        log.add(1.0, Notice("early"))
        log.open([tmp_path])
        log.add(2.0, Notice("late"))
        log.close()
        assert runs_in(tmp_path / LOG) == [[(0.0, STARTED), (1.0, Notice("early")), (2.0, Notice("late"))]]

    def test_each_output_has_all_of_it(self, tmp_path: Path) -> None:
        folders = [tmp_path / "a", tmp_path / "b"]
        for folder in folders:
            folder.mkdir()
        log = Log()
        log.open(folders)
        log.add(0.0, STARTED)
        log.close()
        assert all(runs_in(folder / LOG) == [[(0.0, STARTED)]] for folder in folders)

    def test_runs_that_were_killed_within_a_line_do_not_spoil_the_next(self, tmp_path: Path) -> None:
        whole = to_line(0.0, STARTED) + "\n"
        for cut in range(1, 40):
            (tmp_path / LOG).write_text(whole + to_line(1.0, Notice("half"))[:cut])
            log = Log()
            log.open([tmp_path])
            log.add(0.0, STARTED)
            log.add(1.0, Notice("whole"))
            log.close()
            assert runs_in(tmp_path / LOG) == [[(0.0, STARTED)], [(0.0, STARTED), (1.0, Notice("whole"))]]

    def test_a_folder_that_cannot_be_written_is_no_failure(self, tmp_path: Path) -> None:
        log = Log()
        log.open([tmp_path / "missing"])
        log.add(0.0, STARTED)
        log.close()
        assert not (tmp_path / "missing").exists()

    def test_a_full_disk_is_no_failure(self, tmp_path: Path) -> None:
        full = Path("/dev/full")
        if not full.exists():
            pytest.skip("no /dev/full here")
        (tmp_path / LOG).symlink_to(full)
        log = Log()
        log.open([tmp_path])
        log.add(0.0, STARTED)
        log.close()

    def test_a_long_run_has_few_samples(self, tmp_path: Path) -> None:
        log = Log()
        log.open([tmp_path])
        log.add(0.0, STARTED)
        for second in range(86_400):
            log.add(float(second), SAMPLE)
        log.close()
        kept = [t for t, event in runs_in(tmp_path / LOG)[0] if isinstance(event, Sampled)]
        assert kept[:60] == [float(second) for second in range(60)], "each one at first"
        assert len(kept) < 5000
        assert kept[-1] > 86_000, "to the end"

    def test_frequent_events_are_not_in_it(self, tmp_path: Path) -> None:
        log = Log()
        log.open([tmp_path])
        log.add(0.0, STARTED)
        log.add(0.1, Worked("read", 1, 0.1))
        log.close()
        assert len((tmp_path / LOG).read_text().splitlines()) == 1


def test_no_log_is_no_run(tmp_path: Path) -> None:
    assert runs_in(tmp_path / LOG) == []
