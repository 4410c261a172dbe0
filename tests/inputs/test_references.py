"""References to models: a model and an adapter in one text or in mergekit's long form, each part found by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lowmem_aim.errors import RecipeError
from lowmem_aim.recipe.reader import read_recipe
from lowmem_aim.recipe.recipe import Recipe
from lowmem_aim.recipe.references import parsed, same_reference
from lowmem_aim.recipe.yaml_tree import parse, tree_of


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(model: Any) -> Recipe:
    return read_recipe(
        tree_of(
            {"merge_method": "model_stock", "base_model": "b", "models": [{"model": m} for m in (model, "x", "y")]}, "r"
        )
    )


def reference(model: Any) -> str:
    return read(model).models[0].reference


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("owner/name", ("owner/name",)),
        ("owner/name@main+me/lora@v1.0", ("owner/name@main", "me/lora@v1.0")),
        ("base + lora", ("base", "lora")),
        ("./c++ model", ("./c++ model",)),  # a folder of that name
        ("./c++ model+lora", ("./c++ model", "lora")),
        ("base+a+b", ("base", "a+b")),  # a folder `a+b`
        ("base+x+y", ("base", "x+y")),
        ("base+", ("base+",)),
        ("+lora", ("+lora",)),
    ],
)
def test_the_parts_of_a_text(text: str, parts: tuple[str, ...], here: Path) -> None:
    for name in ("c++ model", "a+b"):
        (here / name).mkdir()
    assert parsed(text).parts == parts
    assert parsed("+".join(parts)).parts == parts  # what a recipe keeps is read as the same


@pytest.mark.parametrize(
    ("long", "text"),
    [
        ({"model": {"path": "o/m", "revision": "r"}, "lora": {"path": "o/l", "revision": None}}, "o/m@r+o/l"),
        ({"model": "o/m@r", "lora": None}, "o/m@r"),
        ({"model": {"path": "o/m"}, "lora": "o/l@2"}, "o/m+o/l@2"),
        ({"path": "o/m", "revision": "r"}, "o/m@r"),
        ({"path": "o/m"}, "o/m"),
    ],
)
def test_mergekits_long_form_is_the_same_text(long: Any, text: str, here: Path) -> None:
    assert reference(long) == text


def test_an_override_of_the_architecture_is_told_and_not_used(here: Path) -> None:
    recipe = read({"model": {"path": "o/m"}, "override_architecture": "LlamaForCausalLM"})
    assert recipe.models[0].reference == "o/m"
    assert any("`override_architecture` is not used" in text for text in recipe.notices)


@pytest.mark.parametrize(
    ("written", "text"),
    [
        ({"model": {"path": "m", "revision": "main"}}, "m"),
        ("m@main", "m"),
        ("m@main+o/l@2", "m+o/l@2"),
        ("o/l@2+m@main", "o/l@2+m"),
    ],
)
def test_a_revision_of_a_folder_is_told_and_left_out(written: Any, text: str, here: Path) -> None:
    (here / "m").mkdir()
    recipe = read(written)
    assert recipe.models[0].reference == text
    assert any("its revision says nothing" in notice for notice in recipe.notices)


def test_a_folder_whose_name_holds_an_at_sign_wins(here: Path) -> None:
    for name in ("m", "m@main"):
        (here / name).mkdir()
    assert reference("m@main") == "m@main"


@pytest.mark.parametrize(
    ("long", "problem"),
    [
        ({"lora": "o/l"}, "unknown key `lora`"),
        ({"model": None, "lora": "o/l"}, "`model` names no model"),
        ({"model": {"revision": "r"}}, "`model: model` names no `path`"),
        ({"model": 3}, "`model: model` must be text"),
        ({"model": "o/m", "loras": "o/l"}, "unknown key `loras`; did you mean `lora`?"),
    ],
)
def test_a_wrong_long_form_is_a_problem_with_its_place(long: Any, problem: str, here: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        read(long)
    assert any(problem in text for text in caught.value.problems), caught.value.problems


def test_both_parts_are_looked_for_beside_the_recipe(here: Path) -> None:
    for name in ("sub/base", "sub/lora", "sub/a+b"):
        (here / name).mkdir(parents=True)
    models = ", ".join(f"{{model: {name}}}" for name in ("base+lora", "a+b", "a+b+base", "base+none"))
    text = f"{{merge_method: model_stock, base_model: b, models: [{models}]}}"
    recipe = read_recipe(parse(text, "sub/r.yml", "sub"))
    found = [model.reference for model in recipe.models]
    assert found == ["sub/base+sub/lora", "sub/a+b", "sub/a+b+sub/base", "sub/base+none"]
    assert recipe.looked("none")


def test_an_adapted_base_that_is_listed_too_is_no_expert(here: Path) -> None:
    for name in ("base", "lora", "math"):
        (here / name).mkdir()
    (here / "link").symlink_to("lora")
    assert same_reference("base+lora", "./base/+link")
    assert not same_reference("base+lora", "base+math")
    models = [{"model": {"model": "./base", "lora": "link"}}, {"model": "base", "parameters": {"weight": 1}}]
    table = {"merge_method": "task_arithmetic", "base_model": "base+lora", "models": models}
    assert [model.reference for model in read_recipe(tree_of(table, "r")).models] == ["base"]
