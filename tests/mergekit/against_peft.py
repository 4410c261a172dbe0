"""Our `base+adapter` against PEFT's `merge_and_unload` in float32: to 1e-6 of a tensor's largest magnitude.

Then recipes with `base+adapter` against mergekit, which merges adapters by PEFT.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tiny
from safetensors.torch import load_file
from torch import Tensor

from lowmem_aim.events import silent
from lowmem_aim.jobs.merge import merge
from lowmem_aim.models.hub import locate
from lowmem_aim.models.opening import opened
from lowmem_aim.models.reader import Reader
from lowmem_aim.recipe.reader import read_recipe
from lowmem_aim.recipe.yaml_tree import load_tree
from lowmem_aim.system.options import Options

HERE = Path(__file__).parent
TOLERANCE = 1e-6
LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GPT2 = ["c_attn", "c_proj", "c_fc"]

# Architecture -> the config's changes, and each adapter's settings.
ADAPTERS: dict[str, tuple[dict[str, Any], dict[str, dict[str, Any]]]] = {
    "llama": (
        {},
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
    "qwen2": (
        {},
        {
            "tied": {"target_modules": ["embed_tokens", "q_proj"]},
            "biases": {"target_modules": ["q_proj", "v_proj"], "bias": "all"},
            "lora_bias": {"target_modules": ["q_proj", "k_proj"], "lora_bias": True},
        },
    ),
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
    yield from against_mergekit(work, python)


# Recipes of the adapters of a Llama; BASE and ADAPTERS are paths.
RECIPES = {
    "linear": """
merge_method: linear
models:
  - {model: BASE+ADAPTERS/plain, parameters: {weight: 0.6}}
  - {model: {model: {path: BASE}, lora: {path: ADAPTERS/dora}}, parameters: {weight: 0.4}}
dtype: float32
""",
    "task_arithmetic": """
merge_method: task_arithmetic
base_model: BASE
models:
  - {model: BASE+ADAPTERS/patterns, parameters: {weight: 0.5}}
  - {model: BASE+ADAPTERS/saved, parameters: {weight: 0.3}}
dtype: float32
""",
    "slerp": """
merge_method: slerp
base_model: BASE+ADAPTERS/stabilised
models:
  - {model: BASE+ADAPTERS/stabilised}
  - {model: BASE+ADAPTERS/embedding}
parameters: {t: 0.4}
dtype: float32
""",
}


def against_mergekit(work: Path, python: Path) -> Iterator[tuple[str, str]]:
    """(what was compared, what is wrong with it), for recipes of the adapters that `adapters` has made in `work`."""
    recipes = work / "recipes"
    recipes.mkdir()
    folder = (work / "llama").absolute()
    for name, text in RECIPES.items():
        named = text.replace("BASE", str(folder / "base")).replace("ADAPTERS", str(folder / "adapters"))
        (recipes / f"{name}.yml").write_text(named)
    subprocess.run([str(python), str(HERE / "driver.py"), str(recipes)], check=True, capture_output=True)
    for name in RECIPES:
        recipe = recipes / f"{name}.yml"
        if (error := recipe.with_suffix(".error")).is_file():
            yield f"{name} of adapters", f"mergekit failed: {error.read_text().splitlines()[-1]}"
            continue
        out = merge(read_recipe(load_tree(recipe)), recipes / f"{name}-ours", Options(use_cache=False))
        ours, theirs = (load_file(place / "model.safetensors") for place in (out, recipe.with_suffix("")))
        if ours.keys() != theirs.keys():
            yield f"{name} of adapters", f"other tensors: {sorted(ours.keys() ^ theirs.keys())[:4]}"
            continue
        worst = max((apart(value, theirs[key]), key) for key, value in ours.items())
        yield f"{name} of adapters", f"`{worst[1]}` differs by {worst[0]:.1e}" if worst[0] > TOLERANCE else ""


def apart(found: Tensor, expected: Tensor) -> float:
    """The largest difference, in units of the largest magnitude."""
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


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
            difference = apart(found, expected)
            changed += not found.equal(before[name])
            if difference > worst:
                worst, where = difference, name
    if not changed:
        return "nothing is changed"
    return f"`{where}` differs by {worst:.1e}" if worst > TOLERANCE else ""
