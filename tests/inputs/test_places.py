"""Relative paths of a recipe: the current folder first, then the recipe's own; never a silent choice between two."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import tiny
import yaml
from conftest import Run
from merge_cases import digests
from stopping import SHARDS, stop

from lowmem_aim.events import Event, TensorDone
from lowmem_aim.jobs.api import read_recipe
from lowmem_aim.jobs.merge import merge
from lowmem_aim.recipe.recipe import Recipe


@pytest.fixture
def folders(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """(the current folder, another one with a recipe and all that it names)."""
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
    for name in ("base", "math", "code"):
        tiny.perturbed(llama / name, there / name, scale=0.0)
    (there / "texts.txt").write_text("the quick brown fox jumps over the lazy dog\n\n" * 3)
    write(there / "r.yml")
    monkeypatch.chdir(here)
    return here, there


def write(file: Path, **changed: object) -> None:
    models = [{"model": name, "parameters": {"weight": 0.5}} for name in ("./math", "code")]
    table = {"merge_method": "ties", "base_model": "./base", "models": models, "aim": {"calibration": "texts.txt"}}
    file.write_text(yaml.safe_dump(table | changed))


def paths(recipe: Recipe) -> list[str]:
    assert recipe.base is not None
    assert recipe.aim is not None
    return [recipe.base, *(model.reference for model in recipe.models), recipe.aim.calibration]


def test_what_the_current_folder_lacks_is_looked_for_beside_the_recipe(folders: tuple[Path, Path], run: Run) -> None:
    here, there = folders
    assert paths(read_recipe("../there/r.yml")) == [
        f"../there/{name}" for name in ("base", "math", "code", "texts.txt")
    ]
    done = run("plan", "../there/r.yml", "out", "--no-measure")
    assert done.code == 0, done.err
    (here / "r.yml").write_text((there / "r.yml").read_text())
    os.chdir(there)
    assert paths(read_recipe("r.yml")) == ["./base", "./math", "code", "texts.txt"]  # as mergekit does


def test_the_current_folder_comes_first_where_both_are_the_same(folders: tuple[Path, Path]) -> None:
    here, there = folders
    for name in ("base", "math", "code", "texts.txt"):
        (here / name).symlink_to(there / name)
    assert paths(read_recipe("../there/r.yml")) == ["./base", "./math", "code", "texts.txt"]


def test_two_different_ones_are_an_error_that_names_both(folders: tuple[Path, Path], run: Run) -> None:
    here, there = folders
    (here / "math").mkdir()
    (here / "texts.txt").write_text("another text")
    done = run("merge", "../there/r.yml", "out")
    assert done.code == 2
    for name in ("math", "texts.txt"):
        assert f"may be `{here / name}` or `{there / name}`" in done.err
    assert "r.yml:" in done.err


def test_what_is_nowhere_is_an_error_that_says_where_it_was_looked_for(folders: tuple[Path, Path], run: Run) -> None:
    here, there = folders
    write(there / "r.yml", base_model="./nowhere", aim={"calibration": "nothing.txt"})
    for command in ("plan", "merge"):
        done = run(command, "../there/r.yml", "out")
        assert done.code == 3
        looked = f" (looked in `{here}` and `{there}`)"
        assert f"there is no model folder `./nowhere`{looked}" in done.err
        assert f"there is no calibration file `nothing.txt`{looked}" in done.err
    write(there / "r.yml", aim={"calibration": "nothing.txt"})
    assert f"`nothing.txt`{looked}" in run("merge", "../there/r.yml", "out").err
    write(there / "r.yml", base_model="owner/name")
    done = run("merge", "../there/r.yml", "out")
    assert (done.code, looked in done.err) == (9, True)


def test_flags_and_mappings_have_the_current_folder_alone(folders: tuple[Path, Path], run: Run) -> None:
    here, there = folders
    done = run("merge", "../there/r.yml", "out", "--base", "./base")
    assert done.code == 3
    assert f"there is no model folder `./base` (looked in `{here}`)\n" in done.err
    table = yaml.safe_load((there / "r.yml").read_text())
    assert read_recipe(table).base == "./base"
    listed = [{"model": "./base"}, *table["models"]]  # the base, however it is written, is no expert
    write(there / "r.yml", models=listed)
    done = run("plan", "../there/r.yml", "out", "--base", "../there/base", "--weight", "1", "--weight", "2", "-q")
    assert "values for" not in done.err


def test_a_local_folder_wins_over_a_hub_id_and_the_plan_says_so(folders: tuple[Path, Path], run: Run) -> None:
    there = folders[1]
    (there / "owner").mkdir()
    (there / "math").rename(there / "owner" / "name")
    models = [{"model": "owner/name", "parameters": {"weight": 1}}]
    write(there / "r.yml", models=models)
    done = run("plan", "../there/r.yml", "out", "--no-measure")
    assert done.code == 0, done.err
    assert "so the Hub is not asked for these names: `owner/name`" in " ".join(done.out.split())


def test_a_merge_that_was_stopped_goes_on_from_another_folder(
    folders: tuple[Path, Path], tmp_path: Path, each_tensor: None
) -> None:
    stop(read_recipe("../there/r.yml"), tmp_path / "out", 5)
    os.chdir(folders[1])
    kept: list[TensorDone] = []
    merge(read_recipe("r.yml"), tmp_path / "out", SHARDS, lambda e: kept.append(e) if is_earlier(e) else None)
    assert kept
    merge(read_recipe("r.yml"), tmp_path / "whole", SHARDS)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def is_earlier(event: Event) -> bool:
    return isinstance(event, TensorDone) and event.earlier


def test_a_tilde_is_no_relative_path(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    there = folders[1]
    monkeypatch.setenv("HOME", str(there))
    write(there / "r.yml", base_model="~/base")
    assert read_recipe(there / "r.yml").base == "~/base"
