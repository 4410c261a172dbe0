"""`init`: a recipe that plans and merges as it is written, for every method; or an error, and no file."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import tiny
import yaml
from conftest import Run
from hub.server import OLD, Hub
from long_cases import others_long
from merge_cases import digests

from lowmem_aim.jobs.api import read_recipe
from lowmem_aim.methods.registry import METHODS
from lowmem_aim.models.stand_in import FIRST_BYTES
from lowmem_aim.recipe.reader import read_recipe as read_tree
from lowmem_aim.recipe.recipe import Tokenizer
from lowmem_aim.recipe.starting import Start, starting_values
from lowmem_aim.recipe.yaml_tree import parse


@pytest.fixture
def models(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with `base` and the experts."""
    for name in ("base", "math", "code", "chat"):
        (tmp_path / name).symlink_to(llama / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def experts_of(method: str) -> list[str]:
    return ["./math", "code", "chat"][: METHODS[method].most or 3]


@pytest.mark.parametrize("by_text", [False, True])
@pytest.mark.parametrize("base", [None, "./base"])
@pytest.mark.parametrize("method", METHODS)
def test_the_text_says_what_the_table_says_for_every_method(method: str, base: str | None, by_text: bool) -> None:
    if base is None and METHODS[method].base == "required":
        return
    for count in range(max(METHODS[method].fewest, 1), 1 + (METHODS[method].most or 6)):
        start = Start(METHODS[method], base, [f"e: {n} #" for n in range(count)], 0.3 if base else None, by_text)
        assert yaml.safe_load(start.text()) == start.table()
        recipe = read_tree(parse(start.text(), "recipe.yml"))
        assert (recipe.method.name, recipe.base, len(start.experts)) == (method, base, count)


@pytest.mark.parametrize("method", METHODS)
def test_every_value_is_one_of_the_method_and_weights_sum_to_1(method: str) -> None:
    for count in (1, 2, 3, 7):
        own, whole = starting_values(METHODS[method], count)
        for name, value in (own | whole).items():
            assert METHODS[method].parameters[name].problem(value) == ""
        assert own.get("weight", 1 / count) * count == pytest.approx(1, abs=0.01)
        assert "density" not in own or 0 < own["density"] < 1


@pytest.mark.parametrize("method", others_long(METHODS, ["ties", "linear"]))
def test_what_it_writes_plans_and_merges_as_printed(models: Path, run: Run, method: str) -> None:
    base = [] if METHODS[method].base == "listed" else ["--base", "base"]
    experts = [word for name in experts_of(method) for word in ("--expert", name)]
    made = run("init", method, *base, *experts)
    assert (made.code, made.out) == (0, "recipe.yml\n"), made.err
    told = re.findall(r"lowmem-aim (plan|merge) (.*)", made.err)
    assert [command for command, _ in told] == ["plan", "merge"]
    for command, words in told:
        done = run(command, *shlex.split(words), *(["--no-measure"] * (command == "plan")))
        assert done.code == 0, done.err
    assert (models / "merged" / "config.json").is_file()
    if base:
        assert digests(models / "merged") != digests(models / "base")


def test_the_default_is_ties_on_a_base_and_linear_without(models: Path, run: Run) -> None:
    assert run("init", "--base", "base", "--expert", "math", "-o", "a.yml").code == 0
    assert run("init", "--expert", "math", "--expert", "code", "-o", "b.yml").code == 0
    assert read_recipe("a.yml").method.name == "ties"
    assert read_recipe("b.yml").method.name == "linear"


def test_aim_is_in_the_recipe_if_it_is_asked_for(models: Path, run: Run) -> None:
    for number, (flags, omega) in enumerate([((), None), (("--aim",), 0.4), (("--omega", "0.2"), 0.2)]):
        assert run("init", "--base", "base", "--expert", "math", *flags, "-o", f"{number}.yml").code == 0
        aim = read_recipe(f"{number}.yml").aim
        assert (aim and (aim.omega.value, aim.calibration)) == (omega and (omega, "builtin"))


def test_a_file_is_never_written_over(models: Path, run: Run) -> None:
    (models / "recipe.yml").write_text("mine")
    done = run("init", "--base", "base", "--expert", "math")
    assert (done.code, done.out) == (2, "")
    assert "`recipe.yml` exists already" in done.err
    beside = run("init", "--base", "base", "--expert", "./nowhere").err
    assert "`recipe.yml` exists already" in beside
    assert "no model folder `./nowhere`" in beside
    assert (models / "recipe.yml").read_text() == "mine"
    (models / "recipe.yml").unlink()
    (models / "recipe.yml").symlink_to("nowhere.yml")
    assert run("init", "--base", "base", "--expert", "math").code == 2
    assert not (models / "nowhere.yml").exists()


def test_all_that_is_wrong_is_told_at_once_and_nothing_is_written(models: Path, run: Run) -> None:
    done = run("init", "slerp", "--expert", "math", "--expert", "code", "-o", "none/recipe.yml")
    assert done.code == 2
    for problem in (f"there is no folder `{models / 'none'}`", "`slerp` needs a `base_model`", "takes exactly 1"):
        assert problem in done.err
    tiny.build("llama", models / "wide", hidden_size=64)
    done = run("init", "--base", "base", "--expert", "wide", "--expert", "./nowhere")
    assert done.code == 3
    assert f"no model folder `./nowhere` (looked in `{models}`)" in done.err
    assert run("init", "--base", "base", "--expert", "wide").code == 3
    assert "did you mean `dare_ties`" in run("init", "dare_tie", "--base", "base", "--expert", "math").err
    assert not list(models.rglob("*.yml"))


def test_a_recipe_elsewhere_whose_paths_mean_two_folders_is_not_written(models: Path, run: Run) -> None:
    (models / "sub" / "math").mkdir(parents=True)
    done = run("init", "--base", "base", "--expert", "math", "-o", "sub/r.yml")
    assert done.code == 2
    assert f"may be `{models / 'math'}` or `{models / 'sub' / 'math'}`" in done.err
    assert not (models / "sub" / "r.yml").exists()


def test_other_vocabularies_are_matched_by_text(models: Path, run: Run) -> None:
    tiny.build("llama", models / "more", vocab_size=272)
    done = run("init", "--base", "base", "--expert", "more")
    assert done.code == 0, done.err
    assert read_recipe("recipe.yml").tokenizer == Tokenizer("base")
    assert run("plan", "recipe.yml", "out", "--no-measure").code == 0
    done = run("init", "--expert", "math", "--expert", "more", "-o", "union.yml")
    assert done.code == 0, done.err
    assert read_recipe("union.yml").tokenizer == Tokenizer("union")
    assert run("plan", "union.yml", "out", "--no-measure").code == 0


def test_a_model_on_the_hub_is_read_by_its_headers(models: Path, run: Run, hub: Hub, sharded: Path) -> None:
    hub.commits[OLD] = sharded
    tiny.perturbed(sharded, models / "tuned", scale=0.01)
    done = run("init", "--base", "tiny/model", "--expert", "tuned")
    assert done.code == 0, done.err
    assert read_recipe("recipe.yml").base == "tiny/model"
    assert hub.of_weights == {file.name: FIRST_BYTES for file in sharded.glob("*.safetensors")}


def test_a_model_that_the_hub_does_not_give_is_said_not_to_be_looked_at(models: Path, run: Run) -> None:
    done = run("init", "--base", "base", "--expert", "someone/model")
    assert done.code == 0, done.err
    assert "not checked, because the Hub cannot be reached: `someone/model`" in done.err
    assert read_recipe("recipe.yml").models[0].reference == "someone/model"
    done = run("init", "--base", "./nowhere", "--expert", "someone/model", "-o", "b.yml")
    assert (done.code, (models / "b.yml").exists()) == (3, False)
