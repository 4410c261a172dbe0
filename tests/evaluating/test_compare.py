"""`lowmem-aim compare`: table, JSON and report of the same numbers; nothing is written unless all is right."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from conftest import Run
from PIL import Image
from scoring import CODE, DARE, DARE_AIM, MATH, TASKS, by_hand, fractions, merge, model, paper, written

from lowmem_aim.errors import UsageError
from lowmem_aim.evaluating.comparison import compared, read_all
from lowmem_aim.evaluating.families import curves_of
from lowmem_aim.evaluating.fronts import check_pairs, fronts_of
from lowmem_aim.evaluating.hypervolume import hv_gain
from lowmem_aim.evaluating.plots import omega_figure, pareto_figure
from lowmem_aim.evaluating.report import write_report
from lowmem_aim.evaluating.scores import Score
from lowmem_aim.jobs import compare
from lowmem_aim.output import drawing


def study(folder: Path) -> tuple[list[Path], list[Path]]:
    """A small study with everything in it: (merges, AIM at two omegas and a control each; the experts)."""

    def scores(a: float, perplexity: float) -> dict[str, float | Score]:
        return {"a": a, "b": 1 - a, "w": Score.of_metric("word_perplexity", perplexity, None, 10)}

    points = [(0.2, None), (0.2, "uniform"), (0.6, None), (0.6, "uniform")]
    merges = [
        merge("plain", scores(0.5, 9.0), stderr=0.02),
        *(merge(f"{o}{c or ''}", scores(0.4 + o / 2, 8 + o), o, stderr=0.02, control=c) for o, c in points),
    ]
    experts = [model(name, scores(a, 10.0), stderr=0.02) for name, a in (("code", 0.2), ("$x_1$ <math>--", 0.45))]
    return written(folder, *merges), written(folder, *experts)


class TestNumbers:
    def test_json_has_the_papers_rows_with_full_digits(self, tmp_path: Path, run: Run) -> None:
        files, experts = paper(tmp_path)
        done = run("compare", *files, "--against", *experts, "--json")
        assert done.code == 0
        found = json.loads(done.out)
        assert found["population"] == ["Code", "Math"]
        plain, relaxed = found["models"]
        scores = [dict(zip(TASKS, fractions(row), strict=True)) for row in (DARE, DARE_AIM)]
        population = [fractions(CODE), fractions(MATH)]
        assert (plain["name"], plain["change"]) == ("DARE", None)
        assert [plain["scores"], relaxed["scores"]] == scores
        assert plain["hv_gain"] == hv_gain(fractions(DARE), population)
        assert relaxed["hv_gain"] == hv_gain(fractions(DARE_AIM), population)
        assert (relaxed["name"], relaxed["parent"]) == ("DARE + AIM", "DARE")
        assert relaxed["change"] == {task: scores[1][task] - scores[0][task] for task in TASKS}

    def test_the_table_states_the_population(self, tmp_path: Path, run: Run) -> None:
        files, experts = paper(tmp_path)
        done = run("compare", *files, "--against", *experts)
        assert done.err == ""
        assert [line.split()[-1] for line in done.out.splitlines()[1:3]] == ["-", "-"]
        assert "0.2272  -1.65 %" in done.out
        assert "HV gain: against the population Code, Math; over 6 tasks, as fractions, reference point 0" in done.out

    def test_against_takes_all_files_up_to_the_next_flag(self, tmp_path: Path, run: Run) -> None:
        files, experts = paper(tmp_path)
        first, second = experts
        asked = [
            ["--against", first, second, "--json", *files],
            [*files, "--json", "--against", first, second],
            [*files, "--json", "--against", first, "--against", second],
            [*files, f"--against={first}", "--against", second, "--json"],
        ]
        answers = [run("compare", *map(str, words)) for words in asked]
        assert {answer.code for answer in answers} == {0}
        assert len({answer.out for answer in answers}) == 1
        assert run("compare", *files, "--against").code == 2
        done = run("compare", "--against", *experts, *files)
        assert (done.code, "SCORES" in done.err) == (2, True), "nothing is left to compare, and that is said"

    def test_a_pair_that_is_asked_for_is_told(self, tmp_path: Path, run: Run) -> None:
        files, experts = paper(tmp_path)
        done = run("compare", *files, "--against", *experts, "--pair", "gsm8k,mbpp", "--sort", "gsm8k")
        assert "Pareto front of gsm8k and mbpp: Code, DARE + AIM, DARE" in done.out
        assert "Pareto" not in run("compare", *files).out


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of the study. Read only: drawing takes a second."""
    folder = tmp_path_factory.mktemp("study")
    found = compared(*read_all(*study(folder)))
    write_report(found, fronts_of(found), folder / "report")
    return folder / "report"


