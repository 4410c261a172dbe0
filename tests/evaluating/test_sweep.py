"""`sweep`: from experts to a report and two recipes; killed and resumed, added to, refused before work."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Run
from merge_cases import digests

import lowmem_aim
from lowmem_aim.errors import DiskError
from lowmem_aim.evaluating import report
from lowmem_aim.evaluating.comparison import compared
from lowmem_aim.evaluating.recommended import recommended
from lowmem_aim.evaluating.scores import Score, Scores, read_scores
from lowmem_aim.evaluating.tasks import Asked
from lowmem_aim.events import Event, PointScored, silent
from lowmem_aim.jobs import plan
from lowmem_aim.jobs import sweep as sweep_job
from lowmem_aim.jobs.search_plan import plan_search
from lowmem_aim.jobs.searched import Searched
from lowmem_aim.jobs.sweep import Result, sweep
from lowmem_aim.jobs.sweep_plan import plan_sweep
from lowmem_aim.jobs.swept import Keep, Swept, checked, largest
from lowmem_aim.output import small_files
from lowmem_aim.recipe.points import Grid, points_of
from lowmem_aim.recipe.search_space import space_of
from lowmem_aim.recipe.yaml_tree import load_tree
from lowmem_aim.system.options import Options
from lowmem_aim.view.sweep_lines import sweep_lines

OPTIONS = Options(ram=2_000_000_000)
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


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pictures are drawn: they take most of the time of so small a sweep."""
    monkeypatch.setattr(small_files, "heatmap_png", lambda kept: None)
    monkeypatch.setattr(report, "png_of", lambda figure: b"")
    monkeypatch.setattr(report, "svg_of", lambda figure: b"")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Speeds of disk and device are measured in moments."""
    monkeypatch.setattr(plan, "MEASURED_SECONDS", 0.02)


def swept(place: Path, keep: Keep = "best", disk: int | None = None, **grid: Any) -> Swept:
    points = points_of(load_tree(place / "recipe.yml"), Grid(**grid))
    return Swept(points, Asked(("sums",), (place / "tasks",)), keep=keep, disk=disk)


def done(place: Path, emit: Callable[[Event], None] = silent, **asked: Any) -> Result:
    return sweep(swept(place, **asked), place / "out", OPTIONS, emit)


def test_from_python(place: Path, undrawn: None, run: Run) -> None:
    settings = {"include_path": [place / "tasks"]}
    out, recipe = place / "out", place / "recipe.yml"
    found = lowmem_aim.sweep(
        recipe, out, ["sums"], settings, parameters={"density": [0.3, 0.4]}, omegas=[1], options=OPTIONS
    )
    names = ["ties-density-0.3", "ties-density-0.4"]
    assert [model["name"] for model in found["models"]] == names
    assert found["population"] == ["math", "code"]
    assert set(found["recommended"].values()) <= set(names)
    assert found["models"] == json.loads((out / "report" / "report.json").read_text())["models"]
    # `plan` takes the recipe of a point like any other.
    assert run("plan", out / "recipes" / f"{names[1]}.yml", place / "planned", "--no-measure").code == 0


def models_in(out: Path) -> set[str]:
    return {folder.name for folder in (out / "models").iterdir()}


def test_from_experts_to_a_report_and_two_recipes(place: Path, run: Run) -> None:
    out = place / "out"
    line: tuple[Any, ...] = ("sweep", place / "recipe.yml", out, "--methods", "ties,dare_linear", "--seed", "3")
    line += ("--tasks", "sums,words", "--include-path", place / "tasks")
    ran = run(*line)
    assert (ran.code, ran.out) == (0, f"{out}\n"), ran.err
    names = POINTS + [name.replace("ties", "dare_linear") for name in POINTS]
    for folder, expected in (("scores", names), ("recipes", names), ("experts", ["math", "code"])):
        assert {file.stem for file in (out / folder).iterdir()} == set(expected)
    found = json.loads((out / "report" / "report.json").read_text())
    assert (found["population"], [model["name"] for model in found["models"]]) == (["math", "code"], names)
    assert {model["parent"] for model in found["models"]} == {"ties", "dare_linear", None}
    assert (out / "report" / "pareto.png").is_file()
    scores = read_scores(out / "scores" / "dare_linear-omega-0.2-uniform.json")
    assert (scores.name, scores.control) == ("dare_linear-omega-0.2-uniform", "uniform")
    # Both recipes give, in a folder of their own, the model that was scored.
    best = {file.stem: file.read_text().splitlines()[0].removeprefix("# ") for file in out.glob("*.yml")}
    gains = [model["hv_gain"] for model in found["models"] if not model["name"].endswith("uniform")]
    assert set(best) == {"loses-least", *(["adds-most"] if max(gains) > 0 else [])}
    assert models_in(out) == set(best.values())
    assert not any(name.endswith("uniform") for name in best.values())
    for what, name in best.items():
        assert f"{what.replace('-', ' ')}: {name}" in ran.err
        assert run("merge", out / f"{what}.yml", place / what, "--seed", "3").code == 0
        assert digests(place / what) == digests(out / "models" / name)
    assert json.loads(run("status", out, "--json").out)["points"] == 6
    again = run(*line)
    assert again.code == 0
    assert "merge:" not in again.err


def test_a_killed_sweep_goes_on_with_what_is_not_scored(place: Path, undrawn: None) -> None:
    out, seen = place / "out", list[PointScored]()

    def until(count: int) -> Callable[[Event], None]:
        def emit(event: Event) -> None:
            if isinstance(event, PointScored):
                seen.append(event)
                if not event.expert and event.done == count and not event.earlier:
                    raise KeyboardInterrupt

        return emit

    whole = done(place, keep="none")
    assert models_in(out) == set()
    files = {file.name: file.read_bytes() for file in (out / "scores").iterdir()}
    out.rename(place / "whole")
    with pytest.raises(KeyboardInterrupt):
        done(place, until(2), keep="none")
    first = {file.name: file.stat().st_mtime_ns for file in (out / "scores").glob("*.json")}
    assert set(first) == {f"{name}.json" for name in POINTS[:2]}
    seen.clear()
    assert done(place, until(99), keep="none").comparison == whole.comparison
    assert [(event.name, event.earlier) for event in seen if not event.expert] == [
        (POINTS[0], True),
        (POINTS[1], True),
        (POINTS[2], False),
    ]
    assert {file.name: file.read_bytes() for file in (out / "scores").iterdir()} == files
    assert all((out / "scores" / name).stat().st_mtime_ns == time for name, time in first.items())


def test_points_are_added_and_no_more_merged_at_a_time_than_the_disk_holds(
    place: Path, undrawn: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, batches, own = place / "out", list[list[str]](), sweep_job.merge_many

    def noting(recipes: Any, *rest: Any) -> None:
        batches.append(list(recipes))
        own(recipes, *rest)

    monkeypatch.setattr(sweep_job, "merge_many", noting)
    first = done(place, keep="none", omegas="1")
    assert [row.name for row in first.comparison.rows] == ["ties"]
    one = largest(checked(swept(place), out, OPTIONS, silent).merges.batches)
    names = ["ties", "ties-omega-0.2", "ties-omega-0.3", "ties-omega-0.4"]
    with pytest.raises(DiskError, match="4 merged models at a time"):
        done(place, keep="all", disk=2 * one, omegas="0.2,0.3,0.4", controls=False)
    second = done(place, keep="none", disk=2 * one, omegas="0.2,0.3,0.4", controls=False)
    assert [row.name for row in second.comparison.rows] == names
    assert batches == [["ties"], names[1:3], names[3:]]
    assert len(json.loads((out / "report" / "report.json").read_text())["models"]) == 4


def test_all_models_can_stay(place: Path, undrawn: None) -> None:
    done(place, keep="all", controls=False)
    assert models_in(place / "out") == {"ties", "ties-omega-0.2"}


def test_a_plan_tells_points_readings_disk_and_time(place: Path, quick: None, run: Run) -> None:
    line = ("sweep", place / "recipe.yml", place / "out", "--tasks", "sums", "--include-path", place / "tasks")
    found = json.loads(run(*line, "--plan", "--json").out)
    assert (found["points"], found["experts"], found["tasks"]) == (POINTS, ["math", "code"], ["sums"])
    assert (found["families"], found["relaxed"], found["controls"], found["scored"]) == (1, 1, 1, 0)
    [batch] = found["batches"]
    assert found["read_bytes"] == batch["read_bytes"] > 0
    assert found["disk_bytes"] == sum(batch["output_bytes"].values())
    assert found["merges"]["steps"]
    time = found["time"]
    [outlook] = time["each"]["likelihoods"]
    assert (time["models"], outlook["requests"], time["writing_seconds"]) == (5, 36, 0)
    assert time["each"]["seconds"] == pytest.approx(time["each"]["setup"] + outlook["seconds"])
    assert time["seconds"] == pytest.approx(time["start"] + time["merges"] + 5 * time["each"]["seconds"])
    told = run(*line, "--plan")
    assert told.code == 0
    for text in (
        "points    3: 1 unrelaxed, 1 relaxed, 1 controls",
        "inputs    read once",
        "of disk at most",
        "measured with `math`: 36 requests",
        "an estimate: start",
        ", 5 models on the tasks 0:",
    ):
        assert text in told.out
    assert not (place / "out").exists()
    assert run(*line, "--plan", "--ram", "1MB").code == 5


def test_a_plan_counts_only_what_is_left(place: Path, undrawn: None, quick: None) -> None:
    done(place, keep="none", omegas="1")
    more = plan_sweep(swept(place), place / "out", OPTIONS)
    assert (more.scored, more.time.models) == (1, 2)
    nothing = plan_sweep(swept(place, omegas="1"), place / "out", OPTIONS)
    assert (nothing.merges, nothing.time.models, nothing.time.each, nothing.time.merges) == (None, 0, None, 0.0)
    assert nothing.time.seconds == nothing.time.start
    fresh = plan_sweep(swept(place), place / "out", replace(OPTIONS, fresh=True))
    assert (fresh.scored, fresh.time.models) == (0, 5)


def test_the_time_of_texts_is_told_apart_and_at_most(place: Path, quick: None, run: Run) -> None:
    task = TASK.replace("NAME", "words").replace("FOLDER", str(place / "tasks")).split("output_type")[0]
    task += "output_type: generate_until\ndoc_to_text: '{{words}}'\ndoc_to_target: 'a'\n"
    task += "generation_kwargs: {max_gen_toks: 7}\nmetric_list: [{metric: exact_match}]\n"
    (place / "tasks" / "words.yaml").write_text(task)
    asked = Asked(("sums", "words"), (place / "tasks",), limit=5)
    found = plan_sweep(replace(swept(place), asked=asked), place / "out", OPTIONS).as_json()
    time, writing = found["time"], found["time"]["each"]["writing"]
    assert (writing["texts"], writing["written"]) == (5, 35)
    assert time["writing_seconds"] == 5 * writing["seconds"] > 0
    told = "\n".join(sweep_lines(found))
    assert "5 texts of 35 tokens at most, after" in told
    assert "and then 5 models write for up to 0:" in told


def test_each_of_rays_tasks_reads_the_inputs(place: Path, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", sys)  # Ray need not be here
    found = plan_sweep(replace(swept(place), ray="local"), place / "out", OPTIONS)
    assert [list(batch.output_bytes) for batch in found.batches] == [[name] for name in POINTS]
    assert found.disk_bytes == sum(sum(batch.output_bytes.values()) for batch in found.batches)


def test_a_plan_of_a_search_tells_trials_readings_disk_and_time(place: Path, quick: None, run: Run) -> None:
    pytest.importorskip("optuna")
    line: tuple[Any, ...] = ("sweep", place / "recipe.yml", place / "out", "--omega", "0.1:0.9", "--tasks", "sums")
    line += ("--include-path", place / "tasks", "-p", "density=0.3:0.9", "--search", "7", "--plan")
    found = json.loads(run(*line, "--json").out)
    assert (found["trials"], found["finished"], found["judges"], found["merged"]) == (7, 0, 4, 11)
    assert found["space"]["methods"] == {"ties": {"density": "0.3:0.9"}}
    assert (found["experts"], found["tasks"], found["objectives"]) == (["math", "code"], ["sums"], [])
    assert found["time"]["models"] == 13
    [step] = found["merges"]["steps"]
    assert found["time"]["merges"] == step["seconds"]
    one = swept(place, omegas="1")
    [batch] = plan_sweep(one, place / "out", OPTIONS).batches
    assert found["read_bytes"] == 11 * batch.read_bytes
    assert found["disk_bytes"] == 3 * largest([batch])
    told = run(*line).out
    for text in (
        "search    7 trials",
        "ties: density 0.3 to 0.9, omega 0.1 to 0.9",
        "for the HV gain over the experts",
        "inputs    read for each of 11 merges (4 merges at most to judge",
        "13 models on the tasks",
    ):
        assert text in told
    assert not (place / "out").exists()
    assert run(*line, "--ram", "1MB").code == 5


def test_a_search_that_is_half_done_plans_the_rest(place: Path, quick: None) -> None:
    pytest.importorskip("optuna")
    for name in (".lowmem_aim/lock", "experts/math.json", *(f"scores/trial-000{n}.json" for n in ("0", "1", "1-x"))):
        (place / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (place / "out" / name).touch()
    space = space_of(load_tree(place / "recipe.yml"), Grid(parameters=("density=0.3:0.9",)))
    samples = Swept(space.samples(), Asked(("sums",), (place / "tasks",)), keep="none")
    found = plan_search(Searched(samples, space, 5, controls=False), place / "out", OPTIONS)
    assert (found.finished, found.judges, found.merged, found.time.models) == (2, 2, 5, 6)
    all_stay = Searched(replace(samples, keep="all", disk=3 * found.disk_bytes), space, 50)
    with pytest.raises(DiskError, match="50 merged models at a time"):
        plan_search(all_stay, place / "out", OPTIONS)
    (place / "out" / "experts" / "code.json").touch()
    done_already = plan_search(Searched(samples, space, 2, controls=False), place / "out", OPTIONS)
    assert (done_already.merged, done_already.merges, done_already.time.each) == (0, None, None)


def test_everything_that_is_wrong_is_told_before_work(place: Path, run: Run) -> None:
    out, recipe = place / "out", place / "recipe.yml"
    tasks: tuple[Any, ...] = ("--include-path", place / "tasks", "--tasks")
    cases: list[tuple[tuple[Any, ...], int, list[str]]] = [
        ((recipe, out, *tasks, "sums", "--methods", "tise", "-p", "density"), 2, ["did you mean `ties`", "NAME=VALUE"]),
        ((recipe, out, *tasks, "smus", "--nonfinite", "base"), 2, ["smus"]),
        ((recipe, out, *tasks, "sums", "--metric", "sums"), 2, ["--metric"]),
        ((recipe, recipe, *tasks, "sums"), 2, ["is a file"]),
        ((recipe, place / "tasks", *tasks, "sums"), 2, ["and no sweep"]),
        ((recipe, out, *tasks, "sums", "--disk", "1KB"), 4, ["`--disk`"]),
        ((recipe, out, *tasks, "sums", "--ram", "1MB"), 5, ["RAM"]),
    ]
    for line, code, told in cases:
        ran = run("sweep", *line)
        assert ran.code == code, ran.err
        for text in told:
            assert text in ran.err
        assert not out.exists(), line


def test_another_sweep_in_the_same_folder_is_refused(place: Path, undrawn: None, run: Run) -> None:
    out = place / "out"
    line: tuple[Any, ...] = ("sweep", place / "recipe.yml", out, "--omega", "1", "--include-path", place / "tasks")
    assert run(*line, "--tasks", "sums").code == 0
    before = digests(out)
    assert run(*line, "--tasks", "sums,words").code == 7
    assert run(*line, "--tasks", "sums", "--seed", "1").code == 7
    (place / "recipe.yml").write_text((place / "recipe.yml").read_text().replace("density: 0.5", "density: 0.6"))
    refused = run(*line, "--tasks", "sums")
    assert (refused.code, "1 point of the sweep in this folder had another recipe" in refused.err) == (7, True)
    assert digests(out) == before
    assert run(*line, "--tasks", "sums", "--fresh").code == 0
    assert digests(out).keys() == before.keys()
    assert digests(out) != before


def test_what_is_recommended() -> None:
    def model(name: str, x: float, y: float, **more: Any) -> Scores:
        return Scores(name, {"x": Score(x), "y": Score(y)}, **more)

    experts = [model("a", 0.8, 0.2), model("b", 0.1, 0.6)]
    merges = [
        model("even", 0.6, 0.55, method="ties"),  # loses 0.2 of x; adds most
        model("near", 0.7, 0.45, method="ties"),  # loses 0.15 of y
        model("control", 0.8, 0.6, method="ties", control="uniform", aim={"omega": 0.4}),
    ]
    assert recommended(compared(merges, experts)) == {"adds-most": "even", "loses-least": "near"}
    assert recommended(compared([model("less", 0.7, 0.1)], experts)) == {"loses-least": "less"}, "it adds nothing"


def test_without_fractions_what_loses_least_is_recommended() -> None:
    def model(name: str, x: float, y: float) -> Scores:
        units = (Score(x, unit="words", higher_is_better=False), Score(y, unit="points"))
        return Scores(name, dict(zip("xy", units, strict=True)), method="ties")

    experts = [model("a", 10.0, 20.0), model("b", 20.0, 30.0)]
    merges = [model("c", 15.0, 30.0), model("d", 10.5, 27.0)]  # 50 % of x; 5 % of x and 10 % of y
    assert recommended(compared(merges, experts)) == {"loses-least": "d"}
