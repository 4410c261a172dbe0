"""Vocabularies: which rows of the models' embeddings belong together, and which tokens the output has.

With a tokenizer source, tokens are matched by their text, so that experts with added, missing or permuted tokens merge.
Without one, row i is merged with row i, and tokenizers that give a row to different tokens are told, or refused.
A base that is only AIM's reference (`relax`) is matched by text where the tokenizers differ. It may lack tokens of the
model that is relaxed: their rows are not relaxed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from lowmem_aim.errors import LowmemAimError, ModelError, noted, printable, raise_all
from lowmem_aim.events import Emit, Notice
from lowmem_aim.models.checkpoint import Checkpoint
from lowmem_aim.models.inputs import Inputs
from lowmem_aim.models.output_tokenizer import output_tokenizer
from lowmem_aim.models.reader import Reader
from lowmem_aim.models.roles import TensorRoles
from lowmem_aim.models.token_rows import TokenRows, Tokens, matched, token_rows
from lowmem_aim.recipe.recipe import Recipe, Tokenizer
from lowmem_aim.recipe.words import SOURCES
from lowmem_aim.system.on_demand import torch
from lowmem_aim.units import counted

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLES = 3  # tokens that a message names


def find_rows(
    inputs: Inputs, recipe: Recipe, opened: Mapping[str, Checkpoint | None], reader: Reader, emit: Emit
) -> None:
    """Find out which rows of the vocabularies belong together, and which tokenizer the output has, for `inputs`.

    `opened` are the models by their references. Raises ModelError for tokenizers that are missing where tokens are
    matched by text, for those that cannot be read, and, without a tokenizer source, for models that give more than half
    of their rows to other tokens; RecipeError for a token that the recipe gives a row that no model has.
    """
    if recipe.tokenizer is not None:
        _find_by_text(inputs, recipe.tokenizer, opened, reader, emit)
        return
    errors: list[LowmemAimError] = []
    for other in inputs.others:
        with noted(errors):
            if other is inputs.base and other not in inputs.experts:
                row_map = _of_mere_reference(inputs, other, reader, emit)
                if row_map is not None:
                    inputs.token_rows = TokenRows(len(row_map), {other.place: row_map}, {}, len(row_map))
            else:
                _check_same_rows(inputs, other, reader, emit)
    raise_all(errors)


def vocabulary_rows(roles: TensorRoles, checkpoint: Checkpoint) -> int:
    """Rows of a model's embedding, padding included; 0 if the model has none."""
    return next((t.shape[0] for t in checkpoint if t.name in roles.vocabulary), 0)


def _find_by_text(
    inputs: Inputs, asked: Tokenizer, opened: Mapping[str, Checkpoint | None], reader: Reader, emit: Emit
) -> None:
    found = inputs.reference if asked.source in SOURCES else opened[asked.source]
    assert found is not None  # else it is told why
    rows = {model: vocabulary_rows(inputs.roles, model) for model in inputs.opened.values()}
    errors: list[LowmemAimError] = []
    ids: dict[Checkpoint, Mapping[str, int]] = {}
    for model in rows:
        with noted(errors):
            ids[model] = reader.vocabulary(model)
    made = None
    with noted(errors):
        made = output_tokenizer(asked, found, [inputs.reference, *inputs.others], rows, reader)
    raise_all(errors)
    assert made is not None
    inputs.tokenizer, tokens = made
    known = {reference: Tokens(model, rows[model], ids[model]) for reference, model in inputs.opened.items()}
    if not inputs.tokenizer.table:  # then the owner's, some of which may have no row
        tokens = {token: row for token, row in tokens.items() if row < rows.get(found, row + 1)}
    count, mean_from = _sizes(tokens, rows.get(found, 0), asked.pad_to_multiple_of)
    padding = found if found in rows and mean_from == count else None
    inputs.token_rows = token_rows(tokens, count, mean_from, known, inputs.base, padding, asked.tokens)
    for other in (model for model in rows if model is not found):
        _tell_of_few(found, tokens, Tokens(other, rows[other], ids[other]), emit)
    _tell_of_zeros(tokens, known.values(), asked, emit)
    if new := len(inputs.tokenizer.new):
        what = f"the output has the tokenizer of `{printable(found.label)}` and {counted(new, 'more token')}"
        emit(Notice(f"{what}: {len(tokens)} tokens, {count} rows"))


def _sizes(tokens: Mapping[str, int], owned: int, multiple: int | None) -> tuple[int, int]:
    """(rows of the output's vocabulary, the first of them that is filled with a mean).

    `owned`: rows of the embedding of the tokenizer's owner, 0 if it is not merged. Padding that is there stays, unless
    the rows are to be filled up to a multiple.
    """
    count = max(tokens.values(), default=-1) + 1
    if multiple:
        return -(-count // multiple) * multiple, count
    rows = max(count, owned)
    return rows, rows


def _tell_of_zeros(tokens: Mapping[str, int], models: Collection[Tokens], asked: Tokenizer, emit: Emit) -> None:
    """Warn of tokens that no model has, and that the recipe gives no row."""
    given = {token for token, row in asked.tokens.items() if row.source != "usual"}
    nowhere = [token for token in tokens if token not in given and all(one.row(token) < 0 for one in models)]
    if nowhere:
        shown = ", ".join(f"`{printable(token)}`" for token in nowhere[:EXAMPLES])
        more = f" and {len(nowhere) - EXAMPLES} more" if len(nowhere) > EXAMPLES else ""
        emit(Notice(f"rows of tokens that no model has are zeros: {shown}{more}", "warning"))


def _tell_of_few(owner: Checkpoint, tokens: Mapping[str, int], other: Tokens, emit: Emit) -> None:
    """Warn of a model with less than half of the output's tokens."""
    shared = sum(other.row(token) >= 0 for token in tokens)
    if 2 * shared < len(tokens):
        emit(
            Notice(
                f"only {shared} of the {len(tokens)} tokens of `{printable(owner.label)}` are tokens of "
                f"`{printable(other.model.label)}` too: is that the right model?",
                "warning",
            )
        )


def _of_mere_reference(inputs: Inputs, base: Checkpoint, reader: Reader, emit: Emit) -> Tensor | None:
    """The map of a base that is not merged: by text where the two tokenizers differ, else by place."""
    rows, known = (vocabulary_rows(inputs.roles, model) for model in (inputs.reference, base))
    ours, theirs = _tokens_of_both(inputs, base, reader, emit)
    if ours != theirs:
        emit(Notice("the tokenizers of model and base differ: rows of the vocabulary are matched by token text"))
        others, used = Tokens(base, known, theirs), {token: row for token, row in ours.items() if row < rows}
        row_map = matched(used, rows, others)
        _tell_of_few(inputs.reference, used, others, emit)
        new = sum(token not in theirs for token in used)
    elif rows == known:
        return None
    else:
        by_place = torch.arange(rows)
        row_map = torch.where(by_place < known, by_place, -1)
        new = max(0, rows - known)
    if new:
        emit(Notice(f"not relaxed: {counted(new, 'row')} of the vocabulary that the base lacks"))
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
