"""Tiny configs of the models that the installed transformers has, above all of every causal language model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tiny
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

LAYERS, HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM = 3, 32, 48, 4, 2, 8
IMAGE_TOKEN = 260  # stands for a part of a picture

# Sizes by the names that configs have for them; a config takes those that it knows.
_NAMES: Mapping[int, str] = {
    LAYERS: "num_hidden_layers n_layer n_layers num_layers num_blocks decoder_layers encoder_layers depth "
    "num_encoder_layers num_decoder_layers",
    HIDDEN: "hidden_size n_embd d_model dim emb_dim attention_hidden_size lru_width embedding_dim embed_dim "
    "word_embed_proj_dim embedding_size output_hidden_size backbone_hidden_size input_embedding_size "
    "output_embedding_size attention_dim out_hidden_size projection_dim image_size",
    INNER: "intermediate_size n_inner ffn_dim ffn_hidden_size dff d_inner decoder_ffn_dim encoder_ffn_dim dim_ff "
    "feed_forward_size mlp_dim intermediate_size_mlp dense_intermediate_size",
    24: "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size expert_ffn_hidden_size "
    "moe_shared_expert_intermediate_size shared_experts_intermediate_size",
    HEADS: "num_attention_heads n_head n_heads num_heads attention_heads encoder_attention_heads "
    "decoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads "
    "linear_num_heads linear_num_value_heads num_experts num_local_experts n_routed_experts moe_num_experts "
    "qk_rope_head_dim index_topk index_n_heads mamba_dt_rank time_step_rank rotary_dim mm_tokens_per_image",
    KV_HEADS: "num_key_value_heads swa_num_key_value_heads num_kv_heads num_query_groups linear_num_key_heads "
    "num_experts_per_tok num_experts_per_token moe_k moe_topk n_group topk_group",
    HEAD_DIM: "head_dim v_head_dim qk_nope_head_dim kv_lora_rank attention_head_dim linear_head_dim "
    "linear_key_head_dim linear_value_head_dim swa_head_dim dim_head d_head kv_channels index_head_dim "
    "mamba_d_state state_size ssm_state_size sliding_window sliding_window_size window_size attention_window_size "
    "hidden_size_per_layer_input laurel_rank attention_chunk_size mamba_chunk_size chunk_size",
    16: "q_lora_rank",
    128: "max_position_embeddings n_positions n_ctx max_seq_len model_max_length context_length "
    "max_source_positions max_target_positions",
    tiny.VOCAB: "vocab_size vocab_size_per_layer_input decoder_vocab_size",
    256: "bos_token_id",
    257: "eos_token_id",
    IMAGE_TOKEN: "image_token_id image_token_index",
    1: "first_k_dense_replace pad_token_id",  # within the positions, too: some embed padding there
}
_SIZES = {name: size for size, names in _NAMES.items() for name in names.split()}

# What no common rule gives.
_MAMBA: Mapping[str, Any] = {"mamba_n_heads": 8, "mamba_d_head": 8}
_ROPE: Mapping[str, Any] = {
    "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10_000.0}
}
_ATTENTIONS = ("sliding_attention", "full_attention")
_ALL_ALIKE: Mapping[str, Any] = {"head_dim": HEAD_DIM, "num_key_value_heads": HEADS}
_OWN: Mapping[str, Mapping[str, Any]] = {
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "granitemoehybrid": _MAMBA,
    "dbrx": {
        "attn_config": {"kv_n_heads": KV_HEADS, "rope_theta": 10_000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": INNER, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "bailing_hybrid": {"num_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "rope_parameters": {kind: {"rope_type": "default", "rope_theta": 10_000.0} for kind in _ATTENTIONS},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"num_experts": 4, "num_experts_per_tok": 2, "num_expert_group": 1, "topk_group": 1},
    "xmod": {"default_language": "en_XX"},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": HEADS, "n_shared_experts": 1},
    "dots3_note": {"num_key_value_heads": HEADS},
    "dots3_note_text": {
        "num_key_value_heads": HEADS,
        "ngram_vocab_size_base": 64,
        "make_ngram_vocab_size_divisible_by": 8,
        "ple_embed_dim": HEAD_DIM,
    },
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0}},
    "gpt_neo": {"attention_types": [[["global"], 2], [["local"], 1]]},
    "hunyuan_v1_dense": _ALL_ALIKE,
    "hunyuan_v1_moe": {**_ALL_ALIKE, "num_experts": 4, "moe_topk": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "longcat_flash": {"n_routed_experts": 4, "zero_expert_num": 2, "moe_topk": 2},
    "mamba2": {"head_dim": 16, "n_groups": 2},
    "ministral": _ALL_ALIKE,
    "idefics3": {"vision_config": {"patch_size": 8}},
    "mistral3": {"vision_config": {"patch_size": 8}},
    "nemotron": _ALL_ALIKE,
    "qwen2_vl": {"text_config": _ROPE},
    "qwen2_5_vl": {"text_config": _ROPE, "vision_config": {"fullatt_block_indexes": [1], "window_size": 112}},
    "qwen3_vl": {"vision_config": {"deepstack_visual_indexes": [1]}},
    "reformer": {"is_decoder": True, "axial_pos_embds": False, "attn_layers": ["local", "lsh", "local"]},
    "roc_bert": {
        "pronunciation_vocab_size": tiny.VOCAB,
        "pronunciation_embed_dim": HIDDEN,
        "shape_vocab_size": tiny.VOCAB,
        "shape_embed_dim": HIDDEN,
    },
    "zamba": {
        "num_hidden_layers": 5,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid", "mamba"],
        "attention_hidden_size": 2 * HIDDEN,
        "attention_head_dim": 2 * HIDDEN // HEADS,
    },
    "zamba2": {
        "num_hidden_layers": 5,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid", "mamba"],
        "attention_hidden_size": 2 * HIDDEN,
        "attention_head_dim": 2 * HIDDEN // HEADS,
        "n_mamba_heads": 8,
        "mamba_headdim": 8,
        "num_mem_blocks": 1,
    },
    "zaya": {"num_experts_per_tok": 1},
}


def model_types() -> list[str]:
    """Every model type that transformers has a causal language model for."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def shrunk_config(model_type: str) -> Any:
    """A config of this type for a model of a few thousand parameters. Raises whatever transformers raises."""
    whole = AutoConfig.for_model(model_type).to_dict()
    return AutoConfig.for_model(model_type, **_with(_shrunk(whole), _OWN.get(model_type, {})))


def _with(table: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """A table with keys of its own, in the tables within it too."""
    inner = {key: _with(table[key], value) for key, value in own.items() if isinstance(table.get(key), Mapping)}
    return {**table, **own, **inner}


def _shrunk(table: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a config, and of the configs in it, that have another value in a tiny model."""
    found = {key: _SIZES[key] for key, value in table.items() if key in _SIZES and _is_size(key, value)}
    if found.keys() >= {"kv_lora_rank", "qk_rope_head_dim"}:  # latent attention: positions in a part of each head
        found |= {"head_dim": found["qk_rope_head_dim"], "num_key_value_heads": HEADS}
    for key, value in table.items():
        if isinstance(value, dict) and "model_type" in value:
            found[key] = {"model_type": value["model_type"]} | _shrunk(value)
        elif isinstance(value, list) and key.endswith(("layer_types", "layers_type", "layers_block_type")):
            found[key] = _kinds(value)
    return found


def _is_size(key: str, value: Any) -> bool:
    return value is not None or key.endswith("_token_id")


def _kinds(layers: list[Any]) -> list[Any]:
    """LAYERS layers, of as many kinds as fit."""
    kinds = list(dict.fromkeys(layers))
    return (kinds * LAYERS)[:LAYERS]
