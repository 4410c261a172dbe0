"""`base+adapter`: its tensors are W + s B A, to the last bit the same for any rows; what cannot be added is refused."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import adapters
import pytest
import tiny
import torch
from adapters import ALPHA, RANK, factors, far, product, shapes_of, stored, write
from torch import Tensor

from lowmem_aim.errors import ModelError
from lowmem_aim.events import silent
from lowmem_aim.methods import kernels
from lowmem_aim.models import in_steps
from lowmem_aim.models.adapter_config import adapter_config_of
from lowmem_aim.models.checkpoint import Checkpoint
from lowmem_aim.models.hub import locate
from lowmem_aim.models.opening import opened
from lowmem_aim.models.reader import Reader
from lowmem_aim.system.options import ReadMode

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
ATTENTION = ("q_proj", "o_proj", "down_proj")
SCALING = ALPHA / RANK


def reading(base: Path, adapter: Path, read: ReadMode = "mmap") -> Checkpoint:
    with Reader() as reader:
        return opened(f"{base}+{adapter}", lambda part, is_adapter: locate(part, silent, is_adapter), read, reader)


def read(base: Path, adapter: Path) -> dict[str, Tensor]:
    with reading(base, adapter) as model:
        return {name: model.tensor(name).clone() for name in model.tensors}


def refused(base: Path, adapter: Path) -> tuple[list[str], str]:
    """(problems, hint)."""
    with pytest.raises(ModelError) as caught:
        reading(base, adapter)
    return list(caught.value.problems), caught.value.hint


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose linears are stored (in, out), one of them square."""
    return tiny.build("gpt2", tmp_path_factory.mktemp("gpt2") / "base")


@pytest.fixture
def base(llama: Path) -> Path:
    return llama / "base"


# --- what is added ----------------------------------------------------------------------------------------------------


