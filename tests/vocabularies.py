"""Models with other vocabularies, and the rows that a merge of them must have, by the plain rule in float64."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import tiny
import torch
from merge_cases import tensors_in
from torch import Tensor
from transformers import AutoTokenizer

ROWS = ("model.embed_tokens.weight", "lm_head.weight")


def add_tokens(folder: Path, tokens: Sequence[str], *, padding: int = 0, seed: int = 0) -> Path:
    """Add special tokens to the model's tokenizer, with random rows, and rows of padding after them; returns it."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(list(tokens), special_tokens=True)
    tokenizer.save_pretrained(folder)
    return resize(folder, len(tokenizer) + padding, len(tokenizer) - len(tokens), seed)


def resize(folder: Path, rows: int, kept: int, seed: int = 0) -> Path:
    """Give the model so many rows, the first `kept` of its own and random ones after them; returns it."""
    generator = torch.Generator().manual_seed(seed)

    def change(tensors: dict[str, Tensor]) -> None:
        for name in (name for name in ROWS if name in tensors):
            own = tensors[name][:kept]
            new = 0.1 * torch.randn(rows - kept, own.shape[1], generator=generator)
            tensors[name] = torch.cat([own, new.to(own.dtype)])

    tiny.edit_tensors(folder, change)
    tiny.edit_config(folder, vocab_size=rows)
    return folder


def swap_tokens(folder: Path, count: int) -> None:
    """Give the first `count` tokens' ids in reverse, and nothing else: the rows stay where they are."""
    file = folder / "tokenizer.json"
    data = json.loads(file.read_text())
    tokens = sorted(data["model"]["vocab"], key=data["model"]["vocab"].__getitem__)[:count]
    data["model"]["vocab"] |= dict(zip(tokens, reversed(range(count)), strict=True))
    file.write_text(json.dumps(data))


def permute_rows(folder: Path, count: int) -> None:
    """Put the rows where `swap_tokens` has put their tokens."""

    def change(tensors: dict[str, Tensor]) -> None:
        for name in ROWS:
            order = [*reversed(range(count)), *range(count, len(tensors[name]))]
            tensors[name] = tensors[name][order].clone()

    tiny.edit_tensors(folder, change)


def tokens_of(folder: Path) -> dict[str, int]:
    """Token text -> id, as transformers reads the tokenizer."""
    return dict(AutoTokenizer.from_pretrained(folder).get_vocab())


class Rows:
    """The rows of one tensor of several models, by token: what a merge has to start from."""

    def __init__(self, folders: Sequence[Path], tensor: str) -> None:
        """The first of the `folders` is the base."""
        self.tensors = [tensors_in(folder)[tensor].double() for folder in folders]
        self.ids = [tokens_of(folder) for folder in folders]

    def has(self, model: int, token: str) -> bool:
        """Whether a model has a row for the token."""
        return self.ids[model].get(token, len(self.tensors[model])) < len(self.tensors[model])

    def own(self, model: int, token: str) -> Tensor:
        """A model's own row of a token."""
        return self.tensors[model][self.ids[model][token]]

    def of(self, token: str, instead: Tensor | None = None, *, force: bool = False) -> list[Tensor]:
        """Each model's row of a token: its own, or what the rule gives, or `instead`."""
        models = range(len(self.tensors))
        owners = [model for model in models if self.has(model, token)]
        if instead is None:
            instead = torch.zeros(self.tensors[0].shape[1], dtype=torch.float64)
            if owners:
                giving = [0] if 0 in owners and len(owners) > 1 else owners
                instead = torch.stack([self.own(model, token) for model in giving]).mean(dim=0)
        return [instead if force or model not in owners else self.own(model, token) for model in models]


def weighted(rows: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The normalised weighted sum of `linear`."""
    total = sum((w * row for w, row in zip(weights, rows, strict=True)), torch.zeros_like(rows[0]))
    return total / sum(weights)
