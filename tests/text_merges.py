"""Merges of two experts with texts of their own, as recipes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tiny

from lowmem_aim.recipe.from_flags import applied, empty_recipe
from lowmem_aim.recipe.reader import read_recipe
from lowmem_aim.recipe.recipe import Recipe

NAMES = ("math", "code")
TEXTS = {
    "math": ["two and two are four", "what is six times seven? it is forty-two.", "9 + 1 = 10"],
    "code": ["def f(x): return x + 1", "print(sum(range(10)))"],
}
WEIGHT = (0.5, 1.0)


def models(architecture: str, folder: Path) -> Path:
    """`base`, `math` and `code` in a folder, with their texts, of which each line is run by itself."""
    base = tiny.build(architecture, folder / "base")
    for seed, name in enumerate(NAMES, start=1):
        tiny.perturbed(base, folder / name, scale=0.03, seed=seed)
        lines = [json.dumps({"text": text}) + "\n" for text in TEXTS[name]]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder


def job(folder: Path, method: str, *, acm: bool = False, **flags: Any) -> Recipe:
    """The merge of the models by a method; with `acm`, relaxed by ACM, which takes the same texts as AIM."""
    experts = tuple(f"{folder / name}={folder / name}.jsonl" for name in NAMES)
    given = {"method": method, "base": str(folder / "base"), "expert": experts, "weight": tuple(map(str, WEIGHT))}
    tree = empty_recipe().with_item("acm", empty_recipe()) if acm else empty_recipe()
    return read_recipe(applied(tree, given | flags))
