"""The JSON of a model folder, above all config.json: checked for size, depth and values.

transformers builds a model from the config, layer by layer: a number that no model has would take hours and all memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lowmem_aim.errors import ModelError, printable
from lowmem_aim.system.files import input_errors, is_file, open_to_read

CONFIG = "config.json"
_FOLDER = "name the folder that holds config.json and the .safetensors files"
MAX_CONFIG_BYTES = 10_000_000  # a quantised model's may list every module; others have 2 kB
# Brackets, braces and commas of a header: about eight a tensor. The limit bounds the time and memory of decoding: a
# header of 100 MB could hold 30 million empty lists, in 2 GB. The largest models have 90,000 tensors in 160 files.
MAX_MARKS = 500_000
MAX_DEPTH = 50  # json, copy and repr fail, or crash the process, at some hundreds; real configs have five
MAX_LAYERS = 1_000  # the largest public models have 126
MAX_SIZE = 1 << 24
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
OTHER_LAYERS = ("depth", "encoder_layers", "decoder_layers", "num_encoder_layers", "num_decoder_layers")
# Keys that an architecture does not use are 0 or null; lists have one entry a layer.
SIZES = ("hidden_size", "vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size")
TIES = "tie_word_embeddings"
TEXT = "text_config"  # the table of a model that reads more than text
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "num_labels")


def too_many_values(text: bytes) -> bool:
    """Whether JSON holds more values than MAX_MARKS, which would take long, and much memory, to decode."""
    return sum(map(text.count, (b"[", b"{", b","))) > MAX_MARKS


LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def refuse_lfs_pointer(content: bytes, shown: str) -> None:
    """Raise ModelError if a file's first bytes are those of a Git LFS pointer; `shown` names the file."""
    if content.startswith(LFS_POINTER):
        raise ModelError(
            f"`{shown}` is a Git LFS pointer, not the file itself",
            hint="`git lfs pull` in that folder fetches the files",
        )


def load_json(file: Path, limit_bytes: int) -> Any:
    """The value in a JSON file; see `parse_json`.

    Raises ModelError, also for a file that has more than `limit_bytes` or cannot be read.
    """
    with input_errors(file), open_to_read(file) as stream:
        content = stream.read(limit_bytes + 1)  # a buffer of that size: the limit must be small
    if len(content) > limit_bytes:
        raise ModelError(f"`{printable(str(file))}` has more than {limit_bytes} bytes")
    return parse_json(content, file)


def parse_json(content: bytes, file: Path) -> Any:
    """The value of JSON text, which was read from `file`.

    Raises ModelError for a Git LFS pointer, and for text that is not JSON, has too many values, or is nested too deep.
    """
    shown = printable(str(file))
    refuse_lfs_pointer(content, shown)
    if too_many_values(content):
        raise ModelError(f"`{shown}` holds more than {MAX_MARKS} values")
    try:
        value = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"`{shown}` is not valid JSON: {printable(str(error))}") from error
    if _deeper(value, MAX_DEPTH):
        raise ModelError(f"`{shown}` is nested more than {MAX_DEPTH} deep")
    return value


def _deeper(value: Any, depth: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return depth < 0 or any(_deeper(item, depth - 1) for item in inner if isinstance(item, dict | list))


def config_of(folder: Path) -> dict[str, Any]:
    """The config.json of a model folder. Raises ModelError with everything that is wrong with it."""
    file, shown = folder / CONFIG, printable(str(folder))
    with input_errors(file):
        there = is_file(file)
    if not there:
        raise ModelError(f"`{shown}` has no {CONFIG}: it is not a Hugging Face model folder", _FOLDER)
    config = load_json(file, MAX_CONFIG_BYTES)
    if not isinstance(config, dict):
        raise ModelError(f"`{printable(str(file))}` is not a JSON object")
    tables = [table for table in (config, config.get("text_config")) if isinstance(table, dict)]
    problems = [f"`{shown}`: {problem} in its {CONFIG}" for table in tables for problem in _wrong_values(table)]
    if problems:
        raise ModelError(problems, hint="download the model's config.json again")
    return config


def _wrong_values(table: Mapping[str, Any]) -> Iterator[str]:
    """The numbers that no model can have and the values of a wrong type, each as a message."""
    limits = {**dict.fromkeys(LAYERS, MAX_LAYERS), **dict.fromkeys(SIZES, MAX_SIZE), **dict.fromkeys(EXPERTS, 100_000)}
    for key, limit in limits.items():
        value = table.get(key)
        lowest = 1 if key in LAYERS else 0
        numbers = value if isinstance(value, list) and key not in LAYERS else [value]
        for number in numbers:
            if number is not None and not (type(number) is int and lowest <= number <= limit):
                yield f"`{key}` is {_shown(number)}, not a whole number from {lowest} to {limit},"
                break
    for key, kind, what in (("model_type", str, "no text"), (TIES, bool, "neither true nor false")):
        if not isinstance(table.get(key), kind | None):
            yield f"`{key}` is {_shown(table[key])}, {what},"


def _shown(value: Any) -> str:
    return printable(repr(value) if isinstance(value, str) else json.dumps(value), 60)
