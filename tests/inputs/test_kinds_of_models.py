"""Vision-language models merge, with AIM in their language part; encoders merge without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from conftest import Run
from long_cases import others_long
from merge_cases import tensors_in
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
)

_TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_IMAGES = {**_TOWER, "image_size": 16, "patch_size": 4}
_QWEN = {"depth": 2, "hidden_size": 32, "embed_dim": 32, "num_heads": 4, "patch_size": 4, "spatial_merge_size": 2}
_ROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10_000.0}}
# Vision-language models: the settings of their text and vision parts.
PICTURES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "qwen2_vl": (_ROPE, _QWEN),
    "qwen2_5_vl": (_ROPE, {**_QWEN, "out_hidden_size": 32, "intermediate_size": 48, "fullatt_block_indexes": [1]}),
    "mistral3": ({"model_type": "mistral"}, {"model_type": "pixtral", **_IMAGES, "head_dim": 8}),
    "llava": ({"model_type": "llama"}, {"model_type": "clip_vision_model", **_IMAGES}),
    "gemma3": ({"head_dim": 8, "sliding_window": 8}, _IMAGES),
}
ENCODERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "bert": (AutoModel, {}),
    "roberta": (AutoModelForMaskedLM, {"pad_token_id": 1}),
    "deberta-v2": (AutoModelForMaskedLM, {}),
    "t5": (AutoModelForSeq2SeqLM, {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}),
    "siglip_vision_model": (AutoModel, {"image_size": 16, "patch_size": 4}),
}


def pictured(kind: str, folder: Path) -> Path:
    """A random vision-language model in `folder`."""
    text, vision = PICTURES[kind]
    return saved(
        AutoModelForImageTextToText,
        AutoConfig.for_model(kind, text_config={**tiny.COMMON, **text}, vision_config=vision),
        folder,
    )


def saved(kind: Any, config: Any, folder: Path) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind.from_config(config)
        tiny.spread(model)
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def merged(base: Path, run: Run, *more: object) -> dict[str, torch.Tensor]:
    """The merge of two experts of `base` by task arithmetic; checked against the formula where AIM is not asked for."""
    experts = [tiny.perturbed(base, base.parent / name, seed=seed) for seed, name in enumerate(("math", "code"), 1)]
    out = base.parent / "out"
    command = ("merge", out, "--method", "task_arithmetic", "--base", base, "--weight", 0.5, *more)
    done = run(*command, *(part for expert in experts for part in ("--expert", expert)))
    assert done.code == 0, done.err
    found, start, (math, code) = tensors_in(out), tensors_in(base), map(tensors_in, experts)
    assert found.keys() == start.keys()
    if not more:
        for name, value in found.items():
            if value.is_floating_point():
                expected = (math[name].double() + code[name].double()) / 2
                assert (value.double() - expected).abs().max() <= 1e-6 * max(1.0, float(expected.abs().max())), name
    return found


def loads(kind: Any, folder: Path) -> Any:
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model


@pytest.mark.parametrize("kind", others_long(PICTURES, ("qwen2_5_vl", "llava")))
def test_vision_language_models_merge_whole_and_load(kind: str, tmp_path: Path, run: Run) -> None:
    merged(pictured(kind, tmp_path / "base"), run)
    loads(AutoModelForImageTextToText, tmp_path / "out")


@pytest.mark.parametrize("kind", others_long(PICTURES, ("qwen2_5_vl",)))
def test_aim_relaxes_their_language_part_and_tells_of_the_rest(
    kind: str, tmp_path: Path, texts: Path, run: Run
) -> None:
    base = pictured(kind, tmp_path / "base")
    plain = merged(base, run)
    (tmp_path / "out").rename(tmp_path / "plain")
    done = run(
        "plan",
        tmp_path / "out",
        "--method",
        "linear",
        "--base",
        base,
        "--expert",
        tmp_path / "math",
        "--omega",
        0.4,
        "--calibration",
        texts,
    )
    assert "AIM leaves" in done.out + done.err
    relaxed = merged(base, run, "--omega", 0.4, "--calibration", texts)
    changed = {name for name in plain if not torch.equal(plain[name], relaxed[name])}
    inside = {name for name in plain if "layers" in name and not ("vision" in name or "visual" in name)}
    assert {name for name in inside if name.endswith("weight")} <= changed
    assert not any("vision" in name or "visual" in name for name in changed)


@pytest.mark.parametrize("kind", others_long(ENCODERS, ("bert", "t5")))
def test_encoders_merge_without_aim_and_are_refused_with_it(kind: str, tmp_path: Path, texts: Path, run: Run) -> None:
    auto, changes = ENCODERS[kind]
    sizes = {key: value for key, value in tiny.COMMON.items() if kind != "t5" or key == "vocab_size"}
    sizes = {} if "vision" in kind else sizes
    base = saved(auto, AutoConfig.for_model(kind, **{**_TOWER, **sizes, **changes}), tmp_path / "base")
    merged(base, run)
    loads(auto, tmp_path / "out")
    if kind == "roberta":
        return  # transformers has it as a causal model too, which AIM runs
    done = run(
        "merge",
        tmp_path / "relaxed",
        "--method",
        "linear",
        "--base",
        base,
        "--expert",
        tmp_path / "math",
        "--omega",
        0.4,
        "--calibration",
        texts,
    )
    assert done.code == 3
    assert "encoder" in done.err
