"""Weights quantised and decoded by bitsandbytes and compressed-tensors: run in their environment by `compare.py`.

    python made_elsewhere.py FOLDER

Makes a folder for each format in FOLDER: model.safetensors and config.json as the library would save them, and
truth.safetensors with what the library itself decodes, in bfloat16.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import torch
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
from compressed_tensors.compressors.naive_quantized import FloatQuantizationCompressor, IntQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import save_file
from torch import Tensor

SHAPES = ((96, 64), (200, 136), (33, 48), (1, 64))
Made = tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]  # settings, as stored, as decoded


def weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {f"layers.{i}.weight": torch.randn(shape).bfloat16() * 0.05 for i, shape in enumerate(SHAPES)}


def four_bit(kind: str, nested: bool, block: int) -> Made:
    stored: dict[str, Tensor] = {}
    truth: dict[str, Tensor] = {}
    for name, weight in weights().items():
        packed, state = bnb.quantize_4bit(weight, blocksize=block, compress_statistics=nested, quant_type=kind)
        parts = {f"{name}.{part}": value for part, value in state.as_dict(packed=True).items()}
        stored |= {name: packed, **parts}
        truth[name] = decoded(packed, state)
    return {"quant_method": "bitsandbytes", "load_in_4bit": True}, stored, truth


def decoded(packed: Tensor, state: bnb.QuantState) -> Tensor:
    """By the library; where a row is no whole number of blocks, by its plain kernel.

    Its compiled one for the CPU takes the magnitudes of wrong blocks there: its error is twice to thrice as large.
    """
    if state.shape[-1] % state.blocksize == 0:
        return bnb.dequantize_4bit(packed, state).to(torch.bfloat16)
    magnitudes = state.absmax
    if state.nested:
        magnitudes = bnb.dequantize_blockwise(magnitudes, state.state2) + state.offset
    flat = packed.reshape(-1)
    return _dequantize_4bit_compute(flat, magnitudes, state.code, state.blocksize, state.shape, torch.bfloat16)


def int8() -> Made:
    stored: dict[str, Tensor] = {}
    truth: dict[str, Tensor] = {}
    for name, weight in weights().items():
        values, largest, _ = bnb.int8_vectorwise_quant(weight.half())
        stored |= {name: values, name.replace("weight", "SCB"): largest}
        truth[name] = bnb.int8_vectorwise_dequant(values, largest).to(torch.bfloat16)
    return {"quant_method": "bitsandbytes", "load_in_8bit": True}, stored, truth


def compressed(kind: str, dtype: torch.dtype, strategy: str, block: list[int] | None = None) -> Made:
    compressor = FloatQuantizationCompressor if kind == "float" else IntQuantizationCompressor
    args = QuantizationArgs(num_bits=8, type=kind, strategy=strategy, block_structure=block, symmetric=True)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    stored: dict[str, Tensor] = {}
    truth: dict[str, Tensor] = {}
    for name, weight in weights().items():
        shape = {"tensor": (1,), "channel": (weight.shape[0], 1)}.get(strategy)
        if shape is None:
            assert block is not None
            shape = tuple(-(-size // step) for size, step in zip(weight.shape, block, strict=True))
        scale = (torch.rand(shape) * 0.002 + 0.0005).to(dtype)
        packed = compressor.compress({"weight": weight, "weight_scale": scale}, scheme)
        stored |= {name: packed["weight"], f"{name}_scale": packed["weight_scale"]}
        truth[name] = compressor.decompress(packed, scheme)["weight"].to(torch.bfloat16)
    group = {"targets": ["Linear"], "weights": args.model_dump(mode="json")}
    settings = {
        "quant_method": "compressed-tensors",
        "format": f"{kind}-quantized",
        "config_groups": {"group_0": group},
    }
    return settings, stored, truth


def all_made() -> Iterator[tuple[str, Made]]:
    for kind in ("nf4", "fp4"):
        for nested in (False, True):
            for block in (64, 128):
                yield f"bitsandbytes-{kind}{'-double' * nested}-{block}", four_bit(kind, nested, block)
    yield "bitsandbytes-int8", int8()
    for dtype in (torch.float32, torch.bfloat16):
        for kind in ("float", "int"):
            for strategy in ("tensor", "channel"):
                name = f"compressed-tensors-{kind}-{strategy}-{str(dtype).removeprefix('torch.')}"
                yield name, compressed(kind, dtype, strategy)
        name = f"compressed-tensors-float-block-{str(dtype).removeprefix('torch.')}"
        yield name, compressed("float", dtype, "block", [32, 16])


def main() -> None:
    for name, (settings, stored, truth) in all_made():
        folder = Path(sys.argv[1]) / name
        folder.mkdir(parents=True)
        save_file({key: value.contiguous() for key, value in stored.items()}, folder / "model.safetensors")
        save_file({key: value.contiguous() for key, value in truth.items()}, folder / "truth.safetensors")
        config = {"model_type": "llama", "quantization_config": settings}
        (folder / "config.json").write_text(json.dumps(config))


main()
