"""Output heads that a model's files hold although its config ties them to the embedding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lowmem_aim.errors import ModelError, printable
from lowmem_aim.models.inputs import Inputs


def repeated_heads(inputs: Inputs) -> frozenset[str]:
    """The tied heads that some model's files hold beside the embedding: an output leaves them out."""
    return frozenset(
        head
        for head, embedding in inputs.roles.tied.items()
        if any(head in model.tensors and embedding in model.tensors for model in inputs.checkpoints)
    )


def check_repeated(inputs: Inputs, has_weights: Callable[[Path], bool]) -> None:
    """Read the heads that are to be left out. Raises ModelError for those that do not equal their embedding."""
    problems = [
        f"`{printable(model.label)}`: `{printable(head)}` should be tied to `{printable(embedding)}` "
        "(`tie_word_embeddings`) but differs from it"
        for head, embedding in inputs.roles.tied.items()
        for model in dict.fromkeys(inputs.checkpoints)
        if head in model.tensors
        and embedding in model.tensors
        and all(map(has_weights, model.place))
        and not model.repeats(head, embedding)
    ]
    if problems:
        raise ModelError(
            problems, hint="set `tie_word_embeddings` to false in every config.json if the heads are meant to differ"
        )
