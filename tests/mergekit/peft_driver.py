"""Runs in mergekit's environment, which has PEFT: makes adapters of a base, and merges them into it.

Arguments: the base's folder, and a folder with a `NAME.json` for each adapter, the keyword arguments of LoraConfig.
For each come the folders `NAME` (the adapter) and `NAME-merged` (`merge_and_unload` in float32), or `NAME.error`.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM


def train(model: Any, seed: int) -> None:
    """Random values for all that is trained."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if not value.requires_grad:
                continue
            noise = torch.randn(value.shape, generator=random)
            value.copy_(value * (1 + 0.2 * noise) if "magnitude" in name else value + 0.1 * noise)


def main(base: Path, folder: Path) -> None:
    for number, file in enumerate(sorted(folder.glob("*.json"))):
        adapter = file.with_suffix("")
        try:
            settings = json.loads(file.read_text())
            dtype = getattr(torch, settings.pop("adapter_dtype", "float32"))
            model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**settings))
            train(model, number)
            model.to(dtype).save_pretrained(adapter)
            plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
            merged = PeftModel.from_pretrained(plain, adapter).merge_and_unload()
            merged.save_pretrained(f"{adapter}-merged")
        except Exception:
            file.with_suffix(".error").write_text(traceback.format_exc())


main(Path(sys.argv[1]), Path(sys.argv[2]))
