"""The points of a sweep: all combinations, families with their controls, and what is wrong told at once."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from lowmem_aim.errors import LowmemAimError, RecipeError
from lowmem_aim.recipe.points import Grid, Point, points_of
from lowmem_aim.recipe.reader import read_recipe
from lowmem_aim.recipe.written import written
from lowmem_aim.recipe.yaml_tree import parse

RECIPE = """
merge_method: ties
base_model: b
models:
  - {model: x, parameters: {weight: 1, density: 0.4}}
  - {model: y, parameters: {weight: 0.5}}
aim: {calibration: builtin, samples: 4}
"""


def points(grid: Grid, more: str = "", recipe: str = RECIPE) -> dict[str, Point]:
    return {point.name: point for point in points_of(parse(recipe + more, "r.yml"), grid)}


def problems(grid: Grid, recipe: str = RECIPE) -> LowmemAimError:
    with pytest.raises(LowmemAimError) as caught:
        points(grid, recipe=recipe)
    return caught.value


def test_every_combination_is_a_point_and_each_with_aim_has_its_control() -> None:
    found = points(Grid(["ties", "task_arithmetic"], ["density=0.3,0.5", "lambda=0.8"], "0,0.4"))
    relaxed = ("", "-omega-0", "-omega-0-uniform", "-omega-0.4", "-omega-0.4-uniform")
    families = ("ties-density-0.3", "ties-density-0.5", "task_arithmetic")  # which has no density
    assert list(found) == [family + end for family in families for end in relaxed]
    for name, point in found.items():
        assert name.startswith(point.family)
        assert point.is_control == name.endswith("uniform")
        assert point.recipe.parameters["lambda"].value == 0.8
    aim = found["ties-density-0.5-omega-0.4-uniform"].recipe.aim
    assert aim is not None
    assert (aim.omega.value, aim.control, aim.samples) == (0.4, "uniform", 4)
    assert found["ties-density-0.5"].recipe.aim is None


def test_swept_parameters_win_over_those_of_single_models() -> None:
    found = points(Grid([], ["density=0.3,0.5"]))
    assert [part.parameters.get("density") for part in found["ties-density-0.3"].recipe.models] == [None, None]
    assert found["ties-density-0.3"].recipe.parameters["density"].value == 0.3


def test_without_values_the_recipe_is_one_family() -> None:
    assert list(points(Grid())) == ["ties", "ties-aim", "ties-aim-uniform"]
    assert list(points(Grid(controls=False))) == ["ties", "ties-aim"]
    assert list(points(Grid(omegas="0.25,1"))) == ["ties", "ties-omega-0.25", "ties-omega-0.25-uniform"]
    assert list(points(Grid(), "acm: {calibration: builtin}")) == [
        "ties",
        "ties-acm",
        "ties-acm-aim",
        "ties-acm-aim-uniform",
    ]
    assert list(points(Grid(), recipe=RECIPE.replace("aim:", "# "))) == ["ties"]


def test_aim_comes_from_flags_where_the_recipe_has_none() -> None:
    grid = Grid(omegas="0.2", flags={"calibration": "builtin", "samples": 3})
    found = points(grid, recipe=RECIPE.replace("aim:", "# "))["ties-omega-0.2"].recipe.aim
    assert found is not None
    assert (found.calibration, found.samples) == ("builtin", 3)


@pytest.mark.parametrize(
    ("grid", "told"),
    [
        (Grid(["tise", "linaer"]), ["did you mean `ties`", "did you mean `linear`"]),
        (Grid([], ["densty=0.3", "lamda=1"]), ["did you mean `density`", "did you mean `lambda`"]),
        (Grid([], ["d", "weight=1,", "=3"]), ["`d` is not", "`weight=1,` is not", "`=3` is not"]),
        (Grid([], ["density=1", "density=0.5"]), ["`density` is given twice"]),
        (Grid([], ["density=0.3,7"], "0.2,4"), ["`density` must lie in [0, 1], not 7", "`aim.omega` must lie in"]),
        (Grid([], ["weight=" + ",".join(map(str, range(1001)))]), ["3003 points", "at most 1000"]),
    ],
)
def test_what_is_wrong_is_told_at_once(grid: Grid, told: list[str]) -> None:
    said = "\n".join(problems(grid).problems)
    for text in told:
        assert text in said


def test_a_recipe_with_stages_is_refused() -> None:
    error = problems(Grid(), RECIPE + "---\n" + RECIPE + "name: first\n")
    assert isinstance(error, RecipeError)
    assert error.hint == "merge the stages first"


def test_a_recipe_is_written_so_that_it_can_be_run_from_anywhere(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there / "b", there / "x", there / "y", there / "union"):
        folder.mkdir(parents=True)
    (there / "texts.txt").write_text("text")
    before = os.getcwd()
    try:
        os.chdir(here)
        text = RECIPE.replace("builtin", "texts.txt") + "tokenizer_source: union\n"
        [point, *_] = points_of(parse(text, "../there/r.yml", "../there"), Grid(omegas="0.4"))[1:]
        portable = written(point.tree)
        os.chdir(tmp_path)
        again = read_recipe(parse(portable, "elsewhere.yml"))
    finally:
        os.chdir(before)
    told = yaml.safe_load(portable)
    assert told["base_model"] == str(there / "b")
    assert [model["model"] for model in told["models"]] == [str(there / "x"), str(there / "y")]
    assert (told["aim"]["calibration"], told["tokenizer_source"]) == (str(there / "texts.txt"), "union")
    assert "acm" not in told
    assert point.recipe.aim is not None
    assert again.aim == replace(point.recipe.aim, calibration=str(there / "texts.txt"))
