"""The words that recipe values may be; imports nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

DTYPES = ("float32", "float16", "bfloat16")
# The AIM authors' calibration set, and their rule for it: shuffled, texts of more than block_size tokens skipped.
PILE = "mit-han-lab/pile-val-backup"
BUILTIN = "builtin"


def is_activations_file(calibration: str) -> bool:
    return calibration.endswith(".safetensors")


def is_here(calibration: str) -> bool:
    """Whether texts or activations need not be fetched from the Hub."""
    path = Path(calibration).expanduser()
    return calibration == BUILTIN or path.suffix in (".jsonl", ".txt", ".safetensors") or path.is_file()


Normalise = Literal["samples", "layers"]
NORMALISATIONS: tuple[Normalise, ...] = ("samples", "layers")
SCALINGS = ("identity", "sqrt", "square", "rank")
