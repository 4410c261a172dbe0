"""A tensor's layer, its kind within the layer and its depth in the model, from its name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any


def layer_count(config: Mapping[str, Any]) -> int:
    """The number of layers that a config gives, under any of the names for it; 0 if it gives none."""
    text_config = config.get("text_config")
    for table in (config, text_config if isinstance(text_config, dict) else {}):
        for key in ("num_hidden_layers", "n_layer", "n_layers", "num_layers"):
            if isinstance(table.get(key), int):
                return int(table[key])
    return 0


def layer_of(tensor: str, layers: int) -> int | None:
    """The index of the layer, from the tensor's name; None for tensors outside the layers."""
    match = re.search(r"(?:^|\.)(\d+)\.", tensor)
    return int(match[1]) if match and int(match[1]) < layers else None


def kind_of(tensor: str, layer: int | None) -> str:
    """The module's name within its layer, with `*` for the numbers of experts: `self_attn.q_proj`.

    Outside the layers it is the last part of the name; in other lists of layers, as a vision tower has, it begins with
    the list: `blocks.*.attn.qkv`.
    """
    name = tensor.removesuffix(".weight")
    if layer is None and (listed := re.search(r"(?:^|\.)([^.]+\.\d+\..*)", name, re.S)):  # anchored: names may be long
        return ".".join("*" if part.isdecimal() else part for part in listed[1].split("."))
    if layer is None:
        return ".".join(name.split(".")[-2:] if name.endswith(".bias") else name.split(".")[-1:])
    inside = name.partition(f".{layer}.")[2] if not name.startswith(f"{layer}.") else name.partition(".")[2]
    return ".".join("*" if part.isdecimal() else part for part in inside.split("."))


def depth(tensor: str, layers: int) -> float:
    """A tensor's place on a gradient, in [0, 1]: layer index / (layers - 1).

    Tensors outside the layers have 0, as in mergekit.
    """
    index = layer_of(tensor, layers) or 0
    return index / (layers - 1) if layers > 1 else 0.0
