"""The search: several workers in one folder, what a killed one leaves, what is tried, and what is refused."""

from __future__ import annotations

import json
import pickle
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from run_events import MB
from stopping import held

from lowmem_aim.errors import DiskError, LockedError, RecipeError, ResumeError
from lowmem_aim.evaluating.scores import Score, Scores, write_scores
from lowmem_aim.evaluating.tasks import Asked
from lowmem_aim.events import Event, PointScored
from lowmem_aim.jobs import one_point, search, sweep
from lowmem_aim.jobs.forecast import Pass
from lowmem_aim.jobs.searched import Searched
from lowmem_aim.jobs.swept import Checked, Merges, Swept
from lowmem_aim.output.sweep_folder import ADDS_MOST, LOSES_LEAST
from lowmem_aim.recipe.points import Grid, points_of
from lowmem_aim.recipe.ranges import Range, domain_of, number_text
from lowmem_aim.recipe.search_space import space_of
from lowmem_aim.recipe.yaml_tree import Node, parse
from lowmem_aim.system.options import Options

optuna = pytest.importorskip("optuna")
BEST = 0.6  # the density of the best merge of `World`


class Killed(BaseException):
    """A worker ends in the middle of its work; the system gives back its locks, and it tidies nothing up."""


@dataclass
class World:
    """Merges that are nothing but a folder, and scores that follow from their recipes."""

    llama: Path
    out: Path
    merged: list[str] = field(default_factory=list)  # names, in order
    during: Callable[[str], Any] = lambda name: None  # called with the name in the middle of each merge
    events: list[Event] = field(default_factory=list)

    def tree(self) -> Node:
        models = [{"model": str(self.llama / name)} for name in ("math", "code")]
        recipe = {"merge_method": "ties", "base_model": str(self.llama / "base"), "models": models}
        return parse(yaml.safe_dump(recipe | {"parameters": {"weight": 1}}), "recipe.yml")

    def search(
        self,
        trials: int,
        parameters: Sequence[str] = ("density=0.2:0.9",),
        omegas: str | None = None,
        objectives: tuple[str, ...] = (),
        methods: Sequence[str] = (),
        controls: bool = True,
        **options: Any,
    ) -> sweep.Result:
        space = space_of(
            self.tree(), Grid(methods, parameters, omegas, flags={"calibration": "builtin"} if omegas else {})
        )
        swept = Swept(space.samples(), Asked(("up", "down")))
        searched = Searched(swept, space, trials, objectives, controls)
        return search.search(searched, self.out, Options(**options), self.events.append)

    def grid(self) -> sweep.Result:
        points = points_of(self.tree(), Grid(parameters=("density=0.3,0.6",)))
        return sweep.sweep(Swept(points, Asked(("up", "down"))), self.out)

    def merge_many(self, recipes: Any, models: Path, *rest: Any) -> None:
        for name in recipes:
            (models / name).mkdir(exist_ok=True)
            self.merged.append(name)
            self.during(name)

    def score(self, model: str, asked: Asked, file: Path, forwards: Any, options: Any, feed: Any, name: str) -> None:
        assert not file.exists()
        recipe = self.recipe(name) if file.parent.name == "scores" else {}
        aim, method = recipe.get("aim"), recipe.get("merge_method")
        value = 0.5
        if recipe:
            bonus = 0.0 if aim is None else -0.1 if "control" in aim else 0.05
            value = 0.9 - abs(recipe["parameters"].get("density", 0.3) - BEST) + bonus
        scores = {"up": Score(value, None, "acc", 100), "down": Score(1 / value, None, "perplexity", 100, "x", False)}
        facts = {"method": method, "aim": aim, "control": (aim or {}).get("control")}
        facts["parent"] = json.dumps([method, recipe.get("parameters")]) if recipe else None
        write_scores(file, Scores(name, scores, **facts))

    def recipe(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = yaml.safe_load((self.out / "recipes" / f"{name}.yml").read_text())
        return found

    def densities(self) -> list[float]:
        """What the trials chose, by number."""
        return [self.recipe(file.stem)["parameters"]["density"] for file in sorted((self.out / "recipes").iterdir())]

    def study(self) -> Any:
        storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(self.out / TRIALS)))
        return optuna.load_study(study_name="search", storage=storage)


