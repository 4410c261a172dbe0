"""Tiny random vision-language models, and models with an encoder, on disk as their makers publish them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
)

TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_IMAGES = {**TOWER, "image_size": 16, "patch_size": 4}
_QWEN = {"depth": 2, "hidden_size": 32, "embed_dim": 32, "num_heads": 4, "patch_size": 4, "spatial_merge_size": 2}
_ROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10_000.0}}
# Vision-language models: the settings of their text and vision parts.
PICTURES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "qwen2_vl": (_ROPE, _QWEN),
    "qwen2_5_vl": (_ROPE, {**_QWEN, "out_hidden_size": 32, "intermediate_size": 48, "fullatt_block_indexes": [1]}),
    "mistral3": ({"model_type": "mistral"}, {"model_type": "pixtral", **_IMAGES, "head_dim": 8}),
    "llava": ({"model_type": "llama"}, {"model_type": "clip_vision_model", **_IMAGES}),
    "gemma3": ({"head_dim": 8, "sliding_window": 8}, _IMAGES),
    "llama4": (
        {"model_type": "llama4_text", "intermediate_size_mlp": 48, "num_local_experts": 2, "head_dim": 8},
        {
            **_IMAGES,
            "intermediate_size": 128,
            "projector_input_dim": 32,
            "projector_output_dim": 32,
            "vision_output_dim": 32,
        },
    ),
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
