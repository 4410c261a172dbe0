"""Recipes with `slices`: which layers of which model the output has, with which parameters, and that it is a model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import references as ref
import tiny
import torch
import yaml
from conftest import Place, Ran, Run
from long_cases import others_long
from merge_cases import digests, tensors_in
from stopping import stop
from transformers import AutoModelForCausalLM

from lowmem_aim.errors import LowmemAimError
from lowmem_aim.jobs.merge import merge
from lowmem_aim.recipe.from_flags import applied
from lowmem_aim.recipe.reader import read_recipe
from lowmem_aim.recipe.recipe import Recipe
from lowmem_aim.recipe.yaml_tree import tree_of
from lowmem_aim.relaxing.activations import Activations
from lowmem_aim.system.options import Options

# Layers by their names; of different types; a dense one before those with experts; weights stored (in, out).
STACKED = others_long(
    {name: {} for name in ("llama", "gemma3_text", "deepseek_v3", "gpt2", "qwen2", "gpt_oss", "mixtral", "cohere2")},
    ("llama", "gemma3_text", "deepseek_v3", "gpt2"),
)


def source(model: Path, first: int, end: int, **parameters: Any) -> dict[str, Any]:
    own = {"parameters": parameters} if parameters else {}
    return {"model": str(model), "layer_range": [first, end], **own}


def recipe(method: str, slices: list[list[dict[str, Any]] | dict[str, Any]], **keys: Any) -> Recipe:
    """A recipe of slices; each is a list of sources, or a table that has more keys."""
    tables = [part if isinstance(part, dict) else {"sources": part} for part in slices]
    return read_recipe(tree_of({"merge_method": method, "slices": tables, **keys}, "recipe"))


def layer(tensors: dict[str, torch.Tensor], number: int) -> dict[str, torch.Tensor]:
    """The tensors of one layer, by what follows its number."""
    split = {name: re.search(r"\.(\d+)\.(.*)", name) for name in tensors}
    return {found[2]: tensors[name] for name, found in split.items() if found and int(found[1]) == number}


@pytest.mark.parametrize("architecture", STACKED)
def test_a_stack_of_layers_is_a_model_with_just_these_layers(architecture: str, tmp_path: Path) -> None:
    base = tiny.build(architecture, tmp_path / "base")
    other = tiny.perturbed(base, tmp_path / "other")
    stacked = merge(recipe("passthrough", [[source(base, 0, 2)], [source(other, 1, 3)]]), tmp_path / "out")
    mine, theirs, found = tensors_in(base), tensors_in(other), tensors_in(stacked)
    for number, (model, own) in enumerate([(mine, 0), (mine, 1), (theirs, 1), (theirs, 2)]):
        expected = layer(model, own)
        assert expected
        assert layer(found, number).keys() == expected.keys()
        assert all(torch.equal(layer(found, number)[name], expected[name]) for name in expected)
    loaded, info = AutoModelForCausalLM.from_pretrained(stacked, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded(tiny.sequences((9,))[0][None]).logits.isfinite().all()


def test_what_the_config_says_of_each_layer_follows_the_layers(tmp_path: Path) -> None:
    base = tiny.build("gemma3_text", tmp_path / "base")
    types = json.loads((base / "config.json").read_text())["layer_types"]
    assert len(set(types)) == 2
    out = merge(recipe("passthrough", [[source(base, 1, 3)], [source(base, 1, 2)]]), tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    assert (config["num_hidden_layers"], config["layer_types"]) == (3, [types[1], types[2], types[1]])


def test_tensors_around_the_layers_come_from_the_first_and_the_last_slice(llama: Path, tmp_path: Path) -> None:
    slices = [[source(llama / "math", 0, 1)], [source(llama / "code", 1, 3)]]
    found = tensors_in(merge(recipe("passthrough", slices), tmp_path / "out"))
    math, code = tensors_in(llama / "math"), tensors_in(llama / "code")
    assert torch.equal(found["model.embed_tokens.weight"], math["model.embed_tokens.weight"])
    assert torch.equal(found["model.norm.weight"], code["model.norm.weight"])
    assert torch.equal(found["lm_head.weight"], code["lm_head.weight"])


def test_each_model_gives_its_own_layers_to_a_merge(llama: Path, tmp_path: Path) -> None:
    sources = [source(llama / "math", 0, 2, weight=0.5), source(llama / "base", 1, 3), source(llama / "code", 0, 2)]
    slices = [{"sources": sources, "parameters": {"weight": 0.25}}]
    made = recipe("task_arithmetic", slices, base_model=str(llama / "base"), dtype="float32")
    found = tensors_in(merge(made, tmp_path / "out"))
    base, math, code = (tensors_in(llama / name) for name in ("base", "math", "code"))
    for number in range(2):
        for name, value in layer(found, number).items():
            start = layer(base, number + 1)[name].double()
            experts = [(0.5, layer(math, number)[name]), (0.25, layer(code, number)[name])]
            expected = start + sum(weight * (expert.double() - start) for weight, expert in experts)
            assert (value.double() - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_a_gradient_runs_within_each_slice(llama: Path, tmp_path: Path) -> None:
    slices = [
        {"sources": [source(llama / "math", 0, 1)], "parameters": {"scale": [2.0, 4.0]}},
        [source(llama / "math", 0, 3)],
    ]
    made = recipe("passthrough", slices, parameters={"scale": [{"filter": "norm", "value": [8, 1]}, {"value": [1, 3]}]})
    found, math = tensors_in(merge(made, tmp_path / "out")), tensors_in(llama / "math")
    expected = [(0, 4.0), (0, 1.0), (1, 2.0), (2, 3.0)]  # a slice of one layer takes the end of the gradient
    for number, (own, scale) in enumerate(expected):
        name = "self_attn.q_proj.weight"
        assert torch.equal(layer(found, number)[name], layer(math, own)[name] * scale)
    assert torch.equal(found["model.embed_tokens.weight"], math["model.embed_tokens.weight"] * 2.0)
    assert torch.equal(found["model.norm.weight"], math["model.norm.weight"] * 8.0)


def test_filters_of_a_models_parameter_see_the_layer_it_comes_from(llama: Path, tmp_path: Path) -> None:
    scale = [{"filter": "layers.2.", "value": 2.0}, {"filter": "layers.0.", "value": 4.0}]
    slices = [
        [source(llama / "math", 1, 3, scale=scale)],
        [source(llama / "math", 0, 1)],
        [source(llama / "math", 2, 3)],
    ]
    made = recipe("passthrough", slices, parameters={"scale": [{"filter": "layers.0.", "value": 8.0}]})
    found, math = tensors_in(merge(made, tmp_path / "out")), tensors_in(llama / "math")
    for number, (own, factor) in enumerate([(1, 1.0), (2, 2.0), (0, 8.0), (2, 1.0)]):
        for name, value in layer(found, number).items():
            assert torch.equal(value, layer(math, own)[name] * factor)


def test_filters_of_a_whole_merges_parameter_see_the_outputs_names(llama: Path, tmp_path: Path) -> None:
    slices = [[source(llama / name, first, first + 1) for name in ("math", "code")] for first in (2, 0)]
    t = [{"filter": "layers.0.", "value": 0.0}, {"value": 1.0}]
    found = tensors_in(
        merge(recipe("slerp", slices, parameters={"t": t}, base_model=str(llama / "math")), tmp_path / "out")
    )
    for number, (own, expert) in enumerate([(2, "math"), (0, "code")]):
        for name, value in layer(found, number).items():
            expected = layer(tensors_in(llama / expert), own)[name]
            assert (value - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_the_base_of_a_slice_may_be_its_own(llama: Path, tmp_path: Path) -> None:
    slices = [{"sources": [source(llama / "math", 0, 3, weight=0.5)], "base_model": str(llama / "code")}]
    made = recipe("task_arithmetic", slices, base_model=str(llama / "base"), dtype="float32")
    found = tensors_in(merge(made, tmp_path / "out"))
    math, code = tensors_in(llama / "math"), tensors_in(llama / "code")
    for name, value in found.items():
        expected = (math[name].double() + code[name].double()) / 2
        assert (value.double() - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_one_module_is_the_whole_model(llama: Path, tmp_path: Path) -> None:
    models = [{"model": str(llama / name), "parameters": {"weight": 1}} for name in ("math", "code")]
    plain = merge(read_recipe(tree_of({"merge_method": "linear", "models": models}, "recipe")), tmp_path / "plain")
    module = {"default": {"models": [{"model": model["model"]} for model in models], "parameters": {"weight": 1}}}
    made = read_recipe(tree_of({"merge_method": "linear", "modules": module}, "recipe"))
    assert digests(merge(made, tmp_path / "out"))["model.safetensors"] == digests(plain)["model.safetensors"]


def test_a_layer_is_relaxed_by_the_activations_of_the_layer_it_comes_from(
    llama: Path, measured: Path, tmp_path: Path
) -> None:
    slices = [[source(llama / "math", 0, 2)], [source(llama / "code", 1, 3)]]
    aim = {"omega": 0.4, "calibration": str(measured)}
    made = recipe("passthrough", slices, base_model=str(llama / "base"), aim=aim, dtype="float32")
    found = tensors_in(merge(made, tmp_path / "out"))
    base, math, code = (tensors_in(llama / name) for name in ("base", "math", "code"))
    means = Activations.load(measured).means
    for number, (model, own) in enumerate([(math, 0), (math, 1), (code, 1), (code, 2)]):
        for name, value in layer(found, number).items():
            start = layer(base, own)[name].double()
            expected = ref.aim(start, layer(model, own)[name].double(), means[f"model.layers.{own}.{name}"], 0.4)
            assert (value.double() - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_slices_stopped_or_in_small_pieces_give_the_same_bytes(llama: Path, tmp_path: Path) -> None:
    slices = [[source(llama / "math", 0, 2), source(llama / "code", 1, 3)], [source(llama / "code", 1, 3)]]
    made = recipe("ties", slices, base_model=str(llama / "base"), parameters={"weight": 0.5, "density": 0.4})
    whole = digests(merge(made, tmp_path / "whole"))
    assert digests(merge(made, tmp_path / "rows", Options(slice_rows=1))) == whole
    stop(made, tmp_path / "stopped", 9, Options())
    assert digests(merge(made, tmp_path / "stopped")) == whole


def test_the_recipe_of_an_output_makes_it_again(llama: Path, tmp_path: Path, run: Run) -> None:
    slices: list[Any] = [
        {
            "sources": [source(llama / "math", 0, 2, density=0.7), source(llama / "base", 1, 3)],
            "parameters": {"weight": 1},
        },
        [source(llama / "code", 0, 3)],
    ]
    made = recipe("ties", slices, base_model=str(llama / "base"), parameters={"weight": 0.5, "density": [0.2, 0.6]})
    out = merge(made, tmp_path / "out")
    table = yaml.safe_load((out / "mergekit_config.yml").read_text())
    (llama / "again.yml").write_text(yaml.safe_dump(table))
    assert run("merge", llama / "again.yml", tmp_path / "again").code == 0
    assert digests(tmp_path / "again")["model.safetensors"] == digests(out)["model.safetensors"]


@pytest.mark.parametrize(
    ("slices", "told"),
    [
        ([[("math", 0, 4)], [("code", 2, 9)]], ["ends at 4, but `math` has 3 layers", "ends at 9, but `code` has 3"]),
        ([[("math", 0, 2), ("code", 0, 1)]], ["must have the same number of layers; here they take 0 to 2, 0 to 1"]),
        ([[("math", 2, 2)]], ["`layer_range` must be two rising whole numbers"]),
        ([[("math", -1, 2)]], ["`layer_range` must be two rising whole numbers"]),
        ([[("math", 0.5, 2)]], ["`layer_range` must be two rising whole numbers"]),
    ],
)
def test_wrong_layers_are_refused_before_work(
    slices: list[list[tuple[str, Any, Any]]], told: list[str], llama: Path, tmp_path: Path
) -> None:
    parts: list[Any] = [[source(llama / name, first, end) for name, first, end in part] for part in slices]
    with pytest.raises(LowmemAimError) as caught:
        merge(recipe("linear", parts, parameters={"weight": 1}), tmp_path / "out")
    assert len(caught.value.problems) == len(told), caught.value.problems
    for problem, text in zip(caught.value.problems, told, strict=True):
        assert text in problem
    assert caught.value.exit_code == 2
    assert not (tmp_path / "out").exists()


def test_a_slice_with_a_base_of_its_own_is_not_relaxed_towards_another(llama: Path, measured: Path) -> None:
    slices = [{"sources": [source(llama / "math", 0, 3)], "base_model": str(llama / "code")}]
    with pytest.raises(LowmemAimError, match="this slice has another") as caught:
        recipe(
            "task_arithmetic",
            slices,
            base_model=str(llama / "base"),
            parameters={"weight": 1},
            aim={"calibration": str(measured)},
        )
    assert caught.value.exit_code == 2


def test_flags_for_single_models_are_refused(llama: Path) -> None:
    tree = tree_of({"merge_method": "linear", "slices": [{"sources": [source(llama / "math", 0, 3)]}]}, "recipe")
    with pytest.raises(LowmemAimError, match="--weight is for recipes that list `models`, and this one has `slices`"):
        applied(tree, {"weight": ("0.5",)})
    assert read_recipe(applied(tree, {"parameter": ("weight=0.5",)})).parameters["weight"].value == 0.5


def test_a_model_is_looked_for_although_its_layers_are_wrong(place: Place) -> None:
    sources = [{"model": str(place.folder / "nowhere"), "layer_range": [3, 2]}]
    table = {"merge_method": "passthrough", "slices": [{"sources": sources}], "tokenizer_source": "unoin"}
    (place.folder / "recipe.yml").write_text(yaml.safe_dump(table))
    done = place.run("merge", place.folder / "recipe.yml", place.out)
    place.refused(done, 2, "`layer_range` must be", "there is no model folder", "did you mean `union`?")


def test_a_slice_of_which_no_model_is_there_is_told_in_one_line(llama: Path, place: Place) -> None:
    def run(command: str, second: Path) -> Ran:
        listed = [{"sources": [source(model, 0, 2)]} for model in (llama / "math", second)]
        (place.folder / "recipe.yml").write_text(yaml.safe_dump({"merge_method": "passthrough", "slices": listed}))
        return place.run(command, place.folder / "recipe.yml", place.out)

    assert run("plan", llama / "math").code == 0  # the cache then knows the first model, which is compared at once
    for command in ("plan", "merge"):
        done = run(command, place.folder / "nowhere")
        place.refused(done, 3, "there is no model folder")
        assert done.err.count("error: ") == 1


def test_layers_that_make_no_model_are_refused_before_work(tmp_path: Path) -> None:
    base = tiny.build("deepseek_v3", tmp_path / "base")
    dense_last = recipe("passthrough", [[source(base, 1, 3)], [source(base, 0, 1)]])
    with pytest.raises(LowmemAimError, match="the output"):
        merge(dense_last, tmp_path / "out")
    assert not (tmp_path / "out").exists()
