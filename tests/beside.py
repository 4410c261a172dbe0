"""Random vision-language models, and text models of the sizes of their language part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import shrinking
import tiny
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

TEXT = {"llava": "llama", "qwen2_vl": "qwen2", "gemma3": "gemma3_text"}  # the language part, as a model of its own
_OWN = ("model_type", "rope_parameters", "architectures")  # a text model's are not those of a language part


def pictured(kind: str, folder: Path, *, tied: bool = False) -> Path:
    """A vision-language model in `folder`, its head tied to its embedding or not; returns the folder."""
    config = shrinking.shrunk_config(kind)
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = tied
    return _saved(AutoModelForImageTextToText, config, folder, seed=0)


def text_model(kind: str, folder: Path, *, tied: bool = False) -> Path:
    """A text model in `folder` that fits the language part of `pictured`; returns the folder."""
    sizes = shrinking.shrunk_config(kind).text_config.to_dict()
    config = AutoConfig.for_model(TEXT[kind], **{k: v for k, v in sizes.items() if k not in _OWN})
    config.tie_word_embeddings = tied
    return _saved(AutoModelForCausalLM, config, folder, seed=1)


def _saved(auto: Any, config: Any, folder: Path, seed: int) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto.from_config(config)
        tiny.spread(model)
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder
