"""Tensors that a model lacks and can do without: the output has the base's, as they are, and the user is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from conftest import Place
from merge_cases import tensors_in
from transformers import MarianMTModel
from vocabularies import add_tokens

from lowmem_aim.errors import ModelError
from lowmem_aim.events import Event, Notice
from lowmem_aim.jobs.merge import merge
from lowmem_aim.recipe.reader import read_recipe
from lowmem_aim.recipe.yaml_tree import tree_of
from lowmem_aim.units import counted

SCORE, MTP, HEAD = "score.weight", "model.layers.1.mtp.weight", "lm_head.weight"


def give(folder: Path, *names: str, seed: int = 0) -> None:
    """Add tensors that transformers' Llama has no place for."""
    generator = torch.Generator().manual_seed(seed)
    tiny.edit_tensors(folder, lambda t: t.update({name: torch.randn(3, 32, generator=generator) for name in names}))


def reward(folder: Path) -> None:
    """Make a reward model of a causal one: a score in the head's place."""
    tiny.edit_config(folder, architectures=["LlamaForSequenceClassification"])
    tiny.edit_tensors(folder, lambda t: t.pop(HEAD))
    give(folder, SCORE, seed=7)


def merged(folder: Path, *names: str, **keys: Any) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The output of a linear merge of the models, or of what `keys` say instead, and the notices."""
    told: list[str] = []

    def on_event(event: Event) -> None:
        if isinstance(event, Notice):
            told.append(event.text)

    models = [{"model": str(folder / name), "parameters": {"weight": 0.25}} for name in names]
    table = {"merge_method": "linear", **({} if "slices" in keys else {"models": models}), **keys}
    out = merge(read_recipe(tree_of(table, "recipe")), folder / "out", emit=on_event)
    return tensors_in(out), told


def test_the_base_has_them_and_they_are_told_in_plan_and_merge(place: Place) -> None:
    give(place.folder / "base", SCORE, MTP)
    give(place.folder / "math", MTP, seed=1)
    for command in ("plan", "merge"):
        flags = ("--method", "ties", "--base", place.folder / "base", "--expert", place.folder / "math")
        done = place.run(command, place.out, *flags, "--expert", place.folder / "code")
        assert done.code == 0, done.err
        for label, number, example in (("math", 1, SCORE), ("code", 2, MTP)):
            told = f"`{label}` lacks {counted(number, 'tensor')} that it can do without, such as `{example}`"
            assert f"{told}: the output has those of `base`, as they are" in done.err
        assert "copied: some model lacks it" in done.out + done.err
    found, base = tensors_in(place.out), tensors_in(place.folder / "base")
    assert all(found[name].equal(base[name]) for name in (SCORE, MTP))


def test_what_all_models_have_is_merged(place: Place) -> None:
    for seed, name in enumerate(("base", "math")):
        give(place.folder / name, SCORE, seed=seed)
    found, told = merged(place.folder, "base", "math")
    base, math = (tensors_in(place.folder / name)[SCORE].double() for name in ("base", "math"))
    assert (found[SCORE].double() - (base + math) / 2).abs().max() < 1e-6
    assert not any("can do without" in text for text in told)


def test_they_have_the_dtype_of_the_output(place: Place) -> None:
    give(place.folder / "base", SCORE)
    found, _ = merged(place.folder, "base", "math", dtype="bfloat16")
    assert found[SCORE].equal(tensors_in(place.folder / "base")[SCORE].bfloat16())


@pytest.mark.parametrize("relaxation", ["aim", "acm"])
def test_they_are_not_relaxed(place: Place, relaxation: str) -> None:
    give(place.folder / "base", SCORE, MTP)
    (place.folder / "texts.txt").write_text("the quick brown fox jumps over the lazy dog\n\n" * 3)
    keys = {"base_model": str(place.folder / "base"), relaxation: {"calibration": str(place.folder / "texts.txt")}}
    found, _ = merged(place.folder, "math", "code", merge_method="task_arithmetic", **keys)
    base = tensors_in(place.folder / "base")
    assert all(found[name].equal(base[name]) for name in (SCORE, MTP))


def test_layers_of_slices_take_them_along(place: Place) -> None:
    give(place.folder / "base", MTP)
    sources = [{"model": str(place.folder / "base"), "layer_range": [1, 2]}]
    sources += [{"model": str(place.folder / "math"), "layer_range": [0, 1]}]
    for source in sources:
        source["parameters"] = {"weight": 1.0}
    found, told = merged(place.folder, slices=[{"sources": sources}])
    assert found["model.layers.0.mtp.weight"].equal(tensors_in(place.folder / "base")[MTP])
    assert any("`math` lacks 1 tensor" in text for text in told)


class TestRewardModels:
    @pytest.mark.parametrize("more", [{}, {"tokenizer_source": "union"}])
    def test_one_among_the_experts(self, place: Place, more: dict[str, Any]) -> None:
        """The base's output head is the output's, in the rows of the output's tokens."""
        reward(place.folder / "math")
        if more:
            tiny.edit_config(place.folder / "code", architectures=["LlamaForCausalLM"])
            add_tokens(place.folder / "code", ["<|tool|>"], padding=7, seed=2)
        found, told = merged(place.folder, "base", "math", "code", **more)
        base, code = (tensors_in(place.folder / name) for name in ("base", "code"))
        assert found[HEAD][:259].equal(base[HEAD][:259])
        assert any("`math` lacks 1 tensor that it can do without, such as `lm_head.weight`" in text for text in told)
        assert any("`math`: not merged: 1 tensor that `base` lacks" in text for text in told)
        if more:
            row = 259  # the only owner's
            assert found[HEAD][row].equal(code[HEAD][row])

    def test_one_as_the_base(self, place: Place) -> None:
        reward(place.folder / "base")
        found, _ = merged(
            place.folder, "math", "code", merge_method="task_arithmetic", base_model=str(place.folder / "base")
        )
        assert found[SCORE].equal(tensors_in(place.folder / "base")[SCORE])
        assert HEAD not in found

    def test_two_with_scores(self, place: Place) -> None:
        for name in ("base", "math"):
            reward(place.folder / name)
        found, told = merged(place.folder, "base", "math")
        score = tensors_in(place.folder / "base")[SCORE].double()
        assert (found[SCORE].double() - score).abs().max() < 1e-6
        assert not any("lacks" in text for text in told)


@pytest.mark.parametrize("name", [HEAD, "model.norm.weight", "model.layers.2.mlp.up_proj.weight"])
def test_what_the_model_needs_must_be_there(place: Place, name: str) -> None:
    tiny.edit_tensors(place.folder / "math", lambda t: t.pop(name))
    with pytest.raises(ModelError, match=f"`math` lacks the tensor `{name}`"):
        merged(place.folder, "base", "math")


def test_a_parameter_that_the_model_makes_itself_may_be_missing(tmp_path: Path) -> None:
    """Marian's positions are computed; some files hold them, and transformers has a parameter for them."""
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    settings = tiny.config("marian", d_model=32, decoder_start_token_id=258, **sizes)
    MarianMTModel(settings).save_pretrained(tmp_path / "base")
    tiny.perturbed(tmp_path / "base", tmp_path / "math")
    name = "model.encoder.embed_positions.weight"
    positions = torch.randn(settings.max_position_embeddings, 32)
    tiny.edit_tensors(tmp_path / "base", lambda t: t.update({name: positions}))
    found, told = merged(tmp_path, "base", "math")
    assert found[name].equal(positions)
    assert any(f"`math` lacks 1 tensor that it can do without, such as `{name}`" in text for text in told)
