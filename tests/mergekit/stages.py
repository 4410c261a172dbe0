"""Recipes of several documents, by mergekit-multi and by us, in either order: the same tensors."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tiny
import yaml
from safetensors.torch import load_file
from torch import Tensor

from lowmem_aim.jobs.merge import merge
from lowmem_aim.recipe.reader import read_recipe
from lowmem_aim.recipe.yaml_tree import load_tree
from lowmem_aim.system.options import Options

TOLERANCE = 1e-6  # of a tensor's largest magnitude
Document = dict[str, Any]


def stages(work: Path, python: Path) -> Iterator[tuple[str, str]]:
    """(what was compared, what is wrong with it), of every recipe below."""
    base = tiny.build("llama", work / "base")
    for number in range(3):
        tiny.perturbed(base, work / f"expert-{number}", scale=0.01 * (number + 1), seed=number + 1)
    for name, documents in recipes(work).items():
        for order in (1, -1):
            file = work / f"{name}{order}.yml"
            file.write_text(yaml.safe_dump_all(documents[::order]))
            yield f"stages {file.stem}", _compared(file, python)


def recipes(models: Path) -> dict[str, Sequence[Document]]:
    base, *experts = [str(models / name) for name in ("base", "expert-0", "expert-1", "expert-2")]

    def listed(*names: str, **parameters: float) -> list[Document]:
        return [{"model": name, "parameters": parameters} for name in names]

    linear = {"name": "soup", "merge_method": "linear", "models": listed(*experts[:2], weight=0.5), "dtype": "float32"}
    ties = {
        "name": "trimmed",
        "merge_method": "ties",
        "base_model": base,
        "models": listed("soup", experts[2], weight=0.6, density=0.5),
        "dtype": "float32",
    }
    slerp = {
        "merge_method": "slerp",
        "base_model": "soup",
        "models": [{"model": "trimmed"}],
        "parameters": {"t": [{"filter": "mlp", "value": [0.1, 0.9]}, {"value": 0.4}]},
        "dtype": "float32",
    }
    ranges = [("soup", 0, 2), (experts[2], 1, 3)]
    stack = {
        "merge_method": "passthrough",
        "slices": [{"sources": [{"model": model, "layer_range": [first, end]}]} for model, first, end in ranges],
        "dtype": "float32",
    }
    return {"three": [linear, ties, slerp], "stacked": [linear, stack]}


def _compared(file: Path, python: Path) -> str:
    theirs, ours = file.with_suffix(".theirs"), file.with_suffix(".ours")
    command = [python.with_name("mergekit-multi"), file, "--out-path", theirs, "-I", file.with_suffix(".stages")]
    done = subprocess.run([*map(str, command), "--no-write-model-card"], capture_output=True, text=True)
    if done.returncode:
        return f"mergekit failed: {done.stderr.splitlines()[-1:]}"
    merge(read_recipe(load_tree(file)), ours, Options(use_cache=False))
    return _apart(_tensors(ours), _tensors(theirs))


def _tensors(folder: Path) -> dict[str, Tensor]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def _apart(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> str:
    if ours.keys() != theirs.keys():
        return f"other tensors: {sorted(ours.keys() ^ theirs.keys())[:4]}"
    for name, value in ours.items():
        difference = (value.double() - theirs[name].double()).abs().max() / value.double().abs().max()
        if not difference <= TOLERANCE:
            return f"`{name}` differs by {float(difference):.1e}"
    return ""
