"""Synthetic checkpoints of real shapes: a base and experts near it, bfloat16, seeded, made tensor by tensor once."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

EXPERTS = ("expert-1", "expert-2", "expert-3")
SPECIAL = ("<unk>", "<s>", "</s>")  # the first tokens
FORMAT = 2  # of what is built: another number builds anew
CHUNK = 1 << 22  # elements written at a time


@dataclass(frozen=True)
class Shape:
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int = 32_000
    experts: int = 3

    def nbytes(self, layers: int) -> int:
        """Of a model of these shapes with so many layers, bfloat16."""
        return 2 * sum(math.prod(size) for _, size in tensors(replace(self, layers=layers)))


SCALES = {
    "tiny": Shape(64, 128, 2, 4, 2, 512),
    "160m": Shape(768, 2048, 12, 12, 12),
    "1b": Shape(2048, 5632, 22, 32, 4),
    "3b": Shape(3200, 8640, 26, 32, 32),
    "7b": Shape(4096, 11008, 32, 32, 32),
    "8gb-tensor": Shape(4096, 128, 1, 32, 32, 1_000_000, experts=1),
    "13b": Shape(5120, 13824, 40, 40, 40),
}


def build(scale: str, work: Path, layers: int | None = None) -> Path:
    """The folder with base/ and expert-1/ ... of a scale, built unless it is there. `layers` overrides the scale's."""
    shape = SCALES[scale]
    if layers is not None:
        shape = replace(shape, layers=layers)
    folder = work / (scale if layers is None else f"{scale}-{layers}-layers")
    marker = folder / "built.json"
    wanted = json.dumps({"format": FORMAT, **shape.__dict__})
    if marker.is_file() and marker.read_text() == wanted:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    names = ("base", *EXPERTS[: shape.experts])
    for name in names:
        (folder / name).mkdir(parents=True)
        _save_small_files(folder / name, shape)
    _save_weights([folder / name / "model.safetensors" for name in names], shape)
    marker.write_text(wanted)
    return folder


def model_bytes(model: Path) -> int:
    """Of a built model's weights."""
    return (model / "model.safetensors").stat().st_size


def tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) of a Llama's tensors."""
    wide, narrow = shape.hidden, shape.hidden // shape.heads * shape.kv_heads
    yield "model.embed_tokens.weight", (shape.vocabulary, wide)
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}."
        yield f"{prefix}input_layernorm.weight", (wide,)
        for name, rows in (("q", wide), ("k", narrow), ("v", narrow), ("o", wide)):
            yield f"{prefix}self_attn.{name}_proj.weight", (rows, wide)
        yield f"{prefix}post_attention_layernorm.weight", (wide,)
        for name in ("gate", "up"):
            yield f"{prefix}mlp.{name}_proj.weight", (shape.intermediate, wide)
        yield f"{prefix}mlp.down_proj.weight", (wide, shape.intermediate)
    yield "model.norm.weight", (wide,)
    if shape.experts > 1:  # the single-tensor scale is tied, for the disk's sake
        yield "lm_head.weight", (shape.vocabulary, wide)


def _save_weights(files: list[Path], shape: Shape) -> None:
    """All models side by side, so that experts are made from the base's values while those are in memory."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(CHUNK + (1 << 16), generator=generator)  # drawn once, used from ever other places
    header = _header(shape)
    with ExitStack() as stack:
        streams = [stack.enter_context(file.open("wb")) for file in files]
        for stream in streams:
            stream.write(header)
        counter = 0
        for _, size in tensors(shape):
            count, is_norm = math.prod(size), len(size) == 1
            for first in range(0, count, CHUNK):
                length = min(CHUNK, count - first)
                values = _drawn(noise, counter, length) * (0.01 if is_norm else 0.02) + (1.0 if is_norm else 0.0)
                _write_models(streams, values.bfloat16(), noise, counter)
                counter += 1


def _write_models(streams: list[IO[bytes]], base: Tensor, noise: Tensor, counter: int) -> None:
    for number, stream in enumerate(streams):
        step = _drawn(noise, counter * 31 + number * 7 + 1, len(base)) * 0.002
        values = base if number == 0 else (base.float() + step).bfloat16()
        stream.write(values.view(torch.int16).numpy().tobytes())


def _drawn(noise: Tensor, counter: int, length: int) -> Tensor:
    """A stretch of the noise that is another for each counter, turned around for half of them."""
    start = counter * 7919 % (len(noise) - length + 1)
    stretch = noise[start : start + length]
    return stretch.flip(0) if counter % 2 else stretch


def _header(shape: Shape) -> bytes:
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, size in tensors(shape):
        end = offset + 2 * math.prod(size)
        table[name] = {"dtype": "BF16", "shape": list(size), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _save_small_files(folder: Path, shape: Shape) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": shape.experts == 1,
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",  # as older readers call it
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    # Special tokens are found inside of words too: none of them may begin another.
    table = {SPECIAL[i] if i < len(SPECIAL) else f"w{i}": i for i in range(shape.vocabulary)}
    words = Tokenizer(models.WordLevel(table, unk_token=SPECIAL[0]))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.decoder = decoders.Fuse()
    unknown, begin, end = SPECIAL
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token=begin, eos_token=end, unk_token=unknown)
    tokenizer.save_pretrained(folder)


def save_texts(file: Path, blocks: int, block_size: int, vocabulary: int) -> None:
    """Texts that make exactly `blocks` blocks of `block_size` tokens with the tokenizer above."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(len(SPECIAL), vocabulary, (blocks, block_size), generator=generator)
    lines = [json.dumps({"text": " ".join(f"w{i}" for i in row)}) for row in ids.tolist()]
    file.write_text("\n".join(lines) + "\n")
