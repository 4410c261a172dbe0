"""Our `base+adapter` against PEFT's `merge_and_unload` in float32: to 1e-6 of a tensor's largest magnitude."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tiny
from safetensors.torch import load_file

from lowmem_aim.events import silent
from lowmem_aim.models.hub import locate
from lowmem_aim.models.opening import opened
from lowmem_aim.models.reader import Reader

HERE = Path(__file__).parent
TOLERANCE = 1e-6
LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GPT2 = ["c_attn", "c_proj", "c_fc"]

# Architecture -> the config's changes, and each adapter's settings.
ADAPTERS: dict[str, tuple[dict[str, Any], dict[str, dict[str, Any]]]] = {
    "llama": (
        {"attention_bias": True},
        {
            "plain": {"target_modules": LLAMA},
            "half": {"target_modules": LLAMA, "adapter_dtype": "bfloat16"},
            "stabilised": {"target_modules": LLAMA, "r": 6, "use_rslora": True},
            "patterns": {
                "target_modules": LLAMA,
                "rank_pattern": {"q_proj": 3, r".*layers\.1\.mlp\.up_proj": 5, "1.self_attn.k_proj": 2},
                "alpha_pattern": {"layers.0.self_attn.q_proj": 17, "^model.layers.2.mlp.down_proj": 3},
            },
            "saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
            "embedding": {"target_modules": ["embed_tokens", "lm_head", "v_proj"]},
            "biases": {"target_modules": ["q_proj", "v_proj"], "bias": "all"},
            "lora_bias": {"target_modules": ["q_proj", "o_proj"], "lora_bias": True},
            "dora": {"target_modules": LLAMA, "use_dora": True},
            "dora_embedding": {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True},
            "orthogonal": {"target_modules": LLAMA, "init_lora_weights": "orthogonal"},
        },
    ),
    "gpt2": (
        {},
        {
            "plain": {"target_modules": GPT2, "fan_in_fan_out": True},
            "square": {"target_modules": ["attn.c_proj"], "fan_in_fan_out": True},
            "unsaid": {"target_modules": ["attn.c_proj"]},
            "dora": {"target_modules": GPT2, "fan_in_fan_out": True, "use_dora": True},
            "positions": {"target_modules": ["wte", "wpe", "c_attn"]},
        },
    ),
    "qwen2": ({}, {"tied": {"target_modules": ["embed_tokens", "q_proj"]}}),
    "gemma": ({}, {"plain": {"target_modules": LLAMA}}),
    "gpt_neox": (
        {},
        {
            "plain": {"target_modules": ["query_key_value", "dense"], "lora_bias": True},
            "head": {"target_modules": ["dense"], "modules_to_save": ["lm_head"]},
        },
    ),
}


def adapters(work: Path, python: Path) -> Iterator[tuple[str, str]]:
    """(what was compared, what is wrong with it)."""
    for architecture, (changes, all_settings) in ADAPTERS.items():
        folder = work / architecture
        base = tiny.build(architecture, folder / "base", **changes)
        made = folder / "adapters"
        made.mkdir()
        for name, settings in all_settings.items():
            (made / f"{name}.json").write_text(
                json.dumps({"r": 8, "lora_alpha": 12, "task_type": "CAUSAL_LM"} | settings)
            )
        driver = [str(python), str(HERE / "peft_driver.py"), str(base), str(made)]
        subprocess.run(driver, check=True, capture_output=True)
        for name in all_settings:
            yield f"{architecture} adapter {name}", compared(base, made / name)


def compared(base: Path, adapter: Path) -> str:
    """What is wrong with the tensors of `base+adapter`, against those that PEFT merged; "" if nothing is."""
    if (error := adapter.with_suffix(".error")).is_file():
        return f"PEFT failed: {error.read_text().splitlines()[-1]}"
    theirs = load_file(Path(f"{adapter}-merged") / "model.safetensors")
    worst, where, changed = 0.0, "", 0
    before = load_file(base / "model.safetensors")
    with (
        Reader() as reader,
        opened(f"{base}+{adapter}", lambda *part: locate(part[0], silent, part[1]), "mmap", reader) as model,
    ):
        if model.tensors.keys() != theirs.keys():
            return f"other tensors: {sorted(model.tensors.keys() ^ theirs.keys())[:4]}"
        for name, expected in theirs.items():
            found = model.tensor(name)
            difference = float((found.double() - expected.double()).abs().max() / expected.double().abs().max())
            changed += not found.equal(before[name])
            if difference > worst:
                worst, where = difference, name
    if not changed:
        return "nothing is changed"
    return f"`{where}` differs by {worst:.1e}" if worst > TOLERANCE else ""
