"""`import lowmem_aim` is an API: what docs/python.md shows runs, and the names stay what they are."""

from __future__ import annotations

import importlib
import json
import pkgutil
import re
import signal
import subprocess
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from conftest import Run
from merge_cases import digests

import lowmem_aim
from lowmem_aim import errors, events
from lowmem_aim.recipe.reader import read_recipe
from lowmem_aim.recipe.yaml_tree import load_tree

PAGE = Path(__file__).parents[2] / "docs" / "python.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
# What each block makes, and whether it prints.
MAKES = [({"merged"}, True), ({"from-code"}, True), ({"with-task_arithmetic", "with-ties"}, False)]
MAKES += [(set[str](), True), (set[str](), True)]
RECIPE = """
merge_method: ties
base_model: base
models:
  - {model: math, parameters: {weight: 0.6, density: 0.5}}
  - {model: code, parameters: {weight: 0.4, density: 0.5}}
aim: {omega: 0.4, calibration: texts.jsonl, block_size: 32}
"""
TASK = """
task: sums
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/items.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_target: 0
doc_to_choice: choices
metric_list: [{metric: acc}]
"""
FUNCTIONS = ("calibrate", "compare", "evaluate", "merge", "plan", "read_recipe", "relax", "sweep", "verify")
NAMES = {*FUNCTIONS, "Forecast", "LowmemAimError", "Options", "Recipe", "errors", "events"}


