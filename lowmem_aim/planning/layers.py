"""Carried here from plan.py."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any


def layer_count(config: Mapping[str, Any]) -> int:
    text_config = config.get("text_config")
    for table in (config, text_config if isinstance(text_config, dict) else {}):
        for key in ("num_hidden_layers", "n_layer", "num_layers"):
            if isinstance(table.get(key), int):
                return int(table[key])
    return 0


def layer_of(tensor: str, layers: int) -> int | None:
    """Its index from the tensor's name; None for tensors outside the layers."""
    match = re.search(r"(?:^|\.)(\d+)\.", tensor)
    return int(match[1]) if match and int(match[1]) < layers else None


def kind_of(tensor: str, layer: int | None) -> str:
    """The module's name in its layer, numbers of experts left out: `self_attn.q_proj`; outside the layers its own."""
    name = tensor.removesuffix(".weight")
    if layer is None:
        return ".".join(name.split(".")[-2:] if name.endswith(".bias") else name.split(".")[-1:])
    inside = name.partition(f".{layer}.")[2] if not name.startswith(f"{layer}.") else name.partition(".")[2]
    return ".".join("*" if part.isdecimal() else part for part in inside.split("."))


def depth(tensor: str, layers: int) -> float:
    """layer index / (layers - 1); 0 for tensors outside the layers."""
    index = layer_of(tensor, layers) or 0
    return index / (layers - 1) if layers > 1 else 0.0
