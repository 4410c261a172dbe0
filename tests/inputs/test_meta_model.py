"""The model without its weights: the same names, buffers and values as transformers' own loading, and no code run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowmem_aim.errors import ModelError
from lowmem_aim.models.checkpoint import Checkpoint
from lowmem_aim.models.meta_model import MetaModel, load_meta_model
from lowmem_aim.models.parameter_names import ParameterNames


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    made: dict[Any, Path] = {}

    def model(architecture: str, dtype: torch.dtype = torch.float32) -> Path:
        if (architecture, dtype) not in made:
            folder = tmp_path_factory.mktemp(architecture)
            made[architecture, dtype] = tiny.build(architecture, folder, dtype=dtype)
        return made[architecture, dtype]

    return model


def skeleton_of(folder: Path, dtype: torch.dtype | None = None) -> MetaModel:
    return load_meta_model(Checkpoint.open(folder), dtype)


def copy(source: Path, folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """`source` in `folder`, its tensors changed in place."""
    tiny.perturbed(source, folder, scale=0)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_values_and_buffers_are_those_of_from_pretrained(
    architecture: str, dtype: torch.dtype, models: Callable[..., Path]
) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(models(architecture, dtype), dtype="auto")
    meta_model = skeleton_of(models(architecture, dtype))
    assert meta_model.dtype == dtype
    state, kept = loaded.state_dict(), dict(meta_model.model.named_parameters())
    for name, value in state.items():
        assert torch.equal(meta_model.weights.load(name).to(value.dtype), value), name
        assert name not in kept or (kept[name].is_meta and kept[name].dtype == value.dtype), name
    buffers = dict(meta_model.model.named_buffers())
    for name, value in loaded.named_buffers():
        assert name in state or (buffers[name].dtype == value.dtype and torch.equal(buffers[name], value)), name


def test_another_dtype_changes_buffers_as_from_pretrained_does(models: Callable[..., Path]) -> None:
    folder = models("gemma3_text", torch.bfloat16)  # multiplies embeddings by a square root kept as a buffer
    meta_model = skeleton_of(folder, torch.float32)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    buffers = dict(meta_model.model.named_buffers())
    assert any("embed_scale" in name for name in buffers)
    for name, value in loaded.named_buffers():
        assert buffers[name].dtype == value.dtype
        assert torch.equal(buffers[name], value), name


def test_blocks_are_found_in_order(models: Callable[..., Path]) -> None:
    for architecture, first in [
        ("llama", "model.layers.0"),
        ("gpt2", "transformer.h.0"),
        ("opt", "model.decoder.layers.0"),
    ]:
        meta_model = skeleton_of(models(architecture))
        assert [path for path, _ in meta_model.blocks] == [f"{first[:-1]}{index}" for index in range(tiny.LAYERS)]
        assert all(meta_model.model.get_submodule(path) is block for path, block in meta_model.blocks)


def test_tied_and_vocabulary_and_embeddings(models: Callable[..., Path]) -> None:
    gpt2 = skeleton_of(models("gpt2"))
    assert gpt2.tied == {"lm_head.weight": "transformer.wte.weight"}
    assert gpt2.vocabulary == {"lm_head.weight", "transformer.wte.weight"}
    assert gpt2.embeddings == {"transformer.wte.weight", "transformer.wpe.weight"}
    llama = skeleton_of(models("llama"))
    assert llama.tied == {}
    assert llama.vocabulary == {"lm_head.weight", "model.embed_tokens.weight"}
    neox = skeleton_of(models("gpt_neox"))
    assert neox.vocabulary == {"embed_out.weight", "gpt_neox.embed_in.weight"}


def test_a_tied_pair_of_which_the_file_holds_only_the_head(models: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny.perturbed(models("qwen2"), tmp_path / "head", scale=0)
    tiny.rename(folder, lambda name: name.replace("model.embed_tokens", "lm_head"))
    meta_model = skeleton_of(folder)
    assert meta_model.weights.sources("model.embed_tokens.weight") == ["lm_head.weight"]
    assert meta_model.tied == {"lm_head.weight": "model.embed_tokens.weight"}


def test_buffers_of_today_and_of_old_checkpoints(models: Callable[..., Path], tmp_path: Path) -> None:
    deepseek = skeleton_of(models("deepseek_v3"))
    assert deepseek.buffers == {f"model.layers.{i}.mlp.gate.e_score_correction_bias" for i in (1, 2)}

    def old(tensors: dict[str, Tensor]) -> None:
        tensors["transformer.h.0.attn.bias"] = torch.ones(1, 1, 8, 8).tril()
        tensors["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4)
        tensors["transformer.surplus.weight"] = torch.ones(3)

    folder = copy(models("gpt2"), tmp_path / "old", old)
    tiny.rename(folder, lambda name: name.removeprefix("transformer."))
    meta_model = skeleton_of(folder)
    assert meta_model.buffers == {"h.0.attn.bias", "h.0.attn.masked_bias"}
    assert meta_model.weights.unused == meta_model.buffers | {"surplus.weight"}
    assert meta_model.vocabulary == {"wte.weight", "lm_head.weight"}
    assert meta_model.embeddings == {"wte.weight", "wpe.weight"}


def test_a_bias_of_a_part_that_transformers_leaves_out_is_no_buffer(
    models: Callable[..., Path], tmp_path: Path
) -> None:
    layer = "model.layers.61"  # DeepSeek's last predicts a token more

    def longer(tensors: dict[str, Tensor]) -> None:
        tensors |= {f"{layer}.enorm.weight": torch.ones(32), f"{layer}.enorm.bias": torch.ones(32)}
        tensors |= {f"{layer}.self_attn.rotary_emb.inv_freq": torch.ones(4)}

    meta_model = skeleton_of(copy(models("deepseek_v3"), tmp_path / "longer", longer))
    assert {name for name in meta_model.buffers if name.startswith(layer)} == {f"{layer}.self_attn.rotary_emb.inv_freq"}
    assert meta_model.optional == {f"{layer}.enorm.weight", f"{layer}.enorm.bias"}


def test_a_base_models_checkpoint_has_no_head(models: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny.perturbed(models("llama"), tmp_path / "base", scale=0)
    tiny.rename(folder, lambda name: None if name.startswith("lm_head") else name.removeprefix("model."))
    meta_model = skeleton_of(folder)
    assert meta_model.weights.sources("model.layers.2.mlp.up_proj.weight") == ["layers.2.mlp.up_proj.weight"]
    assert meta_model.weights.sources("lm_head.weight") == []


def test_the_experts_of_a_layer_are_one_parameter(models: Callable[..., Path]) -> None:
    weights = skeleton_of(models("mixtral")).weights
    fused, prefix = "model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.block_sparse_moe.experts"
    pairs = [f"{prefix}.{expert}.{name}.weight" for name in ("w1", "w3") for expert in range(4)]
    assert sorted(weights.sources(fused)) == sorted(pairs)
    statistic = torch.arange(4 * 32.0).reshape(4, 1, 32)
    spread = dict(weights.scatter(fused, statistic))
    assert spread.keys() == set(pairs)
    for expert in range(4):
        assert torch.equal(spread[f"{prefix}.{expert}.w1.weight"], statistic[expert])
        assert torch.equal(spread[f"{prefix}.{expert}.w3.weight"], statistic[expert])


def test_more_than_ten_experts_keep_their_order(tmp_path: Path) -> None:
    folder = tiny.build("qwen3_moe", tmp_path / "many", num_experts=12)
    meta_model = skeleton_of(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    fused = "model.layers.0.mlp.experts.gate_up_proj"
    assert torch.equal(meta_model.weights.load(fused), loaded[fused])
    statistic = torch.arange(12.0)[:, None, None].expand(12, 1, 32)
    spread = dict(meta_model.weights.scatter(fused, statistic))
    assert all(float(part[0, 0]) == int(name.split(".")[5]) for name, part in spread.items())


def test_one_tensor_that_makes_several_parameters_is_read_once(tmp_path: Path) -> None:
    """hrm_text stores gate and up, and gate, q, k and v, in one tensor each."""
    config = tiny.config("hrm_text", num_key_value_heads=4)
    folder = tmp_path / "hrm"
    with torch.random.fork_rng(devices=[]):
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    checkpoint = Checkpoint.open(folder)
    with torch.device("meta"):
        weights = ParameterNames(AutoModelForCausalLM.from_config(config), checkpoint)
    loaded = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    reads: list[str] = []

    def read(name: str) -> Tensor:
        reads.append(name)
        return checkpoint.tensor(name)

    for name, value in loaded.items():
        assert torch.equal(weights.load(name, read), value), name
    assert len(reads) == len(set(reads)) < len(loaded)


# --- refusals -------------------------------------------------------------------------------------------------------


def test_an_unknown_model_type_is_an_error(models: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny.perturbed(models("llama"), tmp_path / "unknown", scale=0)
    tiny.edit_config(folder, model_type="llama9")
    with pytest.raises(ModelError, match="llama9") as raised:
        skeleton_of(folder)
    assert "newer transformers" in raised.value.hint


def test_a_config_that_transformers_refuses_is_told_with_its_reason(
    models: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny.perturbed(models("llama"), tmp_path / "m")
    tiny.edit_config(folder, layer_types=["full_attention"] * (tiny.LAYERS - 1))
    with Checkpoint.open(folder) as checkpoint, pytest.raises(ModelError, match="number of `layer_types`") as raised:
        load_meta_model(checkpoint)
    assert "newer transformers" not in raised.value.hint  # it knows the model type


@pytest.mark.parametrize(("kind", "known"), [("llama9", False), ("llama", True)])
def test_code_in_the_folder_is_never_executed(
    kind: str, known: bool, models: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny.perturbed(models("llama"), tmp_path / "code", scale=0)
    witness = tmp_path / "executed"
    for module in ("configuration_x", "modeling_x"):
        (folder / f"{module}.py").write_text(f"open({str(witness)!r}, 'w')\n")
    auto_map = {"AutoConfig": "configuration_x.C", "AutoModelForCausalLM": "modeling_x.M"}
    tiny.edit_config(folder, model_type=kind, auto_map=auto_map)
    if known:
        assert type(skeleton_of(folder).model).__module__.startswith("transformers.")
    else:
        with pytest.raises(ModelError, match="never executed"):
            skeleton_of(folder)
    assert not witness.exists()


def test_a_model_that_does_not_fit_its_config_is_an_error(models: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny.perturbed(models("llama"), tmp_path / "vit", scale=0)
    (folder / "config.json").write_text(json.dumps({"model_type": "vit", "num_hidden_layers": 2}))
    with pytest.raises(ModelError, match="lacks"):
        skeleton_of(folder)


def test_shapes_that_contradict_the_config_are_all_listed(models: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny.perturbed(models("llama"), tmp_path / "shapes", scale=0)
    tiny.edit_config(folder, intermediate_size=40)
    with pytest.raises(ModelError) as raised:
        skeleton_of(folder)
    assert len(raised.value.problems) == 3 * tiny.LAYERS
    assert "gives [48, 32]" in str(raised.value)


def test_missing_tensors_are_named(models: Callable[..., Path], tmp_path: Path) -> None:
    folder = copy(models("llama"), tmp_path / "less", lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ModelError, match=r"lacks 1 tensors of its model: `model\.layers\.1\.mlp\.up_proj\.weight`"):
        skeleton_of(folder)


def test_the_callers_random_state_is_left_alone(models: Callable[..., Path]) -> None:
    before = torch.get_rng_state()
    for architecture in ("gpt2", "mixtral"):
        skeleton_of(models(architecture))
    assert torch.equal(before, torch.get_rng_state())


# --- the builders themselves ----------------------------------------------------------------------------------------


def test_tiny_models_have_a_tokenizer_and_experts_differ(models: Callable[..., Path], tmp_path: Path) -> None:
    tokens = AutoTokenizer.from_pretrained(models("llama"))
    text = "Näh! two  words"
    ids = tokens(text).input_ids
    assert len(ids) == len(text.encode())
    assert tokens.decode(ids) == text
    expert = load_file(tiny.perturbed(models("llama"), tmp_path / "expert") / "model.safetensors")
    base = load_file(models("llama") / "model.safetensors")
    assert all(0 < (expert[name] - base[name]).abs().max() < 0.1 for name in base)
    sharded = tiny.build("llama", tmp_path / "sharded", shard_size="40KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
