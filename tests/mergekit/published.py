"""Recipes as people publish them (recipes/*.yml), made by both tools in float32 and compared.

Each recipe begins with a comment, its name. Compared are the tensors' names, shapes, dtypes and elements, what
config.json says of layers, tokens and dtype, and the tokenizers. A random method keeps the same share and expects the
same sum; with other vocabularies, rows are compared by token (see `tokens`).
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import adapters
import tiny
import tokens
import yaml
from cases import ARCEE_SHARE
from comparing import same_expectation, same_tensors, tensors_in
from transformers import AutoTokenizer

from lowmem_aim.errors import LowmemAimError
from lowmem_aim.jobs.merge import merge
from lowmem_aim.recipe.reader import read_recipe
from lowmem_aim.recipe.yaml_tree import load_tree
from lowmem_aim.system.options import Options

HERE = Path(__file__).parent
# Each has a base and three experts, in the folders ARCHITECTURE/NAME; recipes of Llama and Mistral speak of 32 layers.
ARCHITECTURES = ("llama", "mistral", "gpt2", "qwen2", "qwen3", "gemma", "gemma2", "phi3", "olmo2", "cohere2")
DEEP = {"llama": 32, "mistral": 32}
EXPERTS = {"math": 0.02, "code": 0.03, "chat": 0.01}  # name -> scale of the noise
RANDOM = ("dare_linear", "dare_ties", "della", "della_linear")
# Elements of equal magnitude at a threshold: here the first stay, which docs/methods.md says, and there others.
TIED_SHARE = 1e-5
THRESHOLDS = ("ties", "breadcrumbs", "breadcrumbs_ties", "sce")
# A float32 result that is one unit off is sometimes rounded to the other neighbour in a shorter dtype.
ROUNDED_SHARE = 1e-3


@dataclass(frozen=True)
class Published:
    """A recipe, by its first line's comment."""

    name: str
    text: str

    @property
    def table(self) -> dict[str, Any]:
        found: dict[str, Any] = yaml.safe_load(self.text)
        return found


def published() -> list[Published]:
    """All recipes, file by file."""
    found = []
    for file in sorted((HERE / "recipes").glob("*.yml")):
        for text in re.split(r"^---\n", file.read_text(), flags=re.MULTILINE):
            name, _, rest = text.partition("\n")
            found.append(Published(f"{file.stem}: {name.removeprefix('# ')}", rest))
    return found


def build(folder: Path) -> None:
    """The models that the recipes name, in `folder`."""
    for architecture in ARCHITECTURES:
        layers = {"num_hidden_layers": DEEP[architecture]} if architecture in DEEP else {}
        base = tiny.build(architecture, folder / architecture / "base", **layers)
        # With the tokens that the architecture's own class of tokenizers adds: published files have them.
        AutoTokenizer.from_pretrained(base).save_pretrained(base)
        for seed, (name, scale) in enumerate(EXPERTS.items(), start=1):
            tiny.perturbed(base, folder / architecture / name, scale=scale, seed=seed)
    tiny.build("llama", folder / "short" / "base", seed=1)
    tokens.build(folder / "tokens")
    shapes = adapters.shapes_of(folder / "llama" / "base", "q_proj", "v_proj", "down_proj")
    for seed, name in enumerate(("math", "code"), start=1):
        adapters.write(
            folder / "adapters" / name,
            adapters.factors(shapes, seed=seed),
            target_modules=["q_proj", "v_proj", "down_proj"],
            task_type="CAUSAL_LM",
        )


def differences(folder: Path, python: Path, part: str = "") -> Iterator[tuple[str, str]]:
    """(what was compared, what is wrong with it), of recipes with `part` in their names. mergekit makes all first."""
    build(folder)
    chosen = {f"{number:03}.yml": recipe for number, recipe in enumerate(published()) if part in recipe.name}
    for file, recipe in chosen.items():
        (folder / file).write_text(recipe.text)
    # Paths in recipes start at mergekit's current folder; ours looks beside the recipe, too.
    driver = [str(python), str((HERE / "driver.py").absolute()), "."]
    subprocess.run(driver, check=True, capture_output=True, cwd=folder)
    for file, recipe in chosen.items():
        yield f"recipes/{recipe.name}", _wrong(recipe, folder / file)


def _ours(file: Path, seed: int = 0) -> Path:
    out = file.with_suffix(f".ours-{seed}")
    return merge(read_recipe(load_tree(file)), out, Options(use_cache=False, seed=seed))


def _wrong(recipe: Published, file: Path) -> str:
    theirs = file.with_suffix("")
    if (error := file.with_suffix(".error")).is_file():
        return f"mergekit failed: {error.read_text().splitlines()[-1]}"
    try:
        ours = _ours(file)
    except LowmemAimError as error:
        return f"refused: {error}"
    if "tokens/" in recipe.text:
        return tokens.wrong_rows(ours, theirs)
    return _wrong_files(ours, theirs) or _wrong_tensors(recipe.table, file, ours, theirs)


def _wrong_tensors(table: dict[str, Any], file: Path, ours: Path, theirs: Path) -> str:
    found, expected = tensors_in(ours), tensors_in(theirs)
    method = table["merge_method"]
    if method in RANDOM:
        base, experts = table["base_model"], [entry["model"] for entry in table["models"]]
        before = tensors_in(file.parent / base)
        others = [tensors_in(file.parent / model) for model in experts if model != base]
        return same_expectation(found, expected, before, others) and same_expectation(
            tensors_in(_ours(file, seed=1)), expected, before, others
        )
    shares = {"arcee_fusion": ARCEE_SHARE, **dict.fromkeys(THRESHOLDS, TIED_SHARE)}
    rounded = ROUNDED_SHARE if table.get("out_dtype") else 0.0
    return same_tensors(found, expected, may_differ=max(shares.get(method, 0.0), rounded))


def _wrong_files(ours: Path, theirs: Path) -> str:
    """What differs in config.json and in the tokenizers."""
    facts = [_facts(folder) for folder in (ours, theirs)]
    differ = sorted(key for key in facts[0].keys() | facts[1].keys() if facts[0].get(key) != facts[1].get(key))
    return "; ".join(f"{key}: {facts[0].get(key)} against {facts[1].get(key)}" for key in differ)


def _facts(folder: Path) -> dict[str, Any]:
    config = json.loads((folder / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return {
        "layers": config.get("num_hidden_layers", config.get("n_layer")),
        "rows": config["vocab_size"],
        "dtype": config.get("dtype", config.get("torch_dtype")),
        "stored": sorted({str(value.dtype) for value in tensors_in(folder).values()}),
        "vocabulary": tokenizer.get_vocab(),
        "conversation": tokens.conversation(tokenizer),
    }
