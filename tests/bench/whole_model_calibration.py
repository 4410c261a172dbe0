"""How activations are usually measured: the whole model in memory, hooks on every module, one block a forward.

    python whole_model_calibration.py MODEL TEXTS.jsonl DTYPE

The statistic is the same mean |x| per input channel, summed in float32.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(folder: str, texts: str, dtype: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    sums: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            mean = args[0].abs().float().mean(dim=(0, 1))
            sums[name] = sums[name] + mean if name in sums else mean

        return hook

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) or name.endswith("norm"):
            module.register_forward_pre_hook(watch(name))
    with torch.no_grad():
        for line in Path(texts).read_text().splitlines():
            ids = tokenizer(json.loads(line)["text"], return_tensors="pt")["input_ids"]
            model.base_model(input_ids=ids, use_cache=False)
    print(len(sums), "modules", float(sum(s.sum() for s in sums.values())))


if __name__ == "__main__":
    main(*sys.argv[1:])
