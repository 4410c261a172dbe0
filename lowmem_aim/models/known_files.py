"""The files of a model folder beside config.json and the weights, by name: what loaders read, and what nobody misses.

An output takes the first from its reference, the Hub is asked for them, and `verify` tells those that a run did not
write. Patterns are compared without regard to case.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Collection

MODULES = "modules.json"  # of sentence-transformers: it names the folders that belong to the model
# Vocabularies in JSON: a quarter of a million tokens and as many merges. No loader looks in them for code to run.
VOCABULARIES = ("tokenizer.json", "vocab*.json", "*_vocab.json", "tekken.json")
# What transformers, vLLM and sentence-transformers read. Plain data only: no code, no weights.
READ_BY_LOADERS = (
    *VOCABULARIES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.bpe",
    "merges.txt",
    "*.model",  # sentencepiece: tokenizer.model, spiece.model, sentencepiece.bpe.model
    "*.spm",
    "tokenizer.model.v*",  # of Mistral
    "*.tiktoken",
    "bpe.codes",
    "dict.txt",
    "emoji.json",
    "byte_maps.json",
    "word_*.json",
    "prophetnet.tokenizer",
    "normalizer.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "*processor_config.json",  # of images and videos, and of all together
    "*feature_extractor*.json",
    "audio_tokenizer_config.json",
    MODULES,
    "sentence_*config.json",
    "config_sentence_transformers.json",
)
TOKENIZERS = (
    *VOCABULARIES,
    "vocab.txt",
    "vocab.bpe",
    "*.model",
    "*.spm",
    "tokenizer.model.v*",
    "*.tiktoken",
    "bpe.codes",
)
# All that a tokenizer is made of, beside tokenizer_config.json.
OF_TOKENIZERS = (
    *TOKENIZERS,
    *("merges.txt", "dict.txt", "special_tokens_map.json", "added_tokens.json"),
    *("emoji.json", "byte_maps.json", "word_*.json", "prophetnet.tokenizer", "normalizer.json"),
)
LARGEST_FILE = 64_000_000  # bytes; the largest tokenizers have some 40 MB
IN_MODULES = ("*.json", "*.safetensors", *READ_BY_LOADERS)  # in the folders that modules.json names
LEGAL = ("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "USE_POLICY*")
# Weights in any format, what training has left, descriptions and pictures, and what this tool writes by itself.
NOT_MISSED = (
    "config.json",
    "*.safetensors",
    "*.index.json",
    *("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.onnx", "*.gguf"),
    "params.json",  # of consolidated.*.pth
    *("trainer_state.json", "*_results.json", "training_*", "latest", "zero_to_fp32.py"),
    *("*.md", "*.png", "*.jpg", "*.jpeg", "*.gif", "*.svg", "*.webp", "*.pdf"),
    *("mergekit_config.yml", "lowmem_aim.json"),
    *("original", "onnx", "openvino", "runs", "checkpoint-*", "global_step*", "evals"),
    *("assets", "images", "figures", "__pycache__"),
)


def fits(name: str, patterns: Collection[str]) -> bool:
    """Whether a file's name is one of the patterns'."""
    return any(fnmatch.fnmatchcase(name.lower(), pattern.lower()) for pattern in patterns)
