"""Merges of the tiny Llamas by many recipes at once: points of a sweep, each with its own way to merge or relax."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from lowmem_aim.events import Emit, silent
from lowmem_aim.jobs.merge_many import merge_many
from lowmem_aim.recipe.reader import read_recipe
from lowmem_aim.recipe.recipe import Recipe
from lowmem_aim.recipe.yaml_tree import parse
from lowmem_aim.system.options import DEFAULTS, Options
from lowmem_aim.view.feed import reported

WEIGHTED = {"weight": 0.3}


def point(folder: Path, method: str, parameters: Mapping[str, Any], **more: Any) -> Recipe:
    """A merge of `math`, `code` and `chat` in `folder`, with `aim` and `acm` among `more`, as a recipe file has it."""
    table = {
        "merge_method": method,
        "base_model": str(folder / "base"),
        "models": [{"model": str(folder / name)} for name in ("math", "code", "chat")],
        "parameters": dict(parameters),
    }
    return read_recipe(parse(yaml.safe_dump({**table, **more}), "recipe.yml"))


def points(folder: Path, calibration: Path) -> dict[str, Recipe]:
    """Methods of none to five rounds, without a base and with one, relaxed in several ways and not at all."""
    cut = {**WEIGHTED, "density": 0.4}
    aim = {"calibration": str(calibration), "omega": 0.2}
    return {
        "ties": point(folder, "ties", cut),
        "ties-0.2": point(folder, "ties", cut, aim=aim),
        "ties-0.6": point(folder, "ties", cut, aim={**aim, "omega": 0.6}),
        "ties-permuted": point(folder, "ties", cut, aim={**aim, "control": "permuted", "control_seed": 3}),
        "ties-dense": point(folder, "ties", {**cut, "density": 0.7, "rescale": True}, aim=aim),
        "dare": point(folder, "dare_ties", cut),
        "della": point(folder, "della", cut),
        "plain": point(folder, "task_arithmetic", WEIGHTED, aim={**aim, "exclude": ["mlp"]}),
        "sce": point(folder, "sce", {"select_topk": 0.3}),
        "stock": point(folder, "model_stock", {}),
        "linear": point(folder, "linear", WEIGHTED),
        "linear-0.2": point(folder, "linear", WEIGHTED, aim=aim),
    }


def merged(recipes: Mapping[str, Recipe], out: Path, options: Options = DEFAULTS, emit: Emit = silent) -> Path:
    """Merge by all recipes into folders in `out`; return `out`."""
    with reported("merge", out, emit) as feed:
        merge_many(recipes, out, options, feed)
    return out