class TestReport:
    def test_it_holds_tables_and_pictures_and_nothing_is_left_beside(self, report: Path) -> None:
        pictures = {f"{name}.{kind}" for name in ("pareto", "omega") for kind in ("png", "svg")}
        assert {file.name for file in report.iterdir()} == {"report.md", "report.csv", "report.json", *pictures}
        assert not [path for path in report.parent.iterdir() if path.name.startswith(".")]
        for file in report.glob("*.png"):
            with Image.open(file) as image:
                image.load()
        for file in report.glob("*.svg"):
            assert ElementTree.parse(file).getroot().tag.endswith("svg")

    def test_all_forms_have_the_same_numbers(self, report: Path, tmp_path: Path, run: Run) -> None:
        merges, experts = study(tmp_path)
        found = json.loads((report / "report.json").read_text())
        assert found == json.loads(run("compare", *merges, "--against", *experts, "--json").out)
        with (report / "report.csv").open() as stream:
            rows: dict[str, dict[str, Any]] = {row["name"]: row for row in csv.DictReader(stream)}
        assert [name for name, row in rows.items() if row["in_population"] == "1"] == found["population"]
        for one in found["models"]:
            row = rows[one["name"]]
            assert {task: float(row[task]) for task in ("a", "b", "w")} == one["scores"]
            assert float(row["hv_gain"]) == one["hv_gain"]
            assert float(row["hv_gain stderr"]) == one["hv_gain_stderr"]
            assert row["w stderr"] == ""
            if one["change"]:
                assert {task: float(row[f"{task} change"]) for task in ("a", "b", "w")} == one["change"]
        assert [row["omega"] for row in rows.values()][2:] == ["", "0.2", "0.2", "0.6", "0.6"]

    def test_the_page_says_what_is_in_the_pictures(self, report: Path) -> None:
        page = (report / "report.md").read_text()
        for file in report.glob("*.png"):
            assert f"]({file.name})" in page
        assert "against the population code, $x\\_1$ \\<math\\>--; over 2 tasks" in page
        assert "- w is no fraction but perplexity of a word: it is left out of the HV gain" in page
        assert "- `a` and `b`: " in page

    def test_pictures_are_readable_in_grey(self, report: Path) -> None:
        for file in report.glob("*.png"):
            with Image.open(file) as image:
                red, green, blue, *_ = image.convert("RGB").split()
                assert red.tobytes() == green.tobytes() == blue.tobytes(), "no colour carries anything"

    def test_the_command_writes_it_and_the_same_files_give_the_same_bytes(
        self, report: Path, tmp_path: Path, run: Run
    ) -> None:
        merges, experts = study(tmp_path)
        out = tmp_path / "again"
        done = run("compare", *merges, "--against", *experts, "-o", out)
        assert (done.code, done.err) == (0, f"the report is in `{out}`\n")
        assert {file.name for file in out.iterdir()} == {file.name for file in report.iterdir()}
        for file in report.iterdir():
            assert file.read_bytes() == (out / file.name).read_bytes(), file.name

    def test_one_task_and_no_omega_draw_nothing(self, tmp_path: Path, run: Run) -> None:
        files = written(tmp_path, model("m", {"a": 0.5}))
        assert run("compare", *files, "-o", tmp_path / "report").code == 0
        assert {file.suffix for file in (tmp_path / "report").iterdir()} == {".md", ".csv", ".json"}

    def test_of_hundreds_of_tasks_the_pictures_stay_small(self) -> None:
        tasks = {f"task {number}": 0.5 for number in range(300)}
        found = compared([merge("plain", tasks), merge("aim", tasks, omega=0.5)])
        (curve,) = curves_of([row.model for row in found.rows], {"aim": found.rows[0].model})
        with drawing.drawing():
            figures = [omega_figure(found, curve), pareto_figure(found, fronts_of(found))]
        assert max(max(figure.get_size_inches()) * drawing.DOTS for figure in figures) < 4000
        with pytest.raises(UsageError, match="at most 24 panels"):
            check_pairs([("task 0", f"task {number}") for number in range(1, 30)], found.tasks)

    def test_a_report_that_cannot_be_written_leaves_nothing(
        self, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "files").mkdir()
        files = written(tmp_path / "files", model("m", {"a": 0.5}))

        def fail(*arguments: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "replace", fail)
        done = run("compare", *files, "-o", tmp_path / "report")
        assert done.code == 4
        assert "no space is left" in done.err
        assert [path.name for path in tmp_path.iterdir()] == ["files"]