@pytest.fixture
def here(llama: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: models `base`, `math`, `code`, and what docs/python.md speaks of beside them."""
    for name in ("base", "math", "code"):
        tiny.perturbed(llama / name, tmp_path / name, scale=0.0)
    tiny.perturbed(llama / "math", tmp_path / "merged-elsewhere", scale=0.0)
    (tmp_path / "recipe.yml").write_text(RECIPE)
    (tmp_path / "my-tasks").mkdir()
    (tmp_path / "my-tasks" / "sums.yaml").write_text(TASK.replace("FOLDER", str(tmp_path / "my-tasks")))
    rows = [{"q": f"{n} + 1 =", "choices": [str(n + 1), str(n)]} for n in range(9)]
    (tmp_path / "my-tasks" / "items.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_every_code_block_of_the_page_runs(number: int, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code = BLOCKS[number]
    if "relax" in code or "evaluate" in code:
        (here / "merged-elsewhere").rename(here / "merged")
    exec(compile(code, str(PAGE), "exec"), {"__name__": "notebook"})
    said = capfd.readouterr()
    assert said.err == ""
    made = {file.parent.parent.name for file in here.glob("*/.lowmem_aim/sha256.txt")}
    assert (made, bool(said.out)) == MAKES[number]


def test_the_public_names_are_these_whatever_has_been_imported() -> None:
    for module in pkgutil.walk_packages(lowmem_aim.__path__, "lowmem_aim."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    assert set(lowmem_aim.__all__) == NAMES
    assert set(dir(lowmem_aim)) >= NAMES
    for name in FUNCTIONS:
        assert isinstance(getattr(lowmem_aim, name), types.FunctionType)
    for name in NAMES:
        assert getattr(lowmem_aim, name).__doc__, name
    with pytest.raises(AttributeError):
        lowmem_aim.mergers  # noqa: B018


def test_importing_it_imports_nothing_slow() -> None:
    code = (
        "import sys, lowmem_aim as l; l.Options(), l.errors, l.events, l.Recipe;"
        "print(sorted({'torch', 'transformers', 'numpy', 'rich', 'click'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "[]\n"


def test_it_makes_what_the_command_line_makes(here: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("merge", "recipe.yml", "typed").code == 0
    capsys.readouterr()
    seen: list[events.Event] = []
    threads, handlers = torch.get_num_threads(), [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    made = lowmem_aim.merge("recipe.yml", "called", lowmem_aim.Options(threads=1), seen.append)
    assert made == Path("called")
    assert capsys.readouterr() == ("", "")
    assert torch.get_num_threads() == threads
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert isinstance(seen[0], events.RunStarted)
    assert isinstance(seen[-1], events.RunEnded)
    shards = {name: sha for name, sha in digests(here / "called").items() if name.endswith(".safetensors")}
    assert shards == {name: sha for name, sha in digests(here / "typed").items() if name.endswith(".safetensors")}


def test_a_finished_output_is_left_as_it_is(here: Path) -> None:
    before = digests(lowmem_aim.merge("recipe.yml", "out"))
    seen: list[events.Event] = []
    lowmem_aim.merge("recipe.yml", "out", on_event=seen.append)
    assert digests(here / "out") == before
    assert not any(isinstance(event, events.PhaseStarted) for event in seen)


def test_a_callback_that_raises_ends_the_run_and_the_same_call_resumes_it(here: Path) -> None:
    def stop(event: events.Event) -> None:
        if isinstance(event, events.TensorDone) and event.done > 20_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lowmem_aim.merge("recipe.yml", "out", on_event=stop)
    assert not (here / "out" / "config.json").exists()
    assert digests(lowmem_aim.merge("recipe.yml", "out")) == digests(lowmem_aim.merge("recipe.yml", "whole"))


def test_a_mapping_is_the_recipe_that_its_yaml_is(here: Path) -> None:
    import yaml

    table = yaml.safe_load(RECIPE)
    table["models"][0]["model"] = Path("math")
    found, expected = lowmem_aim.read_recipe(table), read_recipe(load_tree(Path("recipe.yml")))
    assert (found.models[0].reference, found.aim, found.parameters) == ("math", expected.aim, expected.parameters)
    assert [entry.parameters for entry in found.models] == [entry.parameters for entry in expected.models]
    with pytest.raises(errors.RecipeError) as caught:
        lowmem_aim.read_recipe(table | {"merge_method": "tie", "dtype": "float8", "models": 3})
    assert len(caught.value.problems) == 3
    assert all(problem.startswith("recipe: ") for problem in caught.value.problems)
    with pytest.raises(errors.RecipeError, match=r"recipe: models\[0\]: weight: a Tensor is not allowed in a recipe"):
        lowmem_aim.read_recipe({"models": [{"weight": torch.ones(1)}]})
    circle: dict[str, object] = {}
    circle["aim"] = circle
    with pytest.raises(errors.RecipeError, match="too deep"):
        lowmem_aim.read_recipe(circle)


def test_errors_are_those_of_the_command_line(here: Path) -> None:
    (here / "taken").mkdir()
    (here / "taken" / "mine.txt").write_text("mine")
    with pytest.raises(errors.UsageError):
        lowmem_aim.merge("recipe.yml", "taken")
    assert lowmem_aim.plan("recipe.yml", "taken", measure=False).exit_code == 2
    for job in (lowmem_aim.merge, lowmem_aim.plan):
        with pytest.raises(errors.UsageError, match="NUL character"):
            job("recipe.yml", "a\0b")
    with pytest.raises(errors.UsageError):
        lowmem_aim.verify("base")
    out = lowmem_aim.relax("math", "base", "relaxed", aim={"omega": 0.2, "calibration": "texts.jsonl"})
    assert json.loads((out / "lowmem_aim.json").read_text())["kept"]
    (out / "model.safetensors").write_bytes(b"spoilt")
    with pytest.raises(errors.VerifyError):
        lowmem_aim.verify(out)


def test_wrong_settings_of_an_evaluation_are_usage_errors_all_at_once(here: Path) -> None:
    wrong: dict[str, Any] = {"limit": 0, "include_path": "my-tasks", "metric": ["acc"], "dtype": "int8", "few_shot": 5}
    with pytest.raises(errors.UsageError) as caught:
        lowmem_aim.evaluate("base", "sums", "out.json", wrong)
    assert len(caught.value.problems) == len(wrong) + 1
    assert not (here / "out.json").exists()
    with pytest.raises(errors.UsageError, match="is not two tasks"):
        lowmem_aim.compare(["no.json"], pairs=["sums"])


def test_wrong_options_are_usage_errors_all_at_once(here: Path) -> None:
    wrong: dict[str, Any] = {
        "read": "x",
        "nonfinite": None,
        "threads": 0,
        "ram": "4GB",
        "slice_rows": -3,
        "seed": 0.5,
        "shard_bytes": None,
        "device": None,
    }
    with pytest.raises(errors.UsageError) as caught:
        lowmem_aim.merge("recipe.yml", "out", lowmem_aim.Options(**wrong))
    assert len(caught.value.problems) == len(wrong)
    for name, problem in zip(sorted(wrong), sorted(caught.value.problems), strict=True):
        assert problem.startswith(f"`{name}` must be ")
    assert not (here / "out").exists()


def test_jobs_of_several_threads_run_one_after_another(here: Path) -> None:
    threads = torch.get_num_threads()
    table = {"merge_method": "linear", "models": [{"model": "math", "parameters": {"weight": 1.0}}]}
    with ThreadPoolExecutor(3) as pool:
        made = [pool.submit(lowmem_aim.merge, table, f"out-{number}") for number in range(3)]
        assert [job.result() for job in made] == [Path(f"out-{number}") for number in range(3)]
    assert torch.get_num_threads() == threads
    assert len({json.dumps(digests(here / f"out-{number}")) for number in range(3)}) == 1
