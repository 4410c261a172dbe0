"""`sweep`: from experts to a report and two recipes; killed and resumed, added to, refused before work."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Run
from merge_cases import digests

from lowmem_aim.errors import MemoryBudgetError
from lowmem_aim.evaluating.scores import read_scores
from lowmem_aim.evaluating.tasks import Asked
from lowmem_aim.events import Event, PointScored, silent
from lowmem_aim.jobs import sweep as sweep_job
from lowmem_aim.jobs.sweep import Result, sweep
from lowmem_aim.jobs.swept import Keep, Swept
from lowmem_aim.recipe.points import Grid, points_of
from lowmem_aim.recipe.yaml_tree import load_tree
from lowmem_aim.system.options import Options

TASK = """
task: NAME
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/items.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{NAME}}"
doc_to_target: label
doc_to_choice: choices
metric_list: [{metric: acc}]
"""
ITEMS = [
    {"sums": f"{a} + {b} =", "words": "abc" * a + "d" * b, "choices": [f" {a}", f" {b}x", " q"], "label": (a + b) % 3}
    for a in range(4)
    for b in range(3)
]
POINTS = ["ties", "ties-omega-0.2", "ties-omega-0.2-uniform"]


@pytest.fixture
def place(llama: Path, measured: Path, tmp_path: Path) -> Path:
    """A folder with a recipe of the tiny Llamas and with two tasks."""
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "items.jsonl").write_text("\n".join(map(json.dumps, ITEMS)))
    for name in ("sums", "words"):
        (tasks / f"{name}.yaml").write_text(TASK.replace("NAME", name).replace("FOLDER", str(tasks)))
    models = [{"model": str(llama / name), "parameters": {"weight": 1, "density": 0.5}} for name in ("math", "code")]
    table = {"merge_method": "ties", "base_model": str(llama / "base"), "models": models}
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(table | {"aim": {"omega": 0.2, "calibration": str(measured)}}))
    return tmp_path


def swept(
    place: Path, *, keep: Keep = "best", disk: int | None = None, names: str = "sums,words", **grid: Any
) -> Swept:
    points = points_of(load_tree(place / "recipe.yml"), Grid(**grid))
    return Swept(points, Asked(tuple(names.split(",")), (place / "tasks",)), keep=keep, disk=disk)


def done(place: Path, emit: Callable[[Event], None] = silent, options: Options | None = None, **asked: Any) -> Result:
    return sweep(swept(place, **asked), place / "out", options or Options(ram=2_000_000_000), emit)


def models_in(out: Path) -> set[str]:
    return {folder.name for folder in (out / "models").iterdir()}


def test_from_experts_to_a_report_and_two_recipes(place: Path, run: Run) -> None:
    out = place / "out"
    tasks = ("--tasks", "sums,words", "--include-path", place / "tasks")
    ran = run("sweep", place / "recipe.yml", out, *tasks, "--methods", "ties,dare_linear", "--seed", "3")
    assert (ran.code, ran.out) == (0, f"{out}\n"), ran.err
    names = POINTS + [name.replace("ties", "dare_linear") for name in POINTS]
    assert {file.stem for file in (out / "scores").iterdir()} == set(names)
    assert {file.stem for file in (out / "experts").iterdir()} == {"math", "code"}
    assert {file.stem for file in (out / "recipes").iterdir()} == set(names)
    report = json.loads((out / "report" / "report.json").read_text())
    assert (report["population"], [model["name"] for model in report["models"]]) == (["math", "code"], names)
    assert {model["parent"] for model in report["models"]} == {"ties", "dare_linear", None}
    assert (out / "report" / "pareto.png").is_file()
    scores = read_scores(out / "scores" / "dare_linear-omega-0.2-uniform.json")
    assert (scores.name, scores.control) == ("dare_linear-omega-0.2-uniform", "uniform")
    # Both recipes give, in a folder of their own, the model that was scored.
    best = {
        what: (out / f"{what}.yml").read_text().splitlines()[0].removeprefix("# ")
        for what in ("adds-most", "loses-least")
    }
    assert models_in(out) == set(best.values())
    assert not any(name.endswith("uniform") for name in best.values())
    for what, name in best.items():
        assert f"{what.replace('-', ' ')}: {name}" in ran.err
        assert run("merge", out / f"{what}.yml", place / what, "--seed", "3").code == 0
        assert digests(place / what) == digests(out / "models" / name)
    assert json.loads(run("status", out, "--json").out)["points"] == 6
    again = run("sweep", place / "recipe.yml", out, *tasks, "--methods", "ties,dare_linear", "--seed", "3")
    assert again.code == 0
    assert "merge:" not in again.err


def test_a_killed_sweep_goes_on_with_what_is_not_scored(place: Path) -> None:
    out, seen = place / "out", list[PointScored]()

    def until(count: int) -> Callable[[Event], None]:
        def emit(event: Event) -> None:
            if isinstance(event, PointScored):
                seen.append(event)
                if not event.expert and event.done == count and not event.earlier:
                    raise KeyboardInterrupt

        return emit

    whole = done(place, keep="none")
    files = {file.name: file.read_bytes() for file in sorted((out / "scores").iterdir())}
    out.rename(place / "whole")
    for count in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            done(place, until(count), keep="none")
        assert len(list((out / "scores").glob("*.json"))) == count
    times = {file.name: file.stat().st_mtime_ns for file in (out / "scores").glob("*.json")}
    seen.clear()
    assert done(place, until(99), keep="none").comparison == whole.comparison
    assert [(event.name, event.earlier) for event in seen if not event.expert] == [
        (POINTS[0], True),
        (POINTS[1], True),
        (POINTS[2], False),
    ]
    assert {file.name: file.read_bytes() for file in sorted((out / "scores").iterdir())} == files
    assert all((out / "scores" / name).stat().st_mtime_ns == time for name, time in times.items())


def test_points_are_added_to_a_sweep(place: Path) -> None:
    first = done(place, omegas="0.2", controls=False)
    assert [row.name for row in first.comparison.rows] == ["ties", "ties-omega-0.2"]
    second = done(place, omegas="0.5", controls=False)
    assert [row.name for row in second.comparison.rows] == ["ties", "ties-omega-0.2", "ties-omega-0.5"]
    assert len(json.loads((place / "out" / "report" / "report.json").read_text())["models"]) == 3


@pytest.mark.parametrize(("keep", "stay"), [("all", set(POINTS)), ("none", set())])
def test_models_stay_as_asked(keep: Keep, stay: set[str], place: Path) -> None:
    done(place, keep=keep)
    assert models_in(place / "out") == stay


def test_the_disk_bounds_how_many_are_merged_at_a_time(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches, most = [], []
    own = sweep_job.merge_many

    def counting(recipes: Any, out: Path, *rest: Any) -> None:
        batches.append(list(recipes))
        own(recipes, out, *rest)
        most.append(sum(file.stat().st_size for file in out.rglob("*.safetensors")))

    monkeypatch.setattr(sweep_job, "merge_many", counting)
    done(place, keep="all", disk=10**9)
    size = most[0] // 3
    for count, expected in ((1, [[name] for name in POINTS]), (2, [POINTS[:2], POINTS[2:]])):
        (place / "out").rename(place / f"before-{count}")
        batches.clear()
        most.clear()
        done(place, keep="none", disk=count * size + size // 2)
        assert batches == expected
        assert max(most) <= count * size


def test_what_the_memory_does_not_hold_at_once_is_merged_in_parts(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = []
    own = sweep_job.merge_many

    def small(recipes: Any, *rest: Any) -> None:
        if len(recipes) > 1:
            raise MemoryBudgetError("too small")
        batches.append(list(recipes))
        own(recipes, *rest)

    monkeypatch.setattr(sweep_job, "merge_many", small)
    done(place)
    assert batches == [[name] for name in POINTS]


def test_everything_that_is_wrong_is_told_before_work(place: Path, run: Run) -> None:
    out = place / "out"
    recipe = place / "recipe.yml"
    tasks = ("--include-path", place / "tasks", "--tasks")
    for line, code, told in [
        ((recipe, out, *tasks, "sums", "--methods", "tise", "-p", "density"), 2, ["did you mean `ties`", "NAME=VALUE"]),
        ((recipe, out, *tasks, "smus"), 2, ["smus"]),
        ((recipe, out, *tasks, "sums", "--metric", "sums"), 2, ["--metric"]),
        ((recipe, recipe, *tasks, "sums"), 2, ["is a file"]),
        ((recipe, place / "tasks", *tasks, "sums"), 2, ["and no sweep"]),
        ((recipe, out, *tasks, "sums", "--disk", "1KB"), 4, ["`--disk`"]),
        ((recipe, out, *tasks, "sums", "--ram", "1MB"), 5, ["RAM"]),
    ]:
        ran = run("sweep", *line)
        assert ran.code == code, ran.err
        for text in told:
            assert text in ran.err
        assert not out.exists(), line


def test_another_sweep_in_the_same_folder_is_refused(place: Path, run: Run) -> None:
    out = place / "out"
    line = ("sweep", place / "recipe.yml", out, "--include-path", place / "tasks", "--no-controls", "--tasks")
    assert run(*line, "sums").code == 0
    before = digests(out)
    assert run(*line, "sums,words").code == 7
    assert run(*line, "sums", "--seed", "1").code == 7
    (place / "recipe.yml").write_text((place / "recipe.yml").read_text().replace("density: 0.5", "density: 0.6"))
    done = run(*line, "sums")
    assert (done.code, "2 points of the sweep in this folder had another recipe" in done.err) == (7, True)
    assert digests(out) == before
    assert run(*line, "sums", "--fresh").code == 0
    assert (out / "models").is_dir()


def test_a_sweep_without_fractions_recommends_what_loses_least(place: Path) -> None:
    text = (
        TASK.replace("NAME", "flow")
        .replace("FOLDER", str(place / "tasks"))
        .replace("multiple_choice", "loglikelihood_rolling")
    )
    text = text.replace('doc_to_text: "{{flow}}"', 'doc_to_text: ""').replace(
        "doc_to_target: label", 'doc_to_target: "{{sums}}"'
    )
    (place / "tasks" / "flow.yaml").write_text(
        text.replace("doc_to_choice: choices\n", "").replace("acc", "word_perplexity")
    )
    found = done(place, names="flow")
    rows = {row.name: row.model.scores["flow"].value for row in found.comparison.rows if not row.model.control}
    assert found.recommended == {"loses-least": min(rows, key=lambda name: rows[name])}
