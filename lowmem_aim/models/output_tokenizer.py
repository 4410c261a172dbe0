"""The tokens of the output, and the model whose tokenizer's files it takes over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lowmem_aim.models.checkpoint import Checkpoint
from lowmem_aim.models.reader import Reader
from lowmem_aim.recipe.recipe import Tokenizer
from lowmem_aim.recipe.words import UNION


@dataclass(frozen=True)
class OutputTokenizer:
    """The tokenizer of an output."""

    owner: Checkpoint  # whose files it has, but for what is new
    tokens: Mapping[str, int]  # text -> row
    table: str = ""  # a new tokenizer.json; empty if the owner's files are taken as they are
    added: Sequence[Mapping[str, Any]] = ()  # its added tokens, as it has them
    new: frozenset[str] = frozenset()  # tokens that the owner does not have
    ordinary: bool = False  # tokens have come or gone that are no added ones, so that other vocabulary files are wrong


def output_tokenizer(
    asked: Tokenizer, owner: Checkpoint, models: Sequence[Checkpoint], rows: Mapping[Checkpoint, int], reader: Reader
) -> OutputTokenizer:
    """The tokenizer that a recipe asks for, of the models that are merged. Raises ModelError.

    `owner` is the base, or the model that the recipe names; `rows` are those of the models' embeddings.
    """
    own = reader.vocabulary(owner)
    asked_for = [token for token in asked.tokens if token not in own]
    others = [model for model in models if model.folder != owner.folder] if asked.source == UNION else []
    others = [model for model in others if reader.tokenizer(model) != reader.tokenizer(owner)]
    if not asked_for and not others:
        return OutputTokenizer(owner, own)
    parts = [owner, *others]
    made = reader.united(parts, [rows.get(model) for model in parts], [*asked.tokens])
    if not made.changed:
        return OutputTokenizer(owner, own)
    new = frozenset(token for token in made.tokens if token not in own)
    return OutputTokenizer(owner, made.tokens, made.table, made.added, new, made.ordinary)
