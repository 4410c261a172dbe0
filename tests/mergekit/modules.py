"""Recipes with `modules`, and whole models with several lists of layers, by mergekit and by us, in float32.

mergekit leaves out what a recipe does not name, and tensors that its tables lack; ours has the base's. What
docs/from-mergekit.md says of modules in mergekit is checked too.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny
import yaml
from comparing import Tensors, same_tensors, tensors_in
from parted import PICTURES, pictured, saved
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from lowmem_aim.jobs.merge import merge
from lowmem_aim.recipe.reader import read_recipe
from lowmem_aim.recipe.yaml_tree import load_tree
from lowmem_aim.system.options import Options

HERE = Path(__file__).parent
HALF = {"d_model": 32, "vocab_size": tiny.VOCAB}
HALVES: Mapping[str, Mapping[str, Any]] = {
    "t5": {**HALF, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 4},
    "bart": {**HALF, "encoder_layers": 3, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48},
}
GATED = {"feed_forward_proj": "gated-gelu"}  # the only T5 that mergekit knows


@dataclass(frozen=True)
class Kind:
    """An architecture as mergekit divides it: its modules and the layers of each."""

    layers: Mapping[str, int]
    lost: tuple[str, ...] = ()  # parts of the names of tensors that mergekit drops, or of a buffer that it merges


SEEING = {"text_decoder": 3, "multi_modal_projector": 0, "vision_tower": 2}
KINDS: Mapping[str, Kind] = {
    "mistral3": Kind(SEEING),
    "qwen2_5_vl": Kind(SEEING, lost=("visual.merger.mlp",)),  # it counts them as layers, and a gradient's end stays
    "gemma3": Kind(SEEING, lost=("vision_model.head",)),
    "llama4": Kind({"text_decoder": 3, "multi_modal_projector": 0, "vision_model": 2}),
    "llava": Kind(
        {"default": 0, "model.language_model.layers": 3, "model.vision_tower.encoder.layers": 2},
        lost=("language_model",),
    ),
    "t5": Kind({"encoder": 3, "decoder": 2, "shared": 0}),
    "bart": Kind({"default": 0, "model.encoder.layers": 3, "model.decoder.layers": 2}, lost=("final_logits_bias",)),
}


def modules(work: Path, python: Path) -> Iterator[tuple[str, str]]:
    """(what was compared, what is wrong with it), of every recipe below; mergekit makes all first."""
    for kind in KINDS:
        _build(kind, work)
    chosen = {f"{kind} {name}": table for kind in KINDS for name, table in recipes(kind, work).items()}
    said = {"qwen2_vl": _one("text_decoder"), "plain_t5": _one("encoder"), "mistral3": _one("nonsense")}
    _build("qwen2_vl", work)
    _saved("t5", work / "plain_t5" / "math")
    chosen |= {f"{kind} refused": make(work / kind / "math") for kind, make in said.items()}
    for number, table in enumerate(chosen.values()):
        (work / f"{number:03}.yml").write_text(yaml.safe_dump(table, sort_keys=False))
    subprocess.run([str(python), str(HERE / "driver.py"), str(work)], check=True, capture_output=True)
    for number, name in enumerate(chosen):
        file = work / f"{number:03}.yml"
        yield f"modules {name}", _refused(file) if name.endswith("refused") else _wrong(name, file)


def _build(kind: str, work: Path) -> None:
    base = pictured(kind, work / kind / "base") if kind in PICTURES else _saved(kind, work / kind / "base")
    for seed, name in enumerate(("math", "code"), start=1):
        tiny.perturbed(base, work / kind / name, scale=0.02, seed=seed)
    for model in ("base", "math", "code") if kind == "gemma3" else ():  # as it was published
        tiny.rename(work / kind / model, lambda name: name.replace("vision_tower.", "vision_tower.vision_model."))


def _saved(kind: str, folder: Path) -> Path:
    more = GATED if kind == "t5" and folder.parent.name == kind else {}
    return saved(AutoModelForSeq2SeqLM, AutoConfig.for_model(kind, **HALVES[kind], **more), folder)


def recipes(kind: str, work: Path) -> dict[str, dict[str, Any]]:
    """Recipes of a kind of model: whole, its modules whole, by slices, and one module alone."""
    base, math, code = (str(work / kind / name) for name in ("base", "math", "code"))
    linear = {"merge_method": "linear", "dtype": "float32"}
    by_name = [{"filter": "q_proj", "value": [0, 2]}, {"value": 0.5}]
    weights = {base: 1.0, math: [1, 3], code: by_name}
    listed = [{"model": model, "parameters": {"weight": weight}} for model, weight in weights.items()]
    experts = [{"model": math}, {"model": code, "parameters": {"weight": [0.2, 0.9]}}]

    def stack(layers: int) -> dict[str, Any]:
        if not layers:
            return {"models": listed}
        taken = [(0, layers - 1, math), (layers - 1, layers, code), (layers - 1, layers, math)]
        return {
            "slices": [
                {
                    "sources": [
                        {"model": model, "layer_range": [first, end], "parameters": {"weight": 1.0}},
                        {"model": base, "layer_range": [first, end], "parameters": {"weight": [0.5, 2]}},
                    ]
                }
                for first, end, model in taken
            ]
        }

    layers = KINDS[kind].layers
    own = {name: {"models": experts, "parameters": {"weight": 0.3 + 0.2 * place}} for place, name in enumerate(layers)}
    return {
        "whole": {**linear, "models": listed},
        "by modules": {"merge_method": "ties", "base_model": base, "parameters": {"density": 0.6}, "modules": own}
        | {"dtype": "float32"},
        "slices": {**linear, "modules": {name: stack(count) for name, count in layers.items()}},
        "one module": {**linear, "modules": {next(iter(layers)): {"models": listed}}},
    }


def _one(module: str) -> Any:
    """A recipe of one module of one model, given its folder."""
    return lambda model: {"merge_method": "passthrough", "modules": {module: {"models": [{"model": str(model)}]}}}


def _refused(file: Path) -> str:
    """Whether mergekit still ends with an error, as docs/from-mergekit.md says."""
    return "" if file.with_suffix(".error").is_file() else "mergekit made a model"


def _wrong(name: str, file: Path) -> str:
    if (error := file.with_suffix(".error")).is_file():
        return f"mergekit failed: {error.read_text().splitlines()[-1]}"
    kind, _, what = name.partition(" ")
    out = merge(read_recipe(load_tree(file)), file.with_suffix(".ours"), Options(use_cache=False))
    ours, theirs = tensors_in(out), _in_our_names(kind, tensors_in(file.with_suffix("")))
    lost = KINDS[kind].lost
    left_out = {tensor for tensor in ours.keys() - theirs.keys() if not any(part in tensor for part in lost)}
    if bool(left_out) != (what == "one module"):
        return f"mergekit left out {len(left_out)} tensors: {sorted(left_out)[:4]}"
    same = [tensor for tensor in theirs if not any(part in tensor for part in lost)]
    return same_tensors({tensor: ours[tensor] for tensor in same if tensor in ours}, {t: theirs[t] for t in same})


def _in_our_names(kind: str, theirs: Tensors) -> Tensors:
    """mergekit names the tensors of architectures that it does not know as transformers does in memory."""
    if kind != "llava":
        return theirs
    return {name.removeprefix("model."): value for name, value in theirs.items()}
