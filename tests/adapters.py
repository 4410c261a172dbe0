"""LoRA adapters of the tiny models, written as PEFT writes them, and the float64 formula that they are held against."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

PREFIX = "base_model.model."
RANK, ALPHA = 4, 6


def write(folder: Path, tensors: Mapping[str, Tensor], **config: Any) -> Path:
    """An adapter of these tensors (names without PEFT's prefix) in `folder`; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    plain = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "base_model_name_or_path": "tiny/base"}
    (folder / "adapter_config.json").write_text(json.dumps(plain | config))
    named = {PREFIX + name: value.contiguous() for name, value in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def factors(shapes: Mapping[str, tuple[int, int]], rank: int = RANK, seed: int = 1, **dtype: Any) -> dict[str, Tensor]:
    """Random `lora_A` and `lora_B` for modules of these shapes, (out, in)."""
    random = torch.Generator().manual_seed(seed)
    found = {}
    for module, (out, width) in shapes.items():
        found[f"{module}.lora_A.weight"] = torch.randn(rank, width, generator=random).to(**dtype) / 4
        found[f"{module}.lora_B.weight"] = torch.randn(out, rank, generator=random).to(**dtype) / 4
    return found


def product(tensors: Mapping[str, Tensor], module: str, scaling: float = ALPHA / RANK) -> Tensor:
    """s B A of a module, (out, in) float64."""
    a, b = (tensors[f"{module}.lora_{part}.weight"].double() for part in "AB")
    return scaling * (b @ a)


def stored(folder: Path) -> dict[str, Tensor]:
    """The tensors of a model's one file."""
    return load_file(folder / "model.safetensors")


def shapes_of(folder: Path, *ends: str) -> dict[str, tuple[int, int]]:
    """Module -> (out, in), of the weights whose modules' names end so."""
    found = {}
    for name, value in stored(folder).items():
        module = name.removesuffix(".weight")
        if module.endswith(ends) and name != module:
            found[module] = (value.shape[0], value.shape[1])
    return found


def far(found: Tensor, expected: Tensor) -> float:
    """The largest difference, in units of the tensor's largest magnitude."""
    return float((found.double() - expected.double()).abs().max() / max(float(expected.abs().max()), math.ulp(0.0)))