TRIALS = "search.jsonl"


@pytest.fixture
def world(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    made = World(llama, tmp_path / "out")
    experts = {name: str(llama / name) for name in ("math", "code")}
    batches = [Pass(0, dict.fromkeys(("ties-density-0.3", "ties-density-0.6"), MB))]  # of the grid
    monkeypatch.setattr(search, "checked_search", lambda *asked: Checked(experts, Merges((), None)))
    monkeypatch.setattr(sweep, "checked", lambda *asked: Checked(experts, Merges(batches, None)))
    for module in (one_point, sweep):
        monkeypatch.setattr(module, "merge_many", lambda *asked: made.merge_many(*asked))
        monkeypatch.setattr(module, "score", lambda *asked: made.score(*asked))
    monkeypatch.setattr(sweep, "write_report", lambda *asked: None)
    monkeypatch.setattr(search, "POLL_SECONDS", 0.01)
    return made


def killed_at(name: str) -> Callable[[str], None]:
    def during(now: str) -> None:
        if now == name:
            raise Killed

    return during


# --- workers ----------------------------------------------------------------------------------------------------------


def test_two_workers_never_make_the_same_trial_and_one_takes_over_what_the_other_left(world: World) -> None:
    def other_worker(name: str) -> None:
        if name == "trial-0002":
            world.during = killed_at("trial-0005")
            with pytest.raises(Killed):
                world.search(8)
            world.during = lambda name: None

    world.during = other_worker
    found = world.search(8)
    # 3 and 4 are the other worker's, which was killed in 5.
    begun = [f"trial-{number:04}" for number in (0, 1, 2, 3, 4, 5, 5, 6, 7)]
    assert world.merged == begun
    assert [row.name for row in found.comparison.rows] == sorted(set(begun))
    assert all(trial.state.is_finished() for trial in world.study().get_trials())
    last = [event for event in world.events if isinstance(event, PointScored)][-1]
    assert (last.done, last.of) == (8, 8)


def test_what_is_tried_does_not_depend_on_who_tries_it(world: World, llama: Path, tmp_path: Path) -> None:
    world.search(12)
    other = World(llama, tmp_path / "other")
    for number in (3, 11):  # before and after the first trials, which are drawn blindly
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(world, "merge_many", other.merge_many)
            patch.setattr(world, "score", other.score)
            other.during = killed_at(f"trial-{number:04}")
            with pytest.raises(Killed):
                other.search(12)
            other.during = lambda name: None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(world, "merge_many", other.merge_many)
        patch.setattr(world, "score", other.score)
        other.search(12)
    assert len(set(world.densities())) == 12
    assert other.densities() == world.densities()


def test_a_worker_waits_for_the_trials_of_others_and_makes_them_if_they_die(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.during = killed_at("trial-0001")
    with pytest.raises(Killed):
        world.search(2)
    world.during = lambda name: None
    waited: list[float] = []
    with search.locked_if_free(world.out / ".lowmem_aim" / "trial-0001.lock") as held:
        assert held

        def other_dies(seconds: float) -> None:
            waited.append(seconds)
            raise Killed

        monkeypatch.setattr(search.time, "sleep", other_dies)
        with pytest.raises(Killed):
            world.search(2)
    assert waited
    assert world.merged == ["trial-0000", "trial-0001"]
    world.search(2)
    assert world.merged == ["trial-0000", "trial-0001", "trial-0001"]


def test_fresh_waits_until_nobody_works_there(world: World) -> None:
    def other(name: str) -> None:
        with pytest.raises(LockedError):
            world.search(2, fresh=True)

    world.during = other
    world.search(2)
    with search.locked_if_free(world.out / ".lowmem_aim" / "trial-0001.lock"), pytest.raises(LockedError):
        world.search(2, fresh=True)
    assert len(world.densities()) == 2
    world.during = lambda name: None
    world.search(1, fresh=True)
    assert len(world.densities()) == 1


def test_more_trials_go_on_where_the_search_ended(world: World) -> None:
    world.search(3)
    before = world.densities()
    world.search(5)
    assert world.merged == [f"trial-{number:04}" for number in range(5)]
    assert world.densities()[:3] == before
    earlier = [event.name for event in world.events if isinstance(event, PointScored) and event.earlier]
    assert [name for name in earlier if name.startswith("trial")] == ["trial-0000", "trial-0001", "trial-0002"]


def test_half_a_line_of_a_killed_worker_is_cut_off_and_no_pickle_is_read(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.search(2)
    with (world.out / TRIALS).open("ab") as stream:
        stream.write(b'{"op_code":4,"worker_id":"a-1","stu')

    def refuse(*given: Any) -> Any:
        raise AssertionError("pickle was read")

    monkeypatch.setattr(pickle, "loads", refuse)
    monkeypatch.setattr(pickle, "load", refuse)
    world.search(4)
    lines = [json.loads(line) for line in (world.out / TRIALS).read_text().splitlines()]
    assert [line["op_code"] for line in lines].count(0) == 1  # the study is begun once, however often it is opened
    assert len(world.densities()) == 4


def test_a_damaged_file_of_trials_is_told(world: World) -> None:
    world.search(2)
    (world.out / TRIALS).write_text("{}\n")
    with pytest.raises(DiskError, match=TRIALS):
        world.search(4)


# --- what is tried ----------------------------------------------------------------------------------------------------


def test_it_finds_the_highest_gain_and_recommends_that(world: World) -> None:
    found = world.search(18)
    assert world.study().direction.name == "MAXIMIZE"
    late, early = world.densities()[-8:], world.densities()[:8]
    assert sum(abs(d - BEST) for d in late) < sum(abs(d - BEST) for d in early)
    best = min(range(18), key=lambda number: abs(world.densities()[number] - BEST))
    assert found.recommended[ADDS_MOST] == f"trial-{best:04}"
    assert f"density: {world.densities()[best]}" in (world.out / f"{ADDS_MOST}.yml").read_text()


def test_a_task_of_which_less_is_better_is_minimised_and_several_make_a_front(world: World) -> None:
    world.search(6, objectives=("down",))
    study = world.study()
    assert study.best_value == min(1 / (0.9 - abs(density - BEST)) for density in world.densities())
    with pytest.raises(ResumeError, match="objectives"):
        world.search(7, objectives=("down", "up"))
    world.search(4, objectives=("down", "up"), fresh=True)
    assert [direction.name for direction in world.study().directions] == ["MINIMIZE", "MAXIMIZE"]


def test_a_parameter_is_tried_only_with_methods_that_have_it(world: World) -> None:
    world.search(8, ("density=0.2:0.9",), methods=("ties", "task_arithmetic"), omegas="0.5,1")
    chosen = [trial.params for trial in world.study().get_trials()]
    assert {params["merge_method"] for params in chosen} == {"ties", "task_arithmetic"}
    assert all(("density" in params) == (params["merge_method"] == "ties") for params in chosen)


def test_what_was_tried_already_is_not_merged_again_and_counts(world: World) -> None:
    world.search(9, ("density=0.3,0.6",))
    assert len(world.merged) == 2
    assert len(world.study().get_trials()) == 9
    last = [event for event in world.events if isinstance(event, PointScored)][-1]
    assert last.done < last.of == 9
    assert sorted({tuple(trial.values) for trial in world.study().get_trials()}) == sorted(
        {(trial.values[0],) for trial in world.study().get_trials() if "repeats" not in trial.user_attrs}
    )


@pytest.mark.parametrize("controls", [True, False])
def test_the_recommended_merge_gets_its_parent_and_its_control(world: World, controls: bool) -> None:
    found = world.search(4, omegas="0:0.9", controls=controls)
    best = found.recommended[ADDS_MOST]
    row = next(row for row in found.comparison.rows if row.name == best)
    assert row.parent is not None
    assert row.parent.name == f"{best}-unrelaxed"
    assert "aim" not in world.recipe(f"{best}-unrelaxed")
    assert (f"{best}-uniform" in world.merged) == controls
    before = list(world.merged)
    world.search(4, omegas="0:0.9", controls=controls)
    assert world.merged == before


def test_a_parent_that_is_a_trial_is_not_made_again(world: World) -> None:
    found = world.search(9, ("density=0.6",), omegas="0.5,1")
    assert not [name for name in world.merged if name.endswith("unrelaxed")]
    assert all(row.parent is not None for row in found.comparison.rows if row.model.relaxed)


def test_numbers_of_a_range_stay_numbers_in_a_recipe() -> None:
    within = domain_of(["1e-6:1e-5"], "-p")
    assert within == Range(1e-6, 1e-5)
    for value in (1e-6, 3.14159265e-6, 1e-5):
        assert yaml.safe_load(number_text(value, within)) == pytest.approx(value, rel=1e-5)
    assert number_text(0.123456789, Range(0, 1)) == "0.123457"
    assert number_text(0.99999999, Range(0, 0.99999999)) == "0.99999999"


# --- what is refused --------------------------------------------------------------------------------------------------


def test_another_seed_or_space_is_another_search(world: World) -> None:
    world.search(2)
    with pytest.raises(ResumeError, match="seed: 0 then, 1 now"):
        world.search(2, seed=1)
    with pytest.raises(ResumeError, match="density"):
        world.search(2, ("density=0.2:0.8",))
    with pytest.raises(ResumeError, match="search: given then"):
        world.grid()
    (world.out / "sampler.json").write_text("[]")
    with pytest.raises(ResumeError, match=r"sampler\.json"):
        world.search(2)


def test_a_grid_there_stays_a_grid(world: World) -> None:
    world.grid()
    with pytest.raises(ResumeError, match="search: not given then"):
        world.search(2)
    assert not (world.out / "sampler.json").exists()


@pytest.mark.parametrize(("values", "told"), [("0.9:0.2", "ends where"), ("a:1", "no range"), ("1:2,3", "no range")])
def test_what_is_no_range_is_told(values: str, told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        domain_of(values.split(","), "--omega")


CHOICE = """
task: TASK
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/TASK.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_target: label
doc_to_choice: choices
metric_list: [{metric: acc}]
"""


@pytest.fixture
def place(llama: Path, tmp_path: Path) -> Path:
    """A folder with `recipe.yml`, texts, and two tasks in `tasks`."""
    folder = tmp_path / "place"
    (folder / "tasks").mkdir(parents=True)
    for task, sign in (("plus", 1), ("minus", -1)):
        items = [
            {"q": f"{a} {b}", "choices": [str(a + sign * b), str(b)], "label": 0} for a in range(4) for b in (1, 2)
        ]
        (folder / "tasks" / f"{task}.jsonl").write_text("\n".join(map(json.dumps, items)))
        text = CHOICE.replace("FOLDER", str(folder / "tasks")).replace("TASK", task)
        (folder / "tasks" / f"{task}.yaml").write_text(text)
    models = [{"model": str(llama / name)} for name in ("math", "code")]
    recipe = {"merge_method": "ties", "base_model": str(llama / "base"), "models": models, "parameters": {"weight": 1}}
    (folder / "recipe.yml").write_text(yaml.safe_dump(recipe))
    (folder / "texts.txt").write_text("one two three four\n" * 8)
    return folder


def line(place: Path, *more: str) -> tuple[Any, ...]:
    tasks = ("--tasks", "plus,minus", "--include-path", place / "tasks", "--calibration", place / "texts.txt")
    return ("sweep", place / "recipe.yml", place / "out", *tasks, "--samples", "2", "--block-size", "16", *more)


def test_a_search_end_to_end(place: Path, run: Any) -> None:
    flags = (
        "--search",
        "2",
        "-p",
        "density=0.2:0.9",
        "--omega",
        "0:1",
        "--objective",
        "plus",
        "--keep",
        "all",
        "--no-controls",
    )
    done = run(*line(place, *flags))
    assert done.code == 0, done.err
    out = place / "out"
    scores = {file.stem: json.loads(file.read_text()) for file in (out / "scores").iterdir()}
    trials = [name for name in scores if len(name) == len("trial-0000")]
    assert sorted(trials) == ["trial-0000", "trial-0001"]
    for name in trials:
        recipe = yaml.safe_load((out / "recipes" / f"{name}.yml").read_text())
        assert scores[name]["aim"]["omega"] == recipe["aim"]["omega"]
        assert (out / "models" / name / "config.json").is_file()
    assert len(json.loads((out / "report" / "report.json").read_text())["models"]) == len(scores)
    assert (out / f"{LOSES_LEAST}.yml").is_file()
    assert json.loads((out / "sampler.json").read_text())["objectives"] == ["plus"]


@pytest.mark.long
def test_a_process_takes_over_the_trial_of_one_that_was_killed(place: Path, run: Any) -> None:
    out = place / "out"
    flags = ("--search", "2", "-p", "density=0.2:0.9", "--omega", "0.5", "--objective", "plus", "--no-controls")
    words = line(place, *flags, "--keep", "all")
    first = held("lowmem_aim.jobs.one_point.score", *words)  # trial-0000 is merged

    def killing() -> None:
        while not (out / "scores" / "trial-0001.json").exists():
            time.sleep(0.05)
        first.kill()

    with first:
        merged = (out / "models" / "trial-0000" / "model.safetensors").stat()
        threading.Thread(target=killing, daemon=True).start()
        done = run(*words)
    assert done.code == 0, done.err
    assert "waiting for what other processes are making" in done.err
    assert {"trial-0000.json", "trial-0001.json"} <= {file.name for file in (out / "scores").iterdir()}
    after = (out / "models" / "trial-0000" / "model.safetensors").stat()
    assert (after.st_ino, after.st_mtime_ns) == (merged.st_ino, merged.st_mtime_ns)


def test_everything_that_is_wrong_is_told_at_once_and_before_work(place: Path, run: Any) -> None:
    done = run(*line(place, "--search", "0", "-p", "density=0.9:0.2", "--omega", "0:x"))
    assert done.code == 2
    for told in ("one trial or more", "`0.9:0.2` ends where", "`0:x` is no range"):
        assert told in done.err
    done = run(*line(place, "--search", "2", "--omega", "0:1", "--objective", "plus,minos"))
    assert done.code == 2
    assert "no task `minos` is evaluated; did you mean `minus`?" in done.err
    done = run(*line(place, "-p", "density=0.2:0.9", "--omega", "0:1"))
    assert done.code == 2
    assert "`density=0.2:0.9` is a range" in done.err
    assert "`--search N`" in done.err
    done = run(*line(place, "--objective", "plus"))
    assert done.code == 2
    assert "no meaning without `--search`" in done.err
    assert not (place / "out").exists()


def test_a_search_without_optuna_says_what_to_install(place: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import util

    found = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name, *rest: None if name == "optuna" else found(name, *rest))
    done = run(*line(place, "--search", "2", "--omega", "0:1"))
    assert done.code == 2
    assert "pip install 'lowmem-aim[search]'" in done.err
