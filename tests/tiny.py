"""Tiny random models of many architectures, on disk as their makers publish them, and experts of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

VOCAB = 264  # 256 bytes and a few special tokens, padded to a multiple of 8
LAYERS = 3

COMMON: Mapping[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}
_EXPERTS: Mapping[str, Any] = {"num_experts_per_tok": 2, "num_local_experts": 4, "num_experts": 4}

# Windows are 8 tokens, shorter than the tests' texts: a layer given another layer's mask shows.
ARCHITECTURES: Mapping[str, Mapping[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1, "tie_word_embeddings": True},
    "qwen3": {"head_dim": 8},
    "gemma2": {"sliding_window": 8, "head_dim": 8},
    "gemma3_text": {"sliding_window": 8, "head_dim": 8, "sliding_window_pattern": 2},
    "phi3": {"sliding_window": 8},
    "gpt_neox": {"rotary_pct": 0.25},
    "gpt2": {"n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": 128, "n_inner": 48},
    "cohere2": {"sliding_window": 8, "logit_scale": 0.25, "head_dim": 8, "sliding_window_pattern": 3},
    "mixtral": {**_EXPERTS, "sliding_window": 8},
    "qwen3_moe": {**_EXPERTS, "moe_intermediate_size": 24, "head_dim": 8, "decoder_sparse_step": 1},
    "qwen2_moe": {**_EXPERTS, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24},
    "gpt_oss": {**_EXPERTS, "sliding_window": 8, "head_dim": 8},
    "deepseek_v3": {
        "moe_intermediate_size": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 8,
        "q_lora_rank": 16,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "num_key_value_heads": 4,
    },
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
}


def config(architecture: str, **changes: Any) -> Any:
    """A transformers config; `changes` override the tiny sizes."""
    return AutoConfig.for_model(architecture, **{**COMMON, **ARCHITECTURES.get(architecture, {}), **changes})


def build(
    architecture: str,
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    shard_size: str = "5GB",
    **changes: Any,
) -> Path:
    """Save a random model of the architecture and a byte-level tokenizer to `folder`; returns it.

    `shard_size` as save_pretrained takes it ("40KB"); `changes` go to the config. The caller's random state is left.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        settings = config(architecture, **changes)
        model = AutoModelForCausalLM.from_config(settings, experts_implementation="eager")
        spread(model)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    tokenizer().save_pretrained(folder)
    return folder


def spread(model: torch.nn.Module) -> None:
    """Larger weights than a fresh model's, norms and biases off their 1 and 0: a wrong factor must show."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn(parameter.shape) * (0.1 if parameter.dim() < 2 else 0.05)


def perturbed(base: Path, folder: Path, scale: float = 0.01, seed: int = 1) -> Path:
    """An expert of `base` in `folder`: the same files with normal noise of `scale` added to every float tensor."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    for file in sorted(base.iterdir()):
        if file.suffix == ".safetensors":
            tensors = {name: _noisy(value, scale, generator) for name, value in sorted(load_file(file).items())}
            save_file(tensors, folder / file.name, metadata={"format": "pt"})
        elif file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


def _noisy(value: torch.Tensor, scale: float, generator: torch.Generator) -> torch.Tensor:
    if not value.is_floating_point():
        return value
    return (value.float() + scale * torch.randn(value.shape, generator=generator)).to(value.dtype)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte (id = its place in the byte alphabet), then `<s>`, `</s>`, `<pad>` at 256 to 258."""
    alphabet = {char: index for index, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def sequences(lengths: tuple[int, ...] = (23, 9, 40), seed: int = 3) -> list[torch.Tensor]:
    """Random token ids, (length,) int64 each."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (length,), generator=generator) for length in lengths]


def rename(folder: Path, change: Any) -> None:
    """Rewrite the single-file checkpoint in `folder` with each tensor's name passed through `change` (None drops)."""
    file = folder / "model.safetensors"
    tensors = {change(name): value for name, value in load_file(file).items()}
    save_file({name: value for name, value in tensors.items() if name}, file, metadata={"format": "pt"})


def edit_config(folder: Path, **changes: Any) -> None:
    """Set keys of config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Rewrite the single-file checkpoint in `folder` with what `change` has made of its table of tensors."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
