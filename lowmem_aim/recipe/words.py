"""The words that a recipe's values may be. Other packages import them from here without importing torch."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal

DTYPES = ("float32", "float16", "bfloat16")
# What other tools call them.
SHORT_DTYPES = {
    **dict.fromkeys(("fp32", "f32", "float"), "float32"),
    **dict.fromkeys(("fp16", "f16", "half"), "float16"),
    "bf16": "bfloat16",
}
# A token's row: by the rule for all tokens, a model's row of the token, a model's row of another token, or zeros.
RowSource = Literal["usual", "model", "model_token", "zero"]
Normalise = Literal["samples", "layers"]
NORMALISATIONS: tuple[Normalise, ...] = ("samples", "layers")
SCALINGS = ("identity", "sqrt", "square", "rank")
SOLVED = "solved"  # a weight of task arithmetic
PERMUTED = "permuted"  # the control that is drawn
CONTROLS = ("uniform", PERMUTED, "inverted")  # what may take the place of AIM's factors, to judge AIM by
UNION, BASE = "union", "base"  # all models' tokens, or the base's
SOURCES = (UNION, BASE)
CHAT_TEMPLATES = ("alpaca", "chatml", "exaone", "llama3", "mistral")  # by name; their texts: `output.chat_templates`
# The AIM authors' calibration set, and their rule for it: shuffled, texts of more than block_size tokens skipped.
PILE = "mit-han-lab/pile-val-backup"
BUILTIN = "builtin"
_DATASET_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)


def is_activations_file(calibration: str) -> bool:
    """Whether `calibration` is a file of measured activations, not of texts."""
    return calibration.endswith(".safetensors")


def is_hub_id(text: str) -> bool:
    """Whether a path could as well be `owner/name[@revision]` on the Hub."""
    name = text.partition("@")[0]
    is_file = name.endswith((".jsonl", ".txt", ".safetensors"))
    return "/" in name and not is_file and _DATASET_ID.fullmatch(name) is not None


def is_here(calibration: str) -> bool:
    """Whether the texts or activations are on this machine, or nowhere: nothing is fetched from the Hub for them.

    A file or folder wins over a Hub dataset of the same name, and what is no dataset's id can only be a path.
    """
    path = Path(calibration).expanduser()
    is_path = path.suffix in (".jsonl", ".txt", ".safetensors") or not _DATASET_ID.fullmatch(calibration)
    # os.path: a file that cannot be looked at is a matter for whoever opens it.
    return calibration == BUILTIN or is_path or os.path.lexists(path)
