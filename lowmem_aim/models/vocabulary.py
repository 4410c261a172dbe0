"""Vocabularies: which row of a model's embedding holds which token of the reference.

`tokenizer_source: base` matches tokens by their text, so that experts with added, missing or permuted tokens merge. A
base that is only AIM's reference may have fewer rows than the model that is relaxed: the new rows are not relaxed.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from lowmem_aim.events import Emit, Notice
from lowmem_aim.models.checkpoint import Checkpoint
from lowmem_aim.models.inputs import Inputs
from lowmem_aim.models.roles import TensorRoles
from lowmem_aim.models.tokenizer import vocabulary_of
from lowmem_aim.recipe.recipe import Recipe


def row_maps_of(inputs: Inputs, recipe: Recipe, emit: Emit) -> dict[Path, Tensor]:
    """The maps of the models whose rows are not simply the reference's, by folder."""
    if recipe.tokenizer_source:
        maps = {other.folder: _by_text(inputs, other) for other in inputs.others}
        return {folder: row_map for folder, row_map in maps.items() if row_map is not None}
    if inputs.base is None or inputs.base in (inputs.reference, *inputs.experts):
        return {}
    rows, known = (vocabulary_rows(inputs.roles, model) for model in (inputs.reference, inputs.base))
    if rows == known:
        return {}
    if rows > known:
        emit(Notice(f"{rows - known} row(s) of the vocabulary are new against the base and are not relaxed"))
    by_place = torch.arange(rows)
    return {inputs.base.folder: torch.where(by_place < known, by_place, -1)}


def _by_text(inputs: Inputs, other: Checkpoint) -> Tensor | None:
    """For each row of the reference's embedding the other's row of the same token; None if they are all the same."""
    sizes = [vocabulary_rows(inputs.roles, checkpoint) for checkpoint in (inputs.reference, other)]
    ours, theirs = vocabulary_of(inputs.reference), vocabulary_of(other)
    if ours == theirs and sizes[0] == sizes[1]:
        return None  # the same vocabulary, padding included
    rows = torch.full((sizes[0],), -1, dtype=torch.int64)  # padding stays the reference's
    for token, ours_id in ours.items():
        theirs_id = theirs.get(token, -1)
        if ours_id < sizes[0] and theirs_id < sizes[1]:
            rows[ours_id] = theirs_id
    return rows


def vocabulary_rows(roles: TensorRoles, checkpoint: Checkpoint) -> int:
    """Rows of a model's embedding, padding included; 0 if the model has none."""
    return next((t.shape[0] for t in checkpoint if t.name in roles.vocabulary), 0)
