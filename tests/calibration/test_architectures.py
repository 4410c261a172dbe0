"""AIM and ACM where an architecture is not like the others: no head, shared blocks, fused experts, towers, no heads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import shrinking
import tiny
import torch
from long_cases import others_long
from safetensors.torch import load_file
from small_merges import TEXTS, from_config, merged_and_compared
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

import lowmem_aim
from lowmem_aim.blocks.embeddings import EmbeddingRows
from lowmem_aim.errors import ModelError
from lowmem_aim.events import Event, Notice
from lowmem_aim.measuring.mean_activations import mean_activations
from lowmem_aim.models.checkpoint import Checkpoint
from lowmem_aim.models.meta_model import find_blocks, load_meta_model
from lowmem_aim.system.options import Options
from lowmem_aim.units import counted

QUICK = Options(use_cache=False)


def texts_in(folder: Path) -> str:
    file = folder / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return str(file)


def recipe_of(folder: Path, **tables: Any) -> dict[str, Any]:
    """Task arithmetic of `base` and `expert` in a folder."""
    return {
        "merge_method": "task_arithmetic",
        "base_model": str(folder / "base"),
        "models": [{"model": str(folder / "expert"), "parameters": {"weight": 1.0}}],
        **tables,
    }


def built(model_type: str, folder: Path) -> Path:
    """A tiny random model in `folder`/base, and an expert of it beside it; returns `folder`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = from_config(shrinking.shrunk_config(model_type))
        tiny.spread(model)
    model.save_pretrained(folder / "base")
    tiny.tokenizer().save_pretrained(folder / "base")
    tiny.perturbed(folder / "base", folder / "expert")
    return folder


def meta(model_type: str) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(shrinking.shrunk_config(model_type))


# --- no output head -------------------------------------------------------------------------------------------------


def reward_model(tensors: dict[str, Tensor]) -> None:
    tensors.pop("lm_head.weight")
    tensors["score.weight"] = torch.randn(1, 32)


def saved_by_auto_model(tensors: dict[str, Tensor]) -> None:
    tensors.pop("lm_head.weight")
    for name in list(tensors):
        tensors[name.removeprefix("model.")] = tensors.pop(name)


@pytest.fixture(params=[reward_model, saved_by_auto_model], ids=lambda change: change.__name__)
def headless(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    tiny.build("llama", tmp_path / "base")
    tiny.edit_tensors(tmp_path / "base", request.param)
    tiny.perturbed(tmp_path / "base", tmp_path / "expert")
    return tmp_path


def test_a_model_without_an_output_head_is_merged_with_aim_and_acm(headless: Path) -> None:
    texts = texts_in(headless)
    recipe = recipe_of(headless, aim={"calibration": texts}, acm={"calibration": texts})
    assert lowmem_aim.plan(recipe, headless / "out", QUICK, measure=False).problems == ()
    merged = load_file(lowmem_aim.merge(recipe, headless / "out", QUICK) / "model.safetensors")
    expert, base = (load_file(headless / name / "model.safetensors") for name in ("expert", "base"))
    assert merged.keys() == base.keys()
    for name in (name for name in base if "layers" in name):
        whole, left = ((tensors[name] - base[name]).abs().sum() for tensors in (expert, merged))
        assert 0 < left < 0.9 * whole, name  # ACM takes at most half, AIM some of the rest


def test_a_model_without_an_output_head_is_relaxed_and_calibrated(headless: Path) -> None:
    aim = {"calibration": texts_in(headless)}
    out = lowmem_aim.relax(headless / "expert", headless / "base", headless / "out", aim=aim, options=QUICK)
    assert load_file(out / "model.safetensors").keys() == load_file(headless / "base" / "model.safetensors").keys()
    means = load_file(lowmem_aim.calibrate(headless / "base", headless / "means.safetensors", aim, options=QUICK))
    assert len(means) == tiny.LAYERS * 9 + 1  # all but embedding and head
    given = recipe_of(headless, aim={"calibration": str(headless / "means.safetensors")})
    lowmem_aim.merge(given, headless / "again", QUICK)


# --- against the plain computation ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "relaxed"),
    [
        ("zamba2", 36),  # blocks share a transformer: the mean over all its calls
        ("dbrx", 26),  # experts one after another in a matrix
        ("gemma4", 52),  # indexes its embedding's weight
        pytest.param("zamba", 28, marks=pytest.mark.long),
        pytest.param("whisper", 26, marks=pytest.mark.long),  # slices its positions
        pytest.param("longcat_flash", 110, marks=pytest.mark.long),  # half as many blocks as layers
        pytest.param("hrm_text", 25, marks=pytest.mark.long),  # two lists of blocks, called in turns
    ],
)
def test_a_merge_with_aim_is_the_plain_computation(model_type: str, relaxed: int, tmp_path: Path) -> None:
    found = merged_and_compared(model_type, tmp_path)
    assert found.kind in ("right", "notice"), found.text
    assert found.text.startswith(f"{relaxed} of "), found.text


