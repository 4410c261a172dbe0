"""The quantisation of a model, as far as its config and the names and dtypes of its tensors say."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowmem_aim.errors import ModelError, printable
from lowmem_aim.models.config import CONFIG
from lowmem_aim.models.headers import TensorInfo
from lowmem_aim.system.dtypes import DTYPES

KEYS = ("quantization_config", "compression_config")
UNQUANTISED = "merge the unquantised models, then quantise the result"
# What GPTQ and AWQ, bitsandbytes, FP8, compressed-tensors and MXFP4 store beside or in place of a weight.
_PARTS = re.compile(
    r"\.(qweight|qzeros|g_idx|absmax|quant_map|nested_absmax|nested_quant_map|SCB|weight_packed"
    r"|weight_scale|weight_scale_2|weight_zero_point)$|_scale_inv$|\.quant_state\.|_proj_(blocks|scales)$"
)


def quantisation_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The table in which a config says how the weights are quantised, its own or its text model's; empty if none."""
    for table in (config, config.get("text_config")):
        found = next(filter(None, map(table.get, KEYS)), None) if isinstance(table, Mapping) else None
        if found:
            return found if isinstance(found, Mapping) else {"quant_method": found}
    return {}


def method_of(settings: Mapping[str, Any]) -> str:
    """The name of the quantisation; older versions of bitsandbytes did not write theirs."""
    if not settings.get("quant_method") and (settings.get("load_in_8bit") or settings.get("load_in_4bit")):
        return "bitsandbytes"
    return str(settings.get("quant_method", ""))


def without_quantisation(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the same model with plain weights."""
    plain = {key: value for key, value in config.items() if key not in KEYS}
    if isinstance(text := plain.get("text_config"), Mapping):
        plain["text_config"] = {key: value for key, value in text.items() if key not in KEYS}
    return plain


def packed_parts(tensors: Mapping[str, TensorInfo]) -> list[str]:
    """The names of tensors that are, or look like, parts of quantised weights."""
    plain = set(DTYPES.values())
    return [name for name, info in tensors.items() if _PARTS.search(name) or info.dtype not in plain]


def refuse_quantised(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> None:
    """Raise ModelError for a model that says it is quantised, or whose tensors look like it."""
    shown, settings = printable(str(folder)), quantisation_of(config)
    if settings:
        method = method_of(settings)
        key = next((key for key in KEYS if config.get(key)), KEYS[0])
        told = f"`{key}`" + (f": {printable(method, 40)}" if method else "")
        raise ModelError(f"`{shown}` is quantised ({told} in its {CONFIG})", UNQUANTISED)
    if parts := packed_parts(tensors):
        raise ModelError(f"`{shown}` is quantised (it holds `{printable(parts[0])}`)", UNQUANTISED)
