"""The words that a recipe's values may be. Other packages import them from here without importing torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

DTYPES = ("float32", "float16", "bfloat16")
Normalise = Literal["samples", "layers"]
NORMALISATIONS: tuple[Normalise, ...] = ("samples", "layers")
SCALINGS = ("identity", "sqrt", "square", "rank")
# The AIM authors' calibration set, and their rule for it: shuffled, texts of more than block_size tokens skipped.
PILE = "mit-han-lab/pile-val-backup"
BUILTIN = "builtin"


def is_activations_file(calibration: str) -> bool:
    """Whether `calibration` is a file of measured activations, not of texts."""
    return calibration.endswith(".safetensors")


def is_here(calibration: str) -> bool:
    """Whether the texts or activations are on this machine, so that nothing is fetched from the Hub."""
    path = Path(calibration).expanduser()
    # os.path: a file that cannot be looked at is a matter for whoever opens it.
    return calibration == BUILTIN or path.suffix in (".jsonl", ".txt", ".safetensors") or os.path.isfile(path)