class TestRefusals:
    def test_everything_that_is_wrong_is_told_at_once(
        self, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(compare, "find_spec", lambda name: None)
        file = tmp_path / "percent.json"
        file.write_text('{"name": "m", "scores": {"a": 52.1}}')
        (tmp_path / "report").mkdir()
        words = [file, "--against", file, "-o", tmp_path / "report", "--pair", "a"]
        done = run("compare", *words)
        assert done.code == 2
        for told in (
            "`compare` needs moocore and matplotlib",
            "pip install 'lowmem-aim[report]'",
            f"`{tmp_path / 'report'}` exists already",
            "`--pair a` is not two tasks",
            "`a` is 52.1, and a fraction lies between 0 and 1",
            "percent? divide by 100",
        ):
            assert told in done.err, told
        assert list((tmp_path / "report").iterdir()) == []

    def test_only_what_is_needed_must_be_installed(
        self, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(compare, "find_spec", lambda name: None)
        monkeypatch.setattr(drawing, "find_spec", lambda name: None)
        files = written(tmp_path, model("m", {"a": 0.5}), model("n", {"a": 0.6}))
        assert run("compare", *files).code == 0
        assert "needs moocore for" in run("compare", *files, "--against", files[0]).err
        done = run("compare", *files, "-o", tmp_path / "report")
        assert "needs matplotlib for" in done.err
        assert not (tmp_path / "report").exists()

    def test_another_limit_needs_force(self, tmp_path: Path, run: Run) -> None:
        one, other = model("m", {"a": 0.5}), model("n", {"a": 0.5}, settings={"seed": 0, "limit": 10})
        files = written(tmp_path, one, other)
        done = run("compare", *files)
        assert done.code == 2
        assert "`limit` differs: none in `m`; 10 in `n`" in done.err
        assert "`--force`" in done.err
        forced = run("compare", *files, "--force")
        assert forced.code == 0
        assert "compared by force: `limit` differs: none in `m`; 10 in `n`" in forced.out

    def test_two_files_of_one_name(self, tmp_path: Path, run: Run) -> None:
        (tmp_path / "other").mkdir()
        files = [by_hand(tmp_path, "m", CODE), by_hand(tmp_path / "other", "m", MATH)]
        done = run("compare", files[0], "--against", files[1])
        assert (done.code, "2 files have the name `m`" in done.err) == (2, True)


def test_comparing_imports_neither_torch_nor_matplotlib_without_a_report(tmp_path: Path) -> None:
    files, experts = paper(tmp_path)
    words = ["compare", *map(str, files), "--against", *map(str, experts)]
    code = (
        "import sys; from lowmem_aim.cli.commands import cli\n"
        f"cli({words!r}, standalone_mode=False)\n"
        "print(sorted({'torch', 'transformers', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]"