def test_changed_tensors_are_w_plus_s_b_a_and_others_are_the_bases(base: Path, tmp_path: Path) -> None:
    tensors = factors(shapes_of(base, *ATTENTION))
    found, before = read(base, write(tmp_path / "a", tensors)), stored(base)
    assert found.keys() == before.keys()
    changed = shapes_of(base, *ATTENTION)
    for name, value in found.items():
        module = name.removesuffix(".weight")
        if module in changed:
            exact = before[name].double() + product(tensors, module)
            assert value.equal(exact.float())  # rounded once; float64 itself is far below that
        else:
            assert value.equal(before[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_widened_exactly_and_outputs_keep_the_bases(dtype: torch.dtype, tmp_path: Path) -> None:
    base = tiny.build("llama", tmp_path / "base", dtype=dtype)
    tensors = factors(shapes_of(base, "q_proj"), dtype=torch.bfloat16)
    with reading(base, write(tmp_path / "a", tensors)) as model:
        exact = stored(base)[f"{Q}.weight"].double() + product(tensors, Q)
        assert model.tensor(f"{Q}.weight").equal(exact.float())
        info = model.tensors[f"{Q}.weight"]
        assert (info.dtype.torch, info.output_dtype.torch) == (torch.float32, dtype)


@pytest.mark.parametrize(
    ("config", "factor"),
    [
        ({}, ALPHA / RANK),
        ({"use_rslora": True}, ALPHA / math.sqrt(RANK)),
        ({"alpha_pattern": {"k_proj": 3, "q_proj": 10, "layers.0.self_attn.q_proj": 20}}, 10 / RANK),  # the first wins
        ({"alpha_pattern": {"proj": 10, "_proj": 11}}, ALPHA / RANK),  # from a dot on
        ({"alpha_pattern": {r"layers\.\d\.self_attn\.(q|v)_proj": 10}}, 10 / RANK),  # regular expressions
        ({"alpha_pattern": {"^model.layers.0.self_attn.q_proj": 10}, "use_rslora": True}, 10 / math.sqrt(RANK)),
        ({"r": 9, "rank_pattern": {"q_proj": RANK}}, ALPHA / RANK),
        ({"lora_alpha": 0.5}, 0.5 / RANK),
    ],
)
def test_the_factor_is_pefts(config: dict[str, Any], factor: float, base: Path, tmp_path: Path) -> None:
    tensors = factors({Q: (32, 32)})
    found = read(base, write(tmp_path / "a", tensors, **config))[f"{Q}.weight"]
    assert found.equal((stored(base)[f"{Q}.weight"].double() + product(tensors, Q, factor)).float())


def test_conv1d_weights_are_changed_by_the_transpose(gpt2: Path, tmp_path: Path) -> None:
    """A square one does not show it: its model type does, whatever the config says."""
    shapes = {"transformer.h.0.attn.c_attn": (96, 32), "transformer.h.1.attn.c_proj": (32, 32)}
    tensors = factors(shapes)
    found, before = read(gpt2, write(tmp_path / "a", tensors, fan_in_fan_out=False)), stored(gpt2)
    for module in shapes:
        exact = before[f"{module}.weight"].double() + product(tensors, module).T
        assert found[f"{module}.weight"].equal(exact.float())


def test_embeddings_copies_and_biases(tmp_path: Path) -> None:
    base = tiny.build("llama", tmp_path / "base", attention_bias=True)
    before, random = stored(base), torch.Generator().manual_seed(5)
    embedding = {
        "model.embed_tokens.lora_embedding_A": torch.randn(RANK, tiny.VOCAB, generator=random),
        "model.embed_tokens.lora_embedding_B": torch.randn(32, RANK, generator=random),
    }
    # PEFT saves the embedding that it adapts too: as it was trained on.
    copy = torch.randn(tiny.VOCAB, 32, generator=random)
    head, norm = torch.randn(tiny.VOCAB, 32, generator=random).bfloat16(), torch.randn(32, generator=random)
    bias = torch.randn(32, generator=random)
    tensors = {
        **embedding,
        **factors({Q: (32, 32)}),
        "model.embed_tokens.base_layer.weight": copy,
        "lm_head.weight": head,
        "model.norm.modules_to_save.weight": norm,
        f"{Q}.lora_B.bias": bias,
        "model.layers.1.self_attn.q_proj.bias": bias.clone(),
    }
    found = read(base, write(tmp_path / "a", tensors))
    low_rank = (embedding["model.embed_tokens.lora_embedding_B"] @ embedding["model.embed_tokens.lora_embedding_A"]).T
    assert far(found["model.embed_tokens.weight"], copy.double() + SCALING * low_rank.double()) < 1e-6
    assert found["lm_head.weight"].equal(head)
    assert found["model.norm.weight"].equal(norm)
    assert found[f"{Q}.bias"].equal((before[f"{Q}.bias"].double() + SCALING * bias.double()).float())
    assert found["model.layers.1.self_attn.q_proj.bias"].equal(bias)
    with reading(base, tmp_path / "a") as model:
        assert model.tensors["lm_head.weight"].output_dtype.name == "float32"  # the base's, though the copy is bfloat16


def test_a_dora_scales_rows_to_its_magnitudes(base: Path, tmp_path: Path) -> None:
    tensors = factors({DOWN: (32, 48)})
    magnitude = torch.rand(32, generator=torch.Generator().manual_seed(3)) + 0.5
    adapter = write(tmp_path / "a", tensors | {f"{DOWN}.lora_magnitude_vector": magnitude}, use_dora=True)
    exact = stored(base)[f"{DOWN}.weight"].double() + product(tensors, DOWN)
    exact *= (magnitude.double() / exact.norm(dim=1))[:, None]
    assert far(read(base, adapter)[f"{DOWN}.weight"], exact) < 1e-7


def test_a_dora_scales_columns_of_conv1d_and_embeddings(gpt2: Path, tmp_path: Path) -> None:
    module, random = "transformer.h.0.attn.c_attn", torch.Generator().manual_seed(3)
    tensors = factors({module: (96, 32)}) | {
        "transformer.wte.lora_embedding_A": torch.randn(RANK, tiny.VOCAB, generator=random),
        "transformer.wte.lora_embedding_B": torch.randn(32, RANK, generator=random),
    }
    magnitudes = {module: torch.rand(96, generator=random), "transformer.wte": torch.rand(32, generator=random)}
    named = {f"{name}.lora_magnitude_vector": value for name, value in magnitudes.items()}
    found, before = read(gpt2, write(tmp_path / "a", tensors | named, use_dora=True)), stored(gpt2)
    low_rank = (tensors["transformer.wte.lora_embedding_B"] @ tensors["transformer.wte.lora_embedding_A"]).double()
    for name, change in ((module, product(tensors, module)), ("transformer.wte", SCALING * low_rank)):
        exact = before[f"{name}.weight"].double() + change.T
        exact *= magnitudes[name].double() / exact.norm(dim=0)
        assert far(found[f"{name}.weight"], exact) < 1e-7


# --- the same bytes ---------------------------------------------------------------------------------------------------


@pytest.fixture
def everything(gpt2: Path, tmp_path: Path) -> Path:
    """A DoRA that changes rows of one kind of weight, columns of another, and an embedding."""
    random = torch.Generator().manual_seed(7)
    shapes = {
        "transformer.h.0.attn.c_attn": (96, 32),
        "transformer.h.1.mlp.c_fc": (48, 32),
        "lm_head": (tiny.VOCAB, 32),
    }
    tensors = factors({name: shape for name, shape in shapes.items() if name != "lm_head"}, rank=7)
    tensors |= {
        "transformer.wte.lora_embedding_A": torch.randn(7, tiny.VOCAB, generator=random),
        "transformer.wte.lora_embedding_B": torch.randn(32, 7, generator=random),
    }
    for module, width in (
        ("transformer.h.0.attn.c_attn", 96),
        ("transformer.h.1.mlp.c_fc", 48),
        ("transformer.wte", 32),
    ):
        tensors[f"{module}.lora_magnitude_vector"] = torch.rand(width, generator=random)
    return write(tmp_path / "everything", tensors, r=7, use_dora=True)


@pytest.mark.parametrize("mode", ["mmap", "pread"])
@pytest.mark.parametrize("loops", [True, False])
def test_any_rows_are_the_rows_of_the_whole(
    loops: bool, mode: ReadMode, gpt2: Path, everything: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = read(gpt2, everything)
    if not loops:
        monkeypatch.setattr(kernels, "usable", lambda tensors: False)
    monkeypatch.setattr(in_steps, "STEP_ELEMENTS", 100)
    with reading(gpt2, everything, mode) as model:
        for name, value in whole.items():
            rows, columns = model.tensors[name].matrix
            for step in (1, 5, rows):
                parts = [model.rows(name, start, min(start + step, rows)) for start in range(0, rows, step)]
                assert torch.cat(parts).equal(value.view(rows, columns)), (name, step)
            assert model.tensor(name).equal(value)


def test_files_that_change_are_noticed(base: Path, tmp_path: Path) -> None:
    adapter = write(tmp_path / "a", factors({Q: (32, 32)}))
    with reading(base, adapter) as model:
        before = model.fingerprint()
        model.rows(f"{Q}.weight", 0, 1)
        os.utime(adapter / "adapter_model.safetensors", ns=(1, 1))
        with pytest.raises(ModelError, match="changed while it was being read"):
            model.check_unchanged()
    write(adapter, factors({Q: (32, 32)}, seed=2))
    with reading(base, adapter) as model:
        assert model.fingerprint() != before
        after = model.fingerprint()
    write(adapter, factors({Q: (32, 32)}, seed=2), lora_alpha=ALPHA + 1)
    with reading(base, adapter) as model:
        assert model.fingerprint() != after


def test_the_memory_that_reading_takes_is_declared(gpt2: Path, everything: Path) -> None:
    with reading(gpt2, everything) as model:
        held = 7 * (96 + 48) * 4  # the right factors of the two with the longest rows
        assert model.footprint.tensor >= held
        assert model.footprint.element >= 4
        assert model.whole_bytes("transformer.wte.weight") >= 4 * tiny.VOCAB * 32
        assert model.whole_bytes("transformer.wpe.weight") == 0  # a mapping of the base's file
    with Checkpoint.open(gpt2) as plain:
        assert (plain.footprint.element, plain.footprint.tensor) == (0, 0)


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("there", ["layers.0.self_attn.q_proj", "model.language_model.layers.0.self_attn.q_proj"])
def test_modules_are_found_under_another_prefix(there: str, base: Path, tmp_path: Path) -> None:
    found = read(base, write(tmp_path / "a", factors({there: (32, 32)})))
    same = read(base, write(tmp_path / "b", factors({Q: (32, 32)})))
    assert found[f"{Q}.weight"].equal(same[f"{Q}.weight"])
    assert not found[f"{Q}.weight"].equal(stored(base)[f"{Q}.weight"])


def test_a_head_that_transformers_calls_otherwise_is_found(tmp_path: Path) -> None:
    base = tiny.build("gpt_neox", tmp_path / "base")  # `embed_out` in files, `lm_head` in the model
    tensors = factors({"lm_head": (tiny.VOCAB, 32)})
    found = read(base, write(tmp_path / "a", tensors))["embed_out.weight"]
    assert found.equal((stored(base)["embed_out.weight"].double() + product(tensors, "lm_head")).float())


def test_another_layers_tensor_is_never_taken(base: Path, tmp_path: Path) -> None:
    tiny.build("llama", tmp_path / "one", num_hidden_layers=1)
    problems, _ = refused(tmp_path / "one", write(tmp_path / "a", factors({DOWN: (32, 48)})))
    assert "has no place in `one`" in problems[0]


def test_a_tied_head_that_the_adapter_stores_must_be_its_embedding(tmp_path: Path) -> None:
    base = tiny.build("qwen2", tmp_path / "base")
    copy = torch.randn(tiny.VOCAB, 32)
    adapter = write(tmp_path / "a", {"model.embed_tokens.weight": copy, "lm_head.weight": copy.clone()})
    with reading(base, adapter) as model:
        assert model.digest("lm_head.weight") == model.digest("model.embed_tokens.weight")
    problems, _ = refused(base, write(tmp_path / "b", factors({"lm_head": (tiny.VOCAB, 32)})))
    assert "its head is its embedding" in problems[0]


def test_a_stored_head_that_repeats_its_embedding_changes_with_it(tmp_path: Path) -> None:
    base = tiny.build("qwen2", tmp_path / "base")
    tiny.edit_tensors(base, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    embedding = {
        "model.embed_tokens.lora_embedding_A": torch.ones(RANK, tiny.VOCAB),
        "model.embed_tokens.lora_embedding_B": torch.ones(32, RANK),
    }
    head = {"lm_head.weight": torch.ones(tiny.VOCAB, 32)}
    for name, tensors, repeats in (("a", embedding, True), ("b", embedding | head, False)):
        with reading(base, write(tmp_path / name, tensors)) as model:
            assert model.repeats("lm_head.weight", "model.embed_tokens.weight") == repeats


# --- what is refused --------------------------------------------------------------------------------------------------

REFUSED: Mapping[str, Any] = {
    "layer_replication": [[0, 2], [1, 3]],
    "target_parameters": ["experts.gate_up_proj"],
    "trainable_token_indices": [3],
    "alora_invocation_tokens": [1, 2],
    "use_qalora": True,
    "megatron_config": {"a": 1},
    "peft_type": "IA3",
}


@pytest.mark.parametrize("key", REFUSED)
def test_variants_that_are_no_plain_lora_are_refused_by_name(key: str, base: Path, tmp_path: Path) -> None:
    problems, hint = refused(base, write(tmp_path / "a", factors({Q: (32, 32)}), **{key: REFUSED[key]}))
    assert len(problems) == 1
    assert f"(`{key}`)" in problems[0]
    assert "PEFT" in hint


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_16", "olora", "corda", "loftq", "mica", "PiSSA"])
def test_beginnings_that_change_the_base_are_refused_unless_converted(start: str, base: Path, tmp_path: Path) -> None:
    problems, hint = refused(base, write(tmp_path / "a", factors({Q: (32, 32)}), init_lora_weights=start))
    assert f"`{start}` (`init_lora_weights`)" in problems[0]
    assert "path_initial_model_for_weight_conversion" in hint
    for plain in (True, False, "gaussian", "eva", "orthogonal"):  # what a converted one says, and what is plain
        reading(base, write(tmp_path / "a", factors({Q: (32, 32)}), init_lora_weights=plain)).close()


def test_every_tensor_has_its_place_or_is_a_problem(base: Path, tmp_path: Path) -> None:
    good = factors({Q: (32, 32), DOWN: (32, 48)})
    wrong = {
        **good,
        "model.layers.0.self_attn.k_proj.lora_A.weight": torch.ones(RANK, 32),  # without its other half
        "model.layers.7.self_attn.k_proj.lora_A.weight": torch.ones(RANK, 32),
        "model.layers.8.self_attn.k_proj.lora_A.weight": torch.ones(RANK, 32),
        "model.layers.0.mlp.up_proj.lora_A.weight": torch.ones(RANK + 1, 32),
        "model.layers.0.mlp.up_proj.lora_B.weight": torch.ones(48, RANK + 1),
        "model.layers.1.mlp.up_proj.lora_A.weight": torch.ones(RANK, 31),
        "model.layers.1.mlp.up_proj.lora_B.weight": torch.ones(48, RANK),
        f"{Q}.lora_magnitude_vector": torch.ones(32),  # the config says nothing of a DoRA
        "model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(3, 32),
        "model.norm.weight": torch.ones(16),
        "model.layers.0.input_layernorm.weight": torch.ones(32, dtype=torch.int32),
        f"{DOWN}.lora_B.bias": torch.ones(32),  # the base has none
    }
    problems, hint = refused(base, write(tmp_path / "a", wrong))
    for text in (
        "of `lora_A` and `lora_B` of `model.layers.0.self_attn.k_proj` it lacks one, or both",
        "` has no place in `base`: there is no such module",
        "have the ranks 5 and 5, and the config says 4",
        "is float32 [16], but `model.norm.weight` of the base is float32 [32] (the same goes for 1 more)",
        "`lora_magnitude_vector`",
        "trainable_tokens_delta` is no tensor of a LoRA adapter",
        "is int32",
    ):
        assert sum(text in problem for problem in problems) == 1, text
    assert any("(the same goes for 2 more)" in problem for problem in problems)
    assert "Its maker calls that `tiny/base`" in hint


@pytest.mark.parametrize("shape", [(), (4,), (4, 32, 1)])
def test_what_is_no_matrix_is_a_problem(shape: tuple[int, ...], base: Path, tmp_path: Path) -> None:
    tensors = {f"{Q}.lora_A.weight": torch.ones(shape), f"{Q}.lora_B.weight": torch.ones(32, RANK)}
    problems, hint = refused(base, write(tmp_path / "a", tensors))
    assert "is no matrix of floats" in problems[0]
    assert "convolutions" in hint
    problems, _ = refused(base, write(tmp_path / "b", factors({"model.norm": (32, 32)})))
    assert "is no matrix of floats" in problems[0]


def test_wrong_configs_are_told_at_once(base: Path, tmp_path: Path) -> None:
    adapter = write(tmp_path / "a", factors({Q: (32, 32)}), r=0, lora_alpha="big", rank_pattern={"q": 0})
    problems, _ = refused(base, adapter)
    assert [key for key in ("`r`", "`lora_alpha`", "`rank_pattern`") if any(key in p for p in problems)] == [
        "`r`",
        "`lora_alpha`",
        "`rank_pattern`",
    ]


@pytest.mark.parametrize("pattern", ["(a+)+q", "(q|q)*", "q{2,9}", r"(q)\1", "a?a?a?a?", "[", "x" * 301])
def test_patterns_that_could_match_for_ever_are_refused(pattern: str, base: Path, tmp_path: Path) -> None:
    problems, _ = refused(base, write(tmp_path / "a", factors({Q: (32, 32)}), alpha_pattern={pattern: 2}))
    assert "which is not supported" in problems[0]


def test_what_is_no_adapter_and_what_is_no_model(base: Path, tmp_path: Path) -> None:
    adapter = write(tmp_path / "mine", factors({Q: (32, 32)}))
    problems, hint = refused(base, base)
    assert "is no LoRA adapter: it has no adapter_config.json" in problems[0]
    with pytest.raises(ModelError, match=r"`.*mine` is a LoRA adapter, not a whole model") as caught:
        Checkpoint.open(adapter)
    assert caught.value.hint == "name it behind its base: `tiny/base+mine`"
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    problems, hint = refused(base, adapter)
    assert "only pickle (`adapter_model.bin`)" in problems[0]
    assert "`lowmem-aim convert`" in hint
    (adapter / "adapter_model.bin").unlink()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "use_qalora": True}))
    problems, _ = refused(base, adapter)
    assert len(problems) == 2  # of the config and of the missing file, at once
    problems, _ = refused(tmp_path / "nowhere", tmp_path / "nothing")
    assert [word for word in ("model", "adapter") if f"no {word} folder" in " ".join(problems)] == ["model", "adapter"]


def test_an_adapter_whose_weights_were_not_gathered_is_told(base: Path, tmp_path: Path) -> None:
    tensors = {f"{Q}.lora_A.weight": torch.empty(0), f"{Q}.lora_B.weight": torch.empty(0)}
    problems, hint = refused(base, write(tmp_path / "a", tensors))
    assert "is empty (the same goes for 1 more)" in problems[0]
    assert "ZeRO-3" in hint


def test_a_config_without_ranks_has_pefts_defaults(tmp_path: Path) -> None:
    adapters.write(tmp_path, {})
    (tmp_path / "adapter_config.json").write_text("{}")
    config = adapter_config_of(tmp_path)
    assert (config.rank, config.scaling_of("x")) == (8, 1.0)
