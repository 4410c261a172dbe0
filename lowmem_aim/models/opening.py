"""Opening the models of a recipe: found, opened, compared with each other; every problem told at once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from lowmem_aim.errors import LowmemAimError, NetworkError, NoSuchModel, joined, noted, raise_all
from lowmem_aim.events import Emit, Notice
from lowmem_aim.models.agreement import check_tensors, repeated_heads
from lowmem_aim.models.checkpoint import Checkpoint
from lowmem_aim.models.hub import Located, locate, plain_name
from lowmem_aim.models.inputs import Inputs
from lowmem_aim.models.reader import Reader
from lowmem_aim.models.settings import check_settings
from lowmem_aim.models.vetted import tokenizer_config
from lowmem_aim.models.vocabulary import row_maps_of
from lowmem_aim.recipe.recipe import Recipe
from lowmem_aim.system.options import ReadMode


@contextlib.contextmanager
def open_inputs(
    recipe: Recipe,
    read: ReadMode,
    emit: Emit,
    reader: Reader,
    *,
    find: Callable[[str, Emit], Located] = locate,
    has_weights: Callable[[Path], bool] = lambda folder: True,
) -> Iterator[Inputs]:
    """Find, open and check all models. Raises ModelError or NetworkError with every problem at once.

    `has_weights`: whether a model's folder holds more than headers; else its weights are taken to be right.
    """
    errors: list[LowmemAimError] = []
    with contextlib.ExitStack() as stack:
        opened = _open_all(recipe, read, lambda reference: find(reference, emit), errors)
        for checkpoint in opened.values():
            stack.enter_context(checkpoint)
        inputs: Inputs | None = None
        with noted(errors):  # those that could be opened are compared all the same
            inputs = _inputs_of(recipe, opened, reader)
        if inputs is None:
            raise joined(errors)
        _check(inputs, recipe, reader, emit, errors)
        raise_all(errors)
        inputs.dropped = repeated_heads(inputs, has_weights)
        yield inputs


def _open_all(
    recipe: Recipe, read: ReadMode, find: Callable[[str], Located], errors: list[LowmemAimError]
) -> dict[str, Checkpoint]:
    """Reference -> checkpoint, the base first; a model that is named twice is opened once."""
    opened: dict[str, Checkpoint] = {}
    for reference in dict.fromkeys([*([recipe.base] if recipe.base else []), *(m.reference for m in recipe.models)]):
        with noted(errors):
            found = located(reference, find, recipe)
            opened[reference] = Checkpoint.open(found.folder, found.label, read)
    _tell_apart(list(opened.values()))
    return opened


def located(reference: str, find: Callable[[str], Located], recipe: Recipe) -> Located:
    """The model that is found; the error for one that is not says in which folders it was looked for."""
    try:
        return find(reference)
    except (NoSuchModel, NetworkError) as error:
        raise type(error)([problem + recipe.looked(reference) for problem in error.problems], error.hint) from error


def _inputs_of(recipe: Recipe, opened: dict[str, Checkpoint], reader: Reader) -> Inputs | None:
    """The inputs made of the models that are open; None if the reference of the others is not among them."""
    base = opened.get(recipe.base) if recipe.base else None
    references = [model.reference for model in recipe.models]
    experts = tuple(opened[reference] for reference in references if reference in opened)
    merges_base = recipe.builds_on_base or recipe.base in references or recipe.tokenizer_source is not None
    reference = base if recipe.base and merges_base else opened.get(references[0])
    return Inputs(base, experts, reference, reader.roles(reference)) if reference else None


def _check(inputs: Inputs, recipe: Recipe, reader: Reader, emit: Emit, errors: list[LowmemAimError]) -> None:
    for checkpoint in dict.fromkeys(inputs.checkpoints):
        for text in checkpoint.oddities:
            emit(Notice(text, "warning"))
        with noted(errors):
            tokenizer_config(checkpoint)
    with noted(errors):
        check_settings(inputs, reader, emit)
    with noted(errors):
        inputs.row_maps = row_maps_of(inputs, recipe, reader, emit)
        check_tensors(inputs, emit)


def _tell_apart(checkpoints: list[Checkpoint]) -> None:
    """`run1/checkpoint-500` and `run2/checkpoint-500` where folders' names alone would not do."""
    labels = [checkpoint.label for checkpoint in checkpoints]
    for checkpoint, label in zip(checkpoints, labels, strict=True):
        if labels.count(label) > 1:
            checkpoint.label = f"{plain_name(checkpoint.folder.parent)}/{label}"
