"""The tokens of the output, and the model whose tokenizer's files it takes over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lowmem_aim.models.checkpoint import Checkpoint
from lowmem_aim.models.reader import Reader
from lowmem_aim.models.vetted import tokenizer_config
from lowmem_aim.recipe.recipe import Tokenizer
from lowmem_aim.recipe.words import UNION


@dataclass(frozen=True)
class OutputTokenizer:
    """The tokenizer of an output. It holds no vocabulary, which takes memory for the whole run."""

    owner: Checkpoint  # whose files it has, but for what is new
    special: Mapping[str, int]  # purpose, such as `eos` -> id
    table: str = ""  # a new tokenizer.json; empty if the owner's files are taken as they are
    added: Sequence[Mapping[str, Any]] = ()  # its added tokens, as it has them
    new: frozenset[str] = frozenset()  # tokens that the owner does not have
    ordinary: bool = False  # tokens have come or gone that are no added ones, so that other vocabulary files are wrong


def output_tokenizer(
    asked: Tokenizer, owner: Checkpoint, models: Sequence[Checkpoint], rows: Mapping[Checkpoint, int], reader: Reader
) -> tuple[OutputTokenizer, Mapping[str, int]]:
    """(the tokenizer that a recipe asks for, of the models that are merged; its tokens: text -> row).

    `owner` is the base, or the model that the recipe names; `rows` are those of the models' embeddings. Raises
    ModelError.
    """
    own = reader.vocabulary(owner)
    asked_for = [token for token in asked.tokens if token not in own]
    others = [model for model in models if model.folder != owner.folder] if asked.source == UNION else []
    others = [model for model in others if reader.tokenizer(model) != reader.tokenizer(owner)]
    unchanged = OutputTokenizer(owner, _special(owner, own))
    if not asked_for and not others:
        return unchanged, own
    parts = [owner, *others]
    made = reader.united(parts, [rows.get(model) for model in parts], [*asked.tokens])
    if not made.changed:
        return unchanged, own
    new = frozenset(token for token in made.tokens if token not in own)
    return replace(unchanged, table=made.table, added=made.added, new=new, ordinary=made.ordinary), made.tokens


def _special(owner: Checkpoint, tokens: Mapping[str, int]) -> dict[str, int]:
    """The ids of the tokenizer's special tokens by their purposes, as its tokenizer_config.json names them."""
    found = {}
    for key, value in tokenizer_config(owner).items():
        text = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(text, str) and text in tokens:
            found[key.removesuffix("_token")] = tokens[text]
    return found