@pytest.mark.parametrize("model_type", others_long(["mamba", "mamba2", "falcon_mamba", "rwkv", "xlstm"], ["mamba"]))
def test_models_without_attention_heads_are_planned_and_calibrated(model_type: str, tmp_path: Path) -> None:
    folder = built(model_type, tmp_path)
    recipe = recipe_of(folder, aim={"calibration": texts_in(folder)})
    assert lowmem_aim.plan(recipe, folder / "out", QUICK, measure=False).problems == ()
    with Checkpoint.open(folder / "base") as base:
        found = mean_activations(base, load_meta_model(base), tiny.sequences((20,)))
    assert len(found.means) > shrinking.LAYERS


# --- what is not relaxed is told ------------------------------------------------------------------------------------


def test_weights_that_text_does_not_reach_are_told_with_their_number_by_plan_and_merge(tmp_path: Path) -> None:
    recipe = recipe_of(built("gemma3", tmp_path), aim={"calibration": texts_in(tmp_path)})
    events: list[Event] = []
    forecast = lowmem_aim.plan(recipe, tmp_path / "out", QUICK, measure=False)
    lowmem_aim.merge(recipe, tmp_path / "out", QUICK, events.append)
    tower = [
        name
        for name, value in load_file(tmp_path / "base" / "model.safetensors").items()
        if ("vision" in name or "multi_modal" in name) and name.endswith("weight") and value.dim() < 3
    ]
    unseen = [name for name in tower if "embedding" not in name]
    assert len(unseen) > 30
    notes = [note for note in forecast.notes if "AIM leaves" in note]
    told = [event.text for event in events if isinstance(event, Notice) and "AIM leaves" in event.text]
    for text in (*notes, *told):
        assert f"AIM leaves {counted(len(unseen), 'weight')}" in text
    assert (len(notes), len(told)) == (1, 1)


@pytest.mark.parametrize("model_type", ["jamba", "bart"])
def test_modules_that_are_not_called_are_not_taken_for_experts(model_type: str, tmp_path: Path) -> None:
    events: list[Event] = []
    folder = built(model_type, tmp_path)
    settings = {"calibration": texts_in(folder)}
    lowmem_aim.calibrate(folder / "base", folder / "means.safetensors", settings, options=QUICK, on_event=events.append)
    told = [event.text for event in events if isinstance(event, Notice)]
    assert any("AIM leaves" in text and "not seen" in text for text in told)
    if model_type == "bart":
        assert not any("expert" in text for text in told)


# --- finding the blocks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "path", "blocks"),
    [
        ("llama", "model.layers", 3),
        ("gemma3", "model.language_model.layers", 3),  # whose vision tower has as many
        ("longcat_flash", "model.layers", 3),  # half of `num_hidden_layers`
        ("hrm_text", "model.", 6),
        ("biogpt", "biogpt.layers", 3),  # declares nothing
        ("xlnet", "transformer.layer", 3),
        ("ctrl", "transformer.h", 3),
        ("bart", "model.decoder.layers", 3),
    ],
)
def test_the_blocks_are_those_that_the_hidden_state_passes(model_type: str, path: str, blocks: int) -> None:
    found = find_blocks(meta(model_type))
    assert len(found) == blocks
    assert all(name.startswith(path) for name, _ in found)


def test_a_model_without_a_list_of_blocks_is_refused_by_plan_and_merge_with_a_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowmem_aim.models.meta_model.find_blocks", lambda model: [])
    tiny.build("llama", tmp_path / "base")
    tiny.perturbed(tmp_path / "base", tmp_path / "expert")
    recipe = recipe_of(tmp_path, aim={"calibration": texts_in(tmp_path)})
    forecast = lowmem_aim.plan(recipe, tmp_path / "out", QUICK, measure=False)
    assert forecast.exit_code == 3
    with pytest.raises(ModelError, match="cannot be run block by block") as raised:
        lowmem_aim.merge(recipe, tmp_path / "out", QUICK)
    assert "runs no model" in raised.value.hint
    assert str(raised.value) in forecast.problems
    lowmem_aim.merge(recipe_of(tmp_path), tmp_path / "plain", QUICK)


