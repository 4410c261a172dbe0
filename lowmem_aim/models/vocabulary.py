"""Vocabularies: which row of a model's embedding holds which token of the reference.

`tokenizer_source: base` matches tokens by their text, so that experts with added, missing or permuted tokens merge.
Without it, row i is merged with row i, and tokenizers that give a row to different tokens are told, or refused.
A base that is only AIM's reference (`relax`) is matched by text where the tokenizers differ. It may lack tokens of the
model that is relaxed: their rows are not relaxed.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lowmem_aim.errors import LowmemAimError, ModelError, noted, printable, raise_all
from lowmem_aim.events import Emit, Notice
from lowmem_aim.models.checkpoint import Checkpoint
from lowmem_aim.models.inputs import Inputs
from lowmem_aim.models.reader import Reader
from lowmem_aim.models.roles import TensorRoles
from lowmem_aim.recipe.recipe import Recipe
from lowmem_aim.system.on_demand import torch

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLES = 3  # tokens that a message names


def row_maps_of(inputs: Inputs, recipe: Recipe, reader: Reader, emit: Emit) -> dict[Path, Tensor]:
    """The maps of the models whose rows are not simply the reference's, by folder.

    Raises ModelError for tokenizers that are missing where tokens are matched by text, for those that cannot be read,
    and, without `tokenizer_source`, for models that give more than half of their rows to other tokens.
    """
    errors: list[LowmemAimError] = []
    maps: dict[Path, Tensor | None] = {}
    for other in inputs.others:
        with noted(errors):
            if recipe.tokenizer_source:
                maps[other.folder] = _by_text(inputs, other, reader, emit)
            elif other is inputs.base and other not in inputs.experts:
                maps[other.folder] = _of_mere_reference(inputs, other, reader, emit)
            else:
                _check_same_rows(inputs, other, reader, emit)
    raise_all(errors)
    return {folder: row_map for folder, row_map in maps.items() if row_map is not None}


def vocabulary_rows(roles: TensorRoles, checkpoint: Checkpoint) -> int:
    """Rows of a model's embedding, padding included; 0 if the model has none."""
    return next((t.shape[0] for t in checkpoint if t.name in roles.vocabulary), 0)


def _by_text(inputs: Inputs, other: Checkpoint, reader: Reader, emit: Emit) -> Tensor | None:
    """For each row of the reference's embedding the other's row of the same token; None if they are all the same."""
    sizes = [vocabulary_rows(inputs.roles, checkpoint) for checkpoint in (inputs.reference, other)]
    ours, theirs = reader.vocabulary(inputs.reference), reader.vocabulary(other)
    if ours == theirs and sizes[0] == sizes[1]:
        return None  # the same vocabulary, padding included
    rows = torch.full((sizes[0],), -1, dtype=torch.int64)  # padding stays the reference's
    known = [(row, theirs.get(token, -1)) for token, row in ours.items() if 0 <= row < sizes[0]]
    for row, theirs_id in known:
        if 0 <= theirs_id < sizes[1]:
            rows[row] = theirs_id
    matched = int((rows >= 0).sum())
    if 2 * matched < len(known):
        emit(
            Notice(
                f"only {matched} of the {len(known)} tokens of `{printable(inputs.reference.label)}` are tokens of "
                f"`{printable(other.label)}` too: is that the right model?",
                "warning",
            )
        )
    return rows


def _of_mere_reference(inputs: Inputs, base: Checkpoint, reader: Reader, emit: Emit) -> Tensor | None:
    """The map of a base that is not merged: by text where the two tokenizers differ, else by place."""
    rows, known = (vocabulary_rows(inputs.roles, model) for model in (inputs.reference, base))
    ours, theirs = _tokens_of_both(inputs, base, reader, emit)
    if ours != theirs:
        emit(Notice("the tokenizers of model and base differ: rows of the vocabulary are matched by token text"))
        row_map = _by_text(inputs, base, reader, emit)
        new = sum(token not in theirs for token, row in ours.items() if row < rows)
    elif rows == known:
        return None
    else:
        by_place = torch.arange(rows)
        row_map = torch.where(by_place < known, by_place, -1)
        new = max(0, rows - known)
    if new:
        emit(Notice(f"{new} row(s) of the vocabulary are not in the base and are not relaxed"))
    return row_map


def _check_same_rows(inputs: Inputs, other: Checkpoint, reader: Reader, emit: Emit) -> None:
    """Tell of rows that belong to different tokens. Raises ModelError if those are more than half."""
    rows = [vocabulary_rows(inputs.roles, model) for model in (inputs.reference, other)]
    if rows[0] != rows[1]:
        return  # refused by `check_tensors`, which sees the shapes
    ours, theirs = _tokens_of_both(inputs, other, reader, emit)
    at = {row: token for token, row in theirs.items()}
    different = [  # the one token may stand in several rows, and a row have several tokens
        (row, repr(at[row]), repr(token))
        for token, row in ours.items()
        if row < rows[0] and row in at and theirs.get(token) != row
    ]
    if not different:
        return
    shown = (f"row {row} is {theirs}, not {ours}" for row, theirs, ours in sorted(different)[:EXAMPLES])
    what = (
        f"`{printable(other.label)}` has other tokens than `{printable(inputs.reference.label)}` in {len(different)} "
        f"of {len(ours)} rows of the vocabulary: {printable(', '.join(shown))}"
    )
    hint = "`tokenizer_source: base` in the recipe matches tokens by their text"
    if 2 * len(different) > len(ours):
        raise ModelError(what, hint=hint)
    emit(Notice(f"{what}; they are merged row by row ({hint})", "warning"))


def _tokens_of_both(
    inputs: Inputs, other: Checkpoint, reader: Reader, emit: Emit
) -> tuple[dict[str, int], dict[str, int]]:
    """(the reference's tokens -> rows, the other's); both empty where they cannot differ, or cannot be compared."""
    models = (inputs.reference, other)
    try:
        files = [reader.tokenizer(model) for model in models]
        if not all(files) or files[0] == files[1]:
            return {}, {}
        return reader.vocabulary(models[0]), reader.vocabulary(models[1])
    except ModelError as error:  # a tokenizer that needs code of its own, say: whoever merges by rows can do without
        emit(Notice(f"the tokens of the models could not be compared: {'; '.join(error.problems)}", "warning"))
        return {}, {}
