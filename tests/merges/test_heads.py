"""Merges of models with tied heads and models with heads of their own: a tied model's head is its embedding."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from beside import pictured, text_model
from calibrating import activations_of
from conftest import Place
from long_cases import others_long
from merge_cases import digests, tensors_in
from stopping import SHARDS, stop
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from vocabularies import add_tokens

from lowmem_aim.errors import ModelError
from lowmem_aim.jobs.merge import merge
from lowmem_aim.jobs.plan import plan
from lowmem_aim.recipe.reader import read_recipe
from lowmem_aim.recipe.yaml_tree import tree_of
from lowmem_aim.relaxing.activations import Activations

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
MODELS = ("base", "math", "code")


def tie(*folders: Path) -> None:
    """Drop the heads; the configs say that they are tied."""
    for folder in folders:
        tiny.edit_config(folder, tie_word_embeddings=True)
        tiny.edit_tensors(folder, lambda t: t.pop(HEAD))


def doubled(place: Place, tied: tuple[str, ...]) -> Path:
    """Copies of the models, the tied ones as untied ones that store their embedding as the head, too."""
    twins = place.folder / "twins"
    for name in MODELS:
        shutil.copytree(place.folder / name, twins / name)
    for name in tied:
        tiny.edit_config(twins / name, tie_word_embeddings=False)
        tiny.edit_tensors(twins / name, lambda t: t.update({HEAD: t[EMBEDDING].clone()}))
    return twins


def merged(folder: Path, **keys: Any) -> Path:
    """The output of task arithmetic with `math` and `code`, or of what `keys` say instead."""
    models = [{"model": str(folder / name), "parameters": {"weight": 0.5}} for name in MODELS[1:]]
    table = {"merge_method": "task_arithmetic", "base_model": str(folder / "base"), "dtype": "float32"}
    table |= {} if "slices" in keys else {"models": models}
    return merge(read_recipe(tree_of(table | keys, "recipe")), folder / "out")


def with_head(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a model in float64, a tied one's head among them."""
    tensors = {name: value.double() for name, value in tensors_in(folder).items()}
    return {HEAD: tensors[EMBEDDING], **tensors}


