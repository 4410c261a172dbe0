"""Models with other vocabularies merged by both tools: the same tokens, and for each token the same rows.

mergekit gives new tokens ids in an order that changes from run to run, so rows are compared by token; so are the rows
of padding, in their order.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tiny
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer
from vocabularies import ROWS, add_tokens, permute_rows, swap_tokens

from lowmem_aim.jobs.merge import merge
from lowmem_aim.recipe.reader import read_recipe
from lowmem_aim.recipe.yaml_tree import load_tree
from lowmem_aim.system.options import Options

HERE = Path(__file__).parent
TOLERANCE = 1e-6  # of a tensor's largest magnitude
TEXT = "hello <|im_start|>user, a lazy dog<|im_end|> <s> and <|tool|>"


@dataclass(frozen=True)
class Merge:
    """A recipe; `models` are names, with a weight each. Names of models in `tokenizer` are written as `@name`."""

    name: str
    tokenizer: Any  # of the key `tokenizer`, or, if it is a text, of `tokenizer_source`
    models: tuple[str, ...] = ("base", "math", "code")
    method: str = "linear"
    more: Mapping[str, Any] = field(default_factory=dict)
    fails: str = ""  # the end of mergekit's error, where it cannot do what we do

    def recipe(self, folder: Path) -> str:
        weights = (0.6, 0.3, 0.5)
        listed = [
            {"model": str(folder / name), "parameters": {"weight": weight}}
            for name, weight in zip(self.models, weights, strict=False)
        ]
        key = "tokenizer" if isinstance(self.tokenizer, dict) else "tokenizer_source"
        table = {
            "merge_method": self.method,
            "base_model": str(folder / "base"),
            "models": listed,
            key: _with_paths(self.tokenizer, folder),
            "dtype": "float32",
        }
        return yaml.safe_dump(table | dict(self.more), sort_keys=False)


def _with_paths(value: Any, folder: Path) -> Any:
    if isinstance(value, dict):
        return {key: _with_paths(item, folder) for key, item in value.items()}
    return str(folder / value[1:]) if isinstance(value, str) and value.startswith("@") else value


def _token(other: str, **which: Any) -> dict[str, Any]:
    return {"kind": "model_token", "model": other, **which}


ZERO = {"kind": "zero"}
MERGES = (
    Merge("union linear", "union"),
    Merge("union task_arithmetic", "union", ("math", "code"), "task_arithmetic"),
    Merge("union ties", "union", ("math", "code"), "ties", {"parameters": {"density": 0.5}}),
    Merge("union slerp", "union", ("base", "math"), "slerp", {"parameters": {"t": 0.3}}),
    Merge("union model_stock", "union", ("math", "code"), "model_stock"),
    Merge("base linear", "base"),
    Merge("base ties", "base", ("math", "code"), "ties", {"parameters": {"density": 0.5}}),
    Merge("a model", "@code"),
    Merge("a model in the long form", {"source": {"model": {"path": "@math"}}}),
    Merge("a model that is not merged", "@other"),
    Merge("sources of single tokens", {"tokens": {"<|im_end|>": {"source": "@code"}, "<|tool|>": {"source": ZERO}}}),
    Merge(
        "rows of other tokens",
        {
            "source": "union",
            "tokens": {
                "<|im_start|>": {"source": _token("@code", token="</s>")},
                "<|tool|>": {"source": _token("@base", token_id=7)},
            },
        },
    ),
    Merge(
        "force",
        {
            "source": "union",
            "tokens": {
                "<s>": {"source": "@math", "force": True},
                "!": {"source": ZERO, "force": True},
                "<|im_end|>": {"source": _token("@math", token="<pad>"), "force": True},
            },
        },
    ),
    Merge("a new token", {"source": "union", "tokens": {"<new>": {"source": _token("@math", token_id=5)}}}),
    Merge("padding", {"source": "union", "pad_to_multiple_of": 16}),
    Merge("padding ties", {"source": "base", "pad_to_multiple_of": 64}, ("math", "code"), "ties"),
    Merge("padding of a model", {"source": "@code", "pad_to_multiple_of": 8}),
    Merge("chat_template auto", "union", more={"chat_template": "auto"}),
    Merge(
        "a new token of the base's tokenizer",
        {"source": "base", "tokens": {"<new>": {"source": _token("@math", token_id=5)}}},
        fails="KeyError: 260",
    ),
)


def build(folder: Path) -> None:
    """A base of 260 tokens, experts that lack one and have others, in another order, and a tokenizer alone."""
    tiny.build("llama", folder / "base", vocab_size=259)
    for seed, name in enumerate(("math", "code"), start=1):
        tiny.perturbed(folder / "base", folder / name, scale=0.05, seed=seed)
    add_tokens(folder / "base", ["<|old|>"], seed=3)
    add_tokens(folder / "math", ["<|im_start|>", "<|im_end|>"], seed=1)
    add_tokens(folder / "code", ["<|im_end|>", "<|old|>", "<|tool|>"], seed=2)
    swap_tokens(folder / "code", 20)
    permute_rows(folder / "code", 20)
    tokenizer = AutoTokenizer.from_pretrained(folder / "math")
    tokenizer.add_tokens(["<|extra|>"], special_tokens=True)
    tokenizer.save_pretrained(folder / "other")
    for name, text in (("base", "{{ 'of the base' }}"), ("math", "{{ 'of most' }}\n"), ("code", "{{ 'of most' }}")):
        (folder / name / "chat_template.jinja").write_text(text)


def differences(folder: Path, python: Path) -> Iterator[tuple[str, str]]:
    """(what was compared, what is wrong with it)."""
    build(folder)
    recipes = folder / "recipes"
    recipes.mkdir()
    for number, case in enumerate(MERGES):
        (recipes / f"{number:03}.yml").write_text(case.recipe(folder))
    subprocess.run([str(python), str(HERE / "driver.py"), str(recipes)], check=True, capture_output=True)
    for number, case in enumerate(MERGES):
        file = recipes / f"{number:03}.yml"
        ours = merge(read_recipe(load_tree(file)), file.with_suffix(".ours"), Options(use_cache=False))
        yield f"tokenizers: {case.name}", _wrong(case, ours, file.with_suffix(""))


def _wrong(case: Merge, ours: Path, theirs: Path) -> str:
    error = theirs.with_suffix(".error")
    if error.is_file():
        last = error.read_text().splitlines()[-1]
        return "" if case.fails and last.endswith(case.fails) else f"mergekit failed: {last}"
    if case.fails:
        return f"mergekit no longer fails with {case.fails}"
    return wrong_rows(ours, theirs)


def wrong_rows(ours: Path, theirs: Path) -> str:
    """What differs in tokens, the cutting of a text, templates, the vocabulary's size, and rows by their tokens."""
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (ours, theirs)]
    ids = [tokenizer.get_vocab() for tokenizer in tokenizers]
    if ids[0].keys() != ids[1].keys():
        return f"other tokens: {sorted(ids[0].keys() ^ ids[1].keys())[:4]}"
    cuts = [tokenizer.convert_ids_to_tokens(tokenizer(TEXT)["input_ids"]) for tokenizer in tokenizers]
    if cuts[0] != cuts[1]:
        return f"texts are cut differently: {cuts}"
    chats = [conversation(tokenizer) for tokenizer in tokenizers]
    sizes = [json.loads((folder / "config.json").read_text())["vocab_size"] for folder in (ours, theirs)]
    if chats[0] != chats[1] or sizes[0] != sizes[1]:
        return f"conversations {chats}, sizes {sizes}"
    return _other_rows(*(_in_order(folder, own) for folder, own in zip((ours, theirs), ids, strict=True)))


def conversation(tokenizer: Any) -> str:
    """What the chat template makes of one; two texts of a template may mean the same."""
    said = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "world"}]
    return str(tokenizer.apply_chat_template(said, tokenize=False)) if tokenizer.chat_template else ""


def _in_order(folder: Path, ids: Mapping[str, int]) -> dict[str, Tensor]:
    """The tensors of a folder, with the rows of tokens by their text, and then those without a token."""
    found = {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}
    places = [ids[token] for token in sorted(ids)]
    for name in ROWS:
        rest = [row for row in range(len(found[name])) if row not in set(places)]
        found[name] = found[name][[*places, *rest]]
    return found


def _other_rows(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> str:
    if ours.keys() != theirs.keys():
        return f"other tensors: {sorted(ours.keys() ^ theirs.keys())[:4]}"
    for name, value in ours.items():
        if value.shape != theirs[name].shape:
            return f"`{name}` has the shape {list(value.shape)}, there {list(theirs[name].shape)}"
        difference = float((value - theirs[name]).abs().max() / value.abs().max().clamp(min=torch.finfo().tiny))
        if difference > TOLERANCE:
            return f"`{name}` differs by {difference:.1e}"
    return ""