# --- a forward that fails -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", others_long(["LlamaMLP", "LlamaRMSNorm", "LlamaModel"], ["LlamaMLP"]))
@pytest.mark.parametrize("table", ["aim", "acm"])
def test_a_base_whose_forward_raises_is_a_model_error_with_what_transformers_said(
    where: str, table: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama import modeling_llama

    def fails(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("rope_theta must not be a pumpkin")

    tiny.build("llama", tmp_path / "base")
    tiny.perturbed(tmp_path / "base", tmp_path / "expert")
    monkeypatch.setattr(getattr(modeling_llama, where), "forward", fails)
    recipe = recipe_of(tmp_path, **{table: {"calibration": texts_in(tmp_path)}})
    with pytest.raises(ModelError, match="AssertionError: rope_theta must not be a pumpkin") as raised:
        lowmem_aim.merge(recipe, tmp_path / "out", QUICK)
    assert raised.value.exit_code == 3


def test_a_mistake_of_this_project_during_a_forward_stays_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **kwargs: Any) -> Any:
        raise KeyError("ours")

    fails.__globals__["__name__"], before = "lowmem_aim.blocks.means", fails.__globals__["__name__"]
    try:
        monkeypatch.setattr("lowmem_aim.blocks.means.mean_abs", fails)
        tiny.build("llama", tmp_path / "base")
        with Checkpoint.open(tmp_path / "base") as base, pytest.raises(KeyError, match="ours"):
            mean_activations(base, load_meta_model(base), tiny.sequences((20,)))
    finally:
        fails.__globals__["__name__"] = before


# --- embeddings -----------------------------------------------------------------------------------------------------

WAYS: dict[str, Callable[[Any], Any]] = {
    "look-up": lambda w: F.embedding(torch.tensor([[3, 1, 3]]), w),
    "look-up by keyword": lambda w: F.embedding(input=torch.tensor([2]), weight=w, padding_idx=0),
    "number": lambda w: w[4],
    "negative number": lambda w: w[-1],
    "row": lambda w: w[4, :],
    "element": lambda w: w[2, 3],
    "slice": lambda w: w[1:4],
    "columns": lambda w: w[1:4, :2],
    "list": lambda w: w[[0, 5]],
    "ids": lambda w: w[torch.tensor([[1, 2], [3, 0]])],
    "ids and columns": lambda w: w[torch.tensor([[1, 2], [3, 0]]), 1:3],
    "mask": lambda w: w[torch.tensor([True, False, True, False, False, True])],
    "new dimensions": lambda w: w[None, None, :, :],
    "ellipsis": lambda w: w[..., 1],
    "index_select": lambda w: w.index_select(0, torch.tensor([2, 2])),
    "transposed": lambda w: torch.ones(2, 4) @ w.T,
    "linear": lambda w: F.linear(torch.ones(2, 4), w),
    "arithmetic": lambda w: 2 * w + w.mean(),
    "stack": lambda w: torch.stack([w, w]),
    "copy": lambda w: w.clone().to(torch.float64),
    "data": lambda w: w.data.sum(),
    "shape": lambda w: torch.tensor([*w.shape, w.dim(), w.size(1), len(w), w.numel()]),
}


@pytest.mark.parametrize("way", WAYS)
def test_an_embedding_may_be_read_in_any_way(way: str) -> None:
    whole = torch.randn(6, 4)
    parameter = nn.Parameter(whole.to("meta"), requires_grad=False)
    rows = EmbeddingRows.like(parameter, lambda ids: whole[ids], torch.device("cpu"))
    found, expected = WAYS[way](rows), WAYS[way](whole)
    assert type(found) is Tensor
    assert torch.equal(found, expected)


def test_only_the_rows_that_are_asked_for_are_read() -> None:
    asked: list[int] = []

    def fetch(ids: Tensor) -> Tensor:
        asked.extend(ids.flatten().tolist())
        return torch.zeros(*ids.shape, 4)

    rows = EmbeddingRows.like(torch.empty(1000, 4, device="meta"), fetch, torch.device("cpu"))
    for index in (7, (8, slice(None)), slice(20, 22), torch.tensor([30])):
        rows[index]
    assert asked == [7, 8, 20, 21, 30]
