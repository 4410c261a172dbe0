"""Tiny models quantised in every format that is read, and what each weight of them is by the format's formula.

The numbers are random: a decoder is right or wrong whatever they are. Formulas work on whole tensors, as papers and
libraries write them, and share nothing with the code that is tested.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

FP8 = torch.float8_e4m3fn


@dataclass
class Stored:
    """The tensors of a weight as they are stored, and the weight as float32."""

    tensors: dict[str, Tensor]
    weight: Tensor


@dataclass(frozen=True)
class Format:
    """A format: what a config says of it, and how a weight is stored."""

    settings: Mapping[str, Any]
    store: Callable[[str, Tensor, torch.Generator], Stored]  # name, the weight to have about, random numbers
    architecture: str = "llama"
    changes: Mapping[str, Any] = field(default_factory=dict)  # of the architecture's config
    wanted: str = "_proj.weight"  # how the names of quantised weights end


def fp8_values(weight: Tensor, scale: Tensor) -> Tensor:
    return (weight / scale).clamp(-448, 448).to(FP8)


def fp8_blocks(block: tuple[int, int], scale_dtype: torch.dtype = torch.float32, suffix: str = "_scale_inv") -> Any:
    """One scale for each block; those at the edges may be smaller."""

    def store(name: str, weight: Tensor, random: torch.Generator) -> Stored:
        rows, columns = weight.shape
        grid = -(-rows // block[0]), -(-columns // block[1])
        scales = (torch.rand(grid, generator=random) * 0.01 + 0.001).to(scale_dtype)
        over = scales.float().repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
        values = fp8_values(weight, over)
        return Stored({name: values, f"{name}{suffix}": scales}, values.float() * over)

    return store


def one_scale(suffix: str, shape: tuple[int, ...], number: torch.dtype = FP8) -> Any:
    """One scale for a tensor, of the shape that the format gives it."""

    def store(name: str, weight: Tensor, random: torch.Generator) -> Stored:
        scale = weight.abs().max() / 100
        values = (weight / scale).to(number) if number == torch.int8 else fp8_values(weight, scale)
        stem = name.removesuffix("weight")
        beside = {f"{stem}input_scale": torch.ones(1), f"{stem}activation_scale": torch.ones(())}
        return Stored({name: values, f"{name}{suffix}": scale.reshape(shape), **beside}, values.float() * scale)

    return store


def row_scales(suffix: str, number: torch.dtype = FP8, dtype: torch.dtype = torch.float32) -> Any:
    """One scale for each row."""

    def store(name: str, weight: Tensor, random: torch.Generator) -> Stored:
        scales = (weight.abs().amax(1, keepdim=True) / 100).to(dtype)
        values = (weight / scales.float()).round().to(number) if number == torch.int8 else fp8_values(weight, scales)
        return Stored({name: values, f"{name}{suffix}": scales}, values.float() * scales.float())

    return store


def int8_of_bitsandbytes(name: str, weight: Tensor, random: torch.Generator) -> Stored:
    largest = weight.abs().amax(1)
    values = (weight / largest[:, None] * 127).round().to(torch.int8)
    stem = name.removesuffix("weight")
    beside = {f"{stem}SCB": largest, f"{stem}weight_format": torch.zeros((), dtype=torch.uint8)}
    return Stored({name: values, **beside}, values.float() * largest[:, None] * 7.874015718698502e-3)


E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])


def mxfp4(name: str, weight: Tensor, random: torch.Generator) -> Stored:
    experts, height, width = weight.shape
    blocks = torch.randint(0, 256, (experts, width, height // 32, 16), generator=random, dtype=torch.uint8)
    scales = torch.randint(118, 124, (experts, width, height // 32), generator=random, dtype=torch.uint8)
    numbers = torch.stack([E2M1[(blocks & 15).long()], E2M1[(blocks >> 4).long()]], dim=-1).flatten(-2)
    numbers = numbers * torch.exp2(scales.float() - 127)[..., None]
    whole = numbers.flatten(-2).transpose(1, 2).contiguous()
    return Stored({f"{name}_blocks": blocks, f"{name}_scales": scales}, whole)


def four_bit(block: int = 64, nested: bool = False, storage: torch.dtype = torch.uint8) -> Any:
    """As bitsandbytes saves it: a table, largest magnitudes, and the state as text in a tensor of bytes."""

    def store(name: str, weight: Tensor, random: torch.Generator) -> Stored:
        count = weight.numel()
        blocks = -(-count // block)
        table = torch.linspace(-1, 1, 16)
        nibbles = torch.randint(0, 16, (count + count % 2,), generator=random)
        packed = (nibbles[0::2] << 4 | nibbles[1::2]).to(torch.uint8)
        state: dict[str, Any] = {"quant_type": "nf4", "blocksize": block, "dtype": "bfloat16"}
        state["shape"] = list(weight.shape)
        if nested:
            offset, table2 = 0.05, torch.linspace(-1, 1, 256)
            indices = torch.randint(0, 256, (blocks,), generator=random, dtype=torch.uint8)
            scales = torch.rand(-(-blocks // 8), generator=random) * 0.02
            magnitudes = table2[indices.long()] * scales.repeat_interleave(8)[:blocks] + torch.tensor(offset)
            state |= {"nested_blocksize": 8, "nested_dtype": "float32", "nested_offset": offset}
            extra = {f"{name}.absmax": indices, f"{name}.nested_absmax": scales, f"{name}.nested_quant_map": table2}
        else:
            magnitudes = torch.rand(blocks, generator=random) * 0.1
            extra = {f"{name}.absmax": magnitudes}
        text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        tensors = {name: packed.view(storage)[:, None], f"{name}.quant_map": table, **extra}
        tensors[f"{name}.quant_state.bitsandbytes__nf4"] = text
        values = table[nibbles[:count]] * magnitudes.repeat_interleave(block)[:count]
        return Stored(tensors, values.reshape(weight.shape))

    return store


def packed_along(numbers: Tensor, dim: int, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """Numbers packed into int32 along a dimension; the n-th bits of a word are those of number `order[n]`."""
    per_word = 32 // bits
    lines = numbers.movedim(dim, -1)
    lines = lines.reshape(*lines.shape[:-1], -1, per_word).long()
    words = sum(lines[..., (order or range(per_word))[i]] << (bits * i) for i in range(per_word))
    assert isinstance(words, Tensor)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32).movedim(-1, dim)


def gptq(bits: int = 4, group: int = 16, shuffled: bool = False, version: int = 1) -> Any:
    """Zero points are stored less one, in the first version."""

    def store(name: str, weight: Tensor, random: torch.Generator) -> Stored:
        outputs, inputs = weight.shape
        count = -(-inputs // group)
        groups = torch.arange(inputs) // group
        if shuffled:
            groups = groups[torch.randperm(inputs, generator=random)]
        numbers = torch.randint(0, 1 << bits, (inputs, outputs), generator=random)
        zeros = torch.randint(0, 1 << bits, (count, outputs), generator=random)
        scales = (torch.rand(count, outputs, generator=random) * 0.02).half()
        stem = name.removesuffix("weight")
        tensors = {
            f"{stem}qweight": packed_along(numbers, 0, bits),
            f"{stem}qzeros": packed_along((zeros - int(version == 1)) % (1 << bits), 1, bits),
            f"{stem}scales": scales,
            f"{stem}g_idx": groups.to(torch.int32),
        }
        return Stored(tensors, ((numbers - zeros[groups]).float() * scales.float()[groups]).t().contiguous())

    return store


def awq(name: str, weight: Tensor, random: torch.Generator) -> Stored:
    outputs, inputs = weight.shape
    order, group = (0, 2, 4, 6, 1, 3, 5, 7), 16
    groups = torch.arange(inputs) // group
    count = int(groups[-1]) + 1
    numbers = torch.randint(0, 16, (inputs, outputs), generator=random)
    zeros = torch.randint(0, 16, (count, outputs), generator=random)
    scales = (torch.rand(count, outputs, generator=random) * 0.02).half()
    stem = name.removesuffix("weight")
    tensors = {
        f"{stem}qweight": packed_along(numbers, 1, 4, order),
        f"{stem}qzeros": packed_along(zeros, 1, 4, order),
        f"{stem}scales": scales,
    }
    return Stored(tensors, ((numbers - zeros[groups]).float() * scales.float()[groups]).t().contiguous())


def compressed(number: str = "float", **weights: Any) -> dict[str, Any]:
    """What a config says of compressed-tensors."""
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": number, "symmetric": True, **weights}}
    form = f"{number}-quantized"
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}}


_BITSANDBYTES = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
_EXPERTS = {"intermediate_size": 64}
FORMATS: dict[str, Format] = {
    "fp8 with one scale": Format({"quant_method": "fp8"}, one_scale("_scale_inv", ())),
    "fp8 in blocks": Format({"quant_method": "fp8", "weight_block_size": [16, 8]}, fp8_blocks((16, 8))),
    "fp8 in partial blocks": Format({"quant_method": "fp8", "weight_block_size": [20, 12]}, fp8_blocks((20, 12))),
    "fbgemm": Format({"quant_method": "fbgemm_fp8"}, row_scales("_scale")),
    "compressed-tensors, a tensor": Format(compressed(strategy="tensor"), one_scale("_scale", (1,))),
    "compressed-tensors, channels": Format(compressed(strategy="channel"), row_scales("_scale", dtype=torch.bfloat16)),
    "compressed-tensors, blocks": Format(
        compressed(strategy="block", block_structure=[20, 12]), fp8_blocks((20, 12), torch.bfloat16, "_scale")
    ),
    "compressed-tensors, int8": Format(compressed("int", strategy="channel"), row_scales("_scale", torch.int8)),
    "mxfp4": Format({"quant_method": "mxfp4"}, mxfp4, "gpt_oss", _EXPERTS, "experts.{}_proj"),
    "nf4": Format(_BITSANDBYTES, four_bit()),
    "nf4, double": Format(_BITSANDBYTES, four_bit(nested=True)),
    "nf4 in blocks that end anywhere": Format(_BITSANDBYTES, four_bit(100)),
    "nf4 as bfloat16": Format(_BITSANDBYTES, four_bit(storage=torch.bfloat16)),
    "int8 of bitsandbytes": Format({"load_in_8bit": True}, int8_of_bitsandbytes),
    "gptq": Format({"quant_method": "gptq", "bits": 4, "group_size": 16}, gptq()),
    "gptq, 8 bits, shuffled": Format({"quant_method": "gptq", "bits": 8, "group_size": 16}, gptq(8, 16, True)),
    "gptq, 2 bits, version 2": Format(
        {"quant_method": "gptq", "bits": 2, "group_size": -1, "checkpoint_format": "gptq_v2"}, gptq(2, 999, version=2)
    ),
    "awq": Format({"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm"}, awq),
}


def is_packed(form: Format, name: str) -> bool:
    """Whether a weight of that name is quantised in a model of the format."""
    return any(name.endswith(form.wanted.format(part)) for part in ("gate_up", "down"))


def quantised(form: Format, base: Path, folder: Path, seed: int = 0) -> dict[str, Tensor]:
    """Make a quantised model of the one in `base`, in two shards; its weights by name, those quantised as float32."""
    folder.mkdir(parents=True)
    random = torch.Generator().manual_seed(seed)
    stored: dict[str, Tensor] = {}
    weights: dict[str, Tensor] = {}
    for file in base.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, folder)
    for name, value in sorted(load_file(base / "model.safetensors").items()):
        weights[name] = value
        if not is_packed(form, name):
            stored[name] = value
            continue
        made = form.store(name, value.float(), random)
        stored |= made.tensors
        weights[name] = made.weight
    names = sorted(stored)
    weight_map = {}
    for number, half in enumerate((names[::2], names[1::2]), start=1):  # the parts of a weight in different shards
        shard = f"model-0000{number}-of-00002.safetensors"
        save_file({name: stored[name].contiguous() for name in half}, folder / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(half, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = json.loads((base / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": dict(form.settings)}))
    return weights