def near(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return float((found.double() - expected).abs().max()) <= 1e-6 * float(expected.abs().max())


@pytest.mark.parametrize("tied", [("base",), ("math",), ("base", "code")])
def test_an_untied_model_makes_the_output_untied(place: Place, tied: tuple[str, ...]) -> None:
    tie(*(place.folder / name for name in tied))
    out = merged(place.folder)
    base, math, code = (with_head(place.folder / name) for name in MODELS)
    found = tensors_in(out)
    assert found.keys() == base.keys()
    for name, value in found.items():
        assert near(value, base[name] + 0.5 * (math[name] - base[name]) + 0.5 * (code[name] - base[name]))
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.lm_head.weight.equal(found[HEAD])
    assert not found[HEAD].equal(found[EMBEDDING])


def test_the_plan_and_the_merge_say_that_the_output_is_untied(place: Place) -> None:
    tie(place.folder / "base")
    flags = ("--method", "ties", "--base", place.folder / "base", "--expert", place.folder / "math")
    told = "`math` has an output head of its own (`tie_word_embeddings` is false), and so has the output: the head of "
    for command in ("plan", "merge"):
        done = place.run(command, place.out, *flags)
        assert done.code == 0, done.err
        assert told + "`base` is the embedding" in done.err
    plan = json.loads(place.run("plan", place.folder / "new", *flags, "--json").out.splitlines()[-1])
    assert [(model["tied"], model["parameters"]) for model in plan["survey"]["models"]] == [
        (tied, sum(value.numel() for value in tensors_in(place.folder / name).values()))
        for name, tied in (("base", True), ("math", False))
    ]


def test_an_untied_merge_is_resumed_to_the_same_bytes(place: Place, each_tensor: None) -> None:
    tie(place.folder / "base")
    models = [{"model": str(place.folder / name), "parameters": {"weight": 0.5, "density": 0.5}} for name in MODELS[1:]]
    table = {"merge_method": "ties", "base_model": str(place.folder / "base"), "models": models}
    job = read_recipe(tree_of(table, "recipe"))
    merge(job, place.folder / "whole", SHARDS)
    for tensors in (1, 11, 9):  # the embedding, and the head that is read from it, lie on both sides
        stop(job, place.out, tensors)
        assert not (place.out / "config.json").exists()
    merge(job, place.out, SHARDS)
    assert digests(place.out) == digests(place.folder / "whole")


def test_models_that_are_all_tied_stay_tied(place: Place) -> None:
    tie(*(place.folder / name for name in MODELS))
    out = merged(place.folder)
    assert HEAD not in tensors_in(out)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is True


def _sliced(place: Place) -> dict[str, Any]:
    def part(name: str, first: int, end: int) -> dict[str, Any]:
        return {"sources": [{"model": str(place.folder / name), "layer_range": [first, end]}]}

    return {"merge_method": "passthrough", "slices": [part("code", 0, 2), part("math", 1, 3)]}


def _with_aim(place: Place) -> dict[str, Any]:
    return {"aim": {"omega": 0.4, "calibration": str(place.folder / "texts.txt")}}


def _with_acm(place: Place) -> dict[str, Any]:
    return {"acm": {"calibration": str(place.folder / "texts.txt")}}


def _united(place: Place) -> dict[str, Any]:
    return {"tokenizer_source": "union"}


@pytest.mark.parametrize(
    ("keys", "tied"),
    [(_sliced, ("math",)), (_with_aim, ("base", "code")), (_with_acm, ("base",)), (_united, ("math", "base"))],
)
def test_a_tied_model_is_merged_as_one_that_stores_its_embedding_twice(
    place: Place, keys: Callable[[Place], dict[str, Any]], tied: tuple[str, ...]
) -> None:
    """In slices, with AIM's statistics of the base's head, with ACM's groups, and with another vocabulary."""
    (place.folder / "texts.txt").write_text("the quick brown fox jumps over the lazy dog\n\n" * 3)
    if keys is _united:
        add_tokens(place.folder / "math", ["<|im_start|>", "<|im_end|>"], seed=1)
    tie(*(place.folder / name for name in tied))
    twins = doubled(place, tied)
    shutil.copy(place.folder / "texts.txt", twins)
    found = tensors_in(merged(place.folder, **keys(place)))
    expected = tensors_in(merged(twins, **keys(Place(twins, place.run))))
    assert found.keys() == expected.keys()
    assert all(value.equal(expected[name]) for name, value in found.items())


@pytest.mark.parametrize("policy", ["relax", "keep"])
def test_aim_relaxes_the_head_by_its_inputs_in_the_base_and_not_the_embedding(place: Place, policy: str) -> None:
    tie(place.folder / "base")
    texts = place.folder / "texts.txt"
    texts.write_text("the quick brown fox jumps over the lazy dog\n\n" * 3)
    measured = activations_of(place.folder / "base", texts, place.folder / "activations.safetensors")
    found = tensors_in(merged(place.folder, aim={"omega": 0.3, "calibration": str(measured), "tied": policy}))
    base, math, code = (with_head(place.folder / name) for name in MODELS)
    a = Activations.load(measured).means[HEAD].double()
    plain = {name: 0.5 * (math[name] - base[name]) + 0.5 * (code[name] - base[name]) for name in (HEAD, EMBEDDING)}
    assert near(found[HEAD], base[HEAD] + plain[HEAD] * (1 - a / a.max() * (1 - 0.3)))
    assert near(found[EMBEDDING], base[EMBEDDING] + plain[EMBEDDING])


def test_activations_measured_for_an_untied_output_do_for_a_tied_one(place: Place) -> None:
    """The cache has them by the base's files: whether its head is its embedding is the merge's affair."""
    texts = place.folder / "texts.txt"
    texts.write_text("the quick brown fox jumps over the lazy dog\n\n" * 3)
    tie(place.folder / "base")
    merged(place.folder, aim={"omega": 0.0, "calibration": str(texts)})
    tie(place.folder / "math", place.folder / "code")
    shutil.rmtree(place.out)
    found = tensors_in(merged(place.folder, aim={"omega": 0.0, "calibration": str(texts)}))
    measured = activations_of(place.folder / "base", texts, place.folder / "activations.safetensors")
    base, math, code = (with_head(place.folder / name) for name in MODELS)
    a = Activations.load(measured).means[HEAD].double()
    delta = 0.5 * (math[EMBEDDING] - base[EMBEDDING]) + 0.5 * (code[EMBEDDING] - base[EMBEDDING])
    assert near(found[EMBEDDING], base[EMBEDDING] + delta * (1 - a / a.max()))


def test_relaxing_an_untied_model_towards_a_tied_base(place: Place) -> None:
    tie(place.folder / "base")
    command = ("relax", place.folder / "math", place.out, "--base", place.folder / "base", "--omega", 0)
    done = place.run(*command, "--calibration", "builtin", "--samples", 2)
    assert done.code == 0, done.err
    found, math = tensors_in(place.out), tensors_in(place.folder / "math")
    assert found[EMBEDDING].equal(math[EMBEDDING])
    assert not found[HEAD].equal(math[HEAD])


Made = tuple[Callable[..., Path], bool]  # a model, and whether its head is tied
BESIDE: dict[str, tuple[Made, Made]] = {  # base and expert
    "pictures tied, text not": ((pictured, True), (text_model, False)),
    "pictures not, text tied": ((pictured, False), (text_model, True)),
    "text tied, pictures not": ((text_model, True), (pictured, False)),
    "text not, pictures tied": ((text_model, False), (pictured, True)),
    "pictures tied, pictures not": ((pictured, True), (pictured, False)),
}


@pytest.mark.parametrize("kind", others_long(("llava", "qwen2_vl", "gemma3"), ("llava",)))
@pytest.mark.parametrize("case", others_long(BESIDE, ("pictures tied, text not", "text tied, pictures not")))
def test_a_text_model_beside_a_vision_language_model_counts_as_any_other(
    case: str, kind: str, tmp_path: Path, each_tensor: None
) -> None:
    """Their heads have other names. Killed and resumed, the output has the same bytes."""
    (make_base, base_tied), (make_expert, expert_tied) = BESIDE[case]
    start = make_base(kind, tmp_path / "base", tied=base_tied)
    expert = tiny.perturbed(make_expert(kind, tmp_path / "made", tied=expert_tied), tmp_path / "expert")
    models = [{"model": str(expert), "parameters": {"weight": 0.5}}]
    table = {"merge_method": "task_arithmetic", "base_model": str(start), "models": models}
    job = read_recipe(tree_of(table, "recipe"))
    merge(job, tmp_path / "whole", SHARDS)
    stop(job, tmp_path / "out", 13)
    merge(job, tmp_path / "out", SHARDS)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")

    survey = plan(job, tmp_path / "new", measure=False).survey
    assert [(model["tied"], model["parameters"]) for model in survey["models"]] == [
        (tied, sum(value.numel() for value in tensors_in(folder).values()))
        for tied, folder in ((base_tied, start), (expert_tied, expert))
    ]
    base, other = _with_plain_names(start), _with_plain_names(expert)
    found = _with_plain_names(tmp_path / "out")
    assert found.keys() == base.keys()
    assert found[HEAD].shape == found[EMBEDDING].shape
    assert not found[HEAD].equal(found[EMBEDDING])
    for name, value in found.items():
        assert near(value, (base[name] + other[name]) / 2 if name in other else base[name]), name
    auto = AutoModelForCausalLM if make_base is text_model else AutoModelForImageTextToText
    model, info = auto.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.get_output_embeddings().weight.double().equal(found[HEAD])


def _with_plain_names(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a model in float64, those of a language part named as in a text model, a tied head among them."""
    tensors = {n.removeprefix("language_model."): value.double() for n, value in tensors_in(folder).items()}
    return {HEAD: tensors[EMBEDDING], **tensors}


class TestStoredHeads:
    """Under a config that says tied."""

    def refused(self, place: Place, name: str) -> None:
        flags = ("--method", "ties", "--base", place.folder / "base", "--expert", place.folder / "math")
        for command in ("plan", "merge"):
            done = place.run(command, place.out, *flags)
            assert done.code == 3, done.err
            assert f"`{name}`: `{HEAD}` should be tied to `{EMBEDDING}`" in done.err

    def test_one_that_equals_its_embedding_in_another_dtype_is_dropped(self, place: Place) -> None:
        tie(*(place.folder / name for name in MODELS))
        narrow = lambda t: t.update({EMBEDDING: t[EMBEDDING].bfloat16().float()})  # noqa: E731
        repeat = lambda t: t.update({HEAD: t[EMBEDDING].bfloat16()})  # noqa: E731
        tiny.edit_tensors(place.folder / "base", narrow)
        tiny.edit_tensors(place.folder / "base", repeat)
        assert HEAD not in tensors_in(merged(place.folder))

    def test_one_that_differs_in_another_dtype_is_refused(self, place: Place) -> None:
        tie(*(place.folder / name for name in MODELS))
        tiny.edit_tensors(place.folder / "base", lambda t: t.update({HEAD: t[EMBEDDING].bfloat16()}))
        self.refused(place, "base")

    def test_one_that_repeats_its_embedding_is_its_embedding_in_an_untied_output(self, place: Place) -> None:
        tie(place.folder / "math")
        tiny.edit_tensors(place.folder / "math", lambda t: t.update({HEAD: t[EMBEDDING].clone()}))
        base, math, code = (with_head(place.folder / name) for name in MODELS)
        assert near(tensors_in(merged(place.folder))[HEAD], 0.5 * math[EMBEDDING] + 0.5 * code[HEAD])
        assert not near(base[HEAD], base[EMBEDDING])

    def test_one_that_differs_is_refused_beside_untied_models_too(self, place: Place) -> None:
        tiny.edit_config(place.folder / "math", tie_word_embeddings=True)
        self.refused(place, "math")

    def test_one_that_differs_is_refused_beside_an_untied_vision_language_model(self, tmp_path: Path) -> None:
        base = pictured("llava", tmp_path / "base")
        text = text_model("llava", tmp_path / "text", tied=True)
        tiny.edit_tensors(text, lambda t: t.update({HEAD: t[EMBEDDING] + 1}))
        table = {"merge_method": "linear", "base_model": str(base), "models": [{"model": str(text)}]}
        job = read_recipe(tree_of(table | {"parameters": {"weight": 1.0}}, "recipe"))
        with pytest.raises(ModelError, match=f"`text`: `{HEAD}` should be tied to `{EMBEDDING}`"):
            merge(job, tmp_path / "out")
