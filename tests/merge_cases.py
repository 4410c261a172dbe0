"""Merges of the tiny Llamas, as recipes; and what lies in an output folder, by content."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
import yaml
from long_cases import others_long
from safetensors.torch import load_file

from lowmem_aim.recipe.from_flags import applied, empty_recipe
from lowmem_aim.recipe.reader import read_recipe
from lowmem_aim.recipe.recipe import Recipe
from lowmem_aim.recipe.yaml_tree import parse

# Flags of a merge by each method that differs in how it reads, measures or masks.
FLAGS: dict[str, dict[str, Any]] = {
    "linear": {},
    "task_arithmetic": {"weight": ("0.3",), "parameter": ("lambda=0.9",)},
    "ties": {"weight": ("0.3",), "density": ("0.4",), "parameter": ("rescale=true",)},
    "dare_linear": {"weight": ("0.3",), "density": ("0.4",)},
    "dare_ties": {"weight": ("0.3",), "density": ("0.4",)},
    "slerp": {"experts": ("math",), "parameter": ("t=0.4",)},
    "passthrough": {"experts": ("math",)},
    "breadcrumbs_ties": {"weight": ("0.3",), "density": ("0.4",)},
    "della": {"weight": ("0.3",), "density": ("0.4",)},
    "arcee_fusion": {"experts": ("math",)},
    "multislerp": {"weight": ("0.3",)},
    "widen": {},
}
# Each differs in its path through a merge: one pass; several, with cuts; random masks; angles of whole tensors; ranks
# within whole rows; columns. The others are close to one of these; `make test-long` merges with them too.
BY_METHOD = others_long(FLAGS, ("ties", "dare_ties", "slerp", "della", "widen"))


def recipe(
    folder: Path, method: str = "ties", experts: tuple[str, ...] = ("math", "code", "chat"), **flags: Any
) -> Recipe:
    """A merge of the models `base` and `experts` in `folder`; `flags` as the command line has them."""
    given = {"method": method, "base": str(folder / "base"), "expert": tuple(str(folder / e) for e in experts)}
    return read_recipe(applied(empty_recipe(), given | flags))


def with_aim(
    folder: Path,
    activations: Path,  # a file of measured activations, or of texts
    aim: dict[str, Any],
) -> Recipe:
    """A merge by task arithmetic of `math` and `code` in `folder`, with `aim` as a recipe file has it."""
    table = {
        "merge_method": "task_arithmetic",
        "base_model": str(folder / "base"),
        "models": [{"model": str(folder / name), "parameters": {"weight": 0.5}} for name in ("math", "code")],
        "aim": {"calibration": str(activations), **aim},
    }
    return read_recipe(parse(yaml.safe_dump(table), "recipe.yml"))


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of all shards in `folder`."""
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def digests(folder: Path) -> dict[str, str]:
    """File name -> sha256 of the output's files; what differs from run to run lies in a folder of its own."""
    files = [f for f in sorted(folder.rglob("*")) if f.is_file() and ".lowmem_aim" not in f.parts]
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}
