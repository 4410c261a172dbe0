"""Opening the models of a recipe: found, opened, compared with each other; every problem told at once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from lowmem_aim.errors import LowmemAimError, ModelError, NetworkError, NoSuchModel, noted, printable, raise_all
from lowmem_aim.events import Emit, Notice
from lowmem_aim.models.adapted import AdaptedCheckpoint
from lowmem_aim.models.adapter import Adapter
from lowmem_aim.models.checkpoint import Checkpoint
from lowmem_aim.models.config import CONFIG, MAX_CONFIG_BYTES, load_json
from lowmem_aim.models.correspondence import beside_text, pieces_of
from lowmem_aim.models.folder import check_links
from lowmem_aim.models.hub import SMALL, Located, downloaded, local_model, locate, plain_name
from lowmem_aim.models.inputs import Inputs
from lowmem_aim.models.quantised import open_model
from lowmem_aim.models.reader import Reader, ReaderNeeded
from lowmem_aim.models.renamed import RenamedCheckpoint
from lowmem_aim.models.roles import NO_ROLES
from lowmem_aim.models.settings import check_settings
from lowmem_aim.models.tied_heads import repeated_heads, with_own_heads
from lowmem_aim.models.vetted import tokenizer_config
from lowmem_aim.models.vocabulary import find_rows
from lowmem_aim.recipe.recipe import Recipe
from lowmem_aim.recipe.references import parsed
from lowmem_aim.system.files import input_errors, is_file, real
from lowmem_aim.system.options import ReadMode


@dataclass(frozen=True)
class Finder:
    """The way in which models are found, and whether what is found holds weights."""

    find: Callable[[str, Emit, bool], Located] = locate  # a model, or (True) an adapter -> its folder
    has_weights: Callable[[Path], bool] = lambda folder: True  # False: headers and small files only
    fetches: bool = True  # models and texts that are on the Hub are downloaded
    local: Callable[[str, bool], Located | None] = local_model  # the same, on this machine; None: on the Hub
    unknown: Collection[str] = ()  # models of which nothing can be known yet: they count as not opened
    planned: Collection[Path] = ()  # folders of headers of models that are yet to be made here


FETCHED = Finder()
M = TypeVar("M")
Find = Callable[[str, bool], M]  # of a part of a reference: a model, or (True) an adapter


def parts_found(reference: str, find: Find[M]) -> list[M]:
    """The results of `find` for the model, and for the adapter if there is one. Raises the errors of both."""
    errors: list[LowmemAimError] = []
    found = []
    for number, part in enumerate(parsed(reference).parts):
        with noted(errors):
            found.append(find(part, number > 0))
    raise_all(errors)
    return found


def opened(reference: str, find: Find[Located], read: ReadMode, reader: Reader) -> Checkpoint:
    """A model, with its adapter if it has one, found and opened. Raises ModelError with every problem found."""
    model, *adapters = parts_found(reference, find)
    errors: list[LowmemAimError] = []
    with contextlib.ExitStack() as stack:
        with noted(errors):
            checkpoint = stack.enter_context(open_model(model.folder, model.label, read))
        for found in adapters:
            with noted(errors):
                adapter = Adapter.open(found.folder, found.label)
        raise_all(errors)
        if adapters:
            checkpoint = AdaptedCheckpoint(checkpoint, adapter, reader.renamed)
        stack.pop_all()  # what is right stays open
        return checkpoint


@contextlib.contextmanager
def opened_models(
    recipe: Recipe, read: ReadMode, emit: Emit, finder: Finder, reader: Reader, errors: list[LowmemAimError]
) -> Iterator[dict[str, Checkpoint | None]]:
    """Find and open all models: reference -> checkpoint, the base first; a model that is named twice is opened once.

    For models that cannot be opened it is None, and `errors` gets what is wrong with them. Nothing is downloaded once
    there are errors.
    """
    source = recipe.tokenizer_model
    named = list(dict.fromkeys([*recipe.references, *([source] if source else [])]))
    references = [reference for reference in recipe.references if parsed(reference).model not in finder.unknown]
    found: dict[str, Checkpoint] = {}
    with contextlib.ExitStack() as stack:

        def open_one(reference: str) -> None:
            with noted(errors), _at_its_place(reference, recipe):
                find = told(recipe, lambda part, is_adapter: finder.find(part, emit, is_adapter))
                checkpoint = opened(reference, find, read, reader)
                found[reference] = stack.enter_context(checkpoint)
                for notice in checkpoint.oddities:
                    emit(notice)
                tokenizer_config(checkpoint)

        elsewhere = []
        for reference in references:
            with noted(errors), _at_its_place(reference, recipe):
                if None not in parts_found(reference, told(recipe, finder.local)):
                    open_one(reference)
                else:
                    elsewhere.append(reference)
        for reference in elsewhere:
            if not (errors and finder.fetches):
                open_one(reference)
        if source and source not in recipe.references and parsed(source).model not in finder.unknown:
            with noted(errors), _at_its_place(source, recipe):
                found[source] = _tokenizer_alone(source, recipe, emit, finder)
        _tell_apart([found[reference] for reference in named if reference in found])
        yield {reference: found.get(reference) for reference in named}


@contextlib.contextmanager
def _at_its_place(reference: str, recipe: Recipe) -> Iterator[None]:
    """Add to the problems of a model that is wrong by itself where the recipe names it."""
    try:
        yield
    except (ModelError, NetworkError) as error:
        error.add_before_problems(recipe.at(reference))
        raise


def told(recipe: Recipe, find: Find[M]) -> Find[M]:
    """`find`, but for a model that is not there the error says in which folders it was looked for."""

    def found(part: str, is_adapter: bool) -> M:
        try:
            return find(part, is_adapter)
        except (NoSuchModel, NetworkError) as error:
            raise type(error)([problem + recipe.looked(part) for problem in error.problems], error.hint) from error

    return found


def _tokenizer_alone(reference: str, recipe: Recipe, emit: Emit, finder: Finder) -> Checkpoint:
    """A model, of which only the tokenizer is used: its weights are neither looked at nor downloaded."""

    def find(wanted: str, is_adapter: bool) -> Located:
        return finder.local(wanted, is_adapter) or Located(downloaded(wanted, SMALL, emit), wanted)

    model = told(recipe, find)(parsed(reference).model, False)
    folder = real(model.folder)
    with input_errors(folder):
        check_links(folder)
    config = load_json(folder / CONFIG, MAX_CONFIG_BYTES) if is_file(folder / CONFIG) else {}
    checkpoint = Checkpoint(folder, model.label, config if isinstance(config, dict) else {}, {})
    tokenizer_config(checkpoint)
    return checkpoint


def compared(
    recipe: Recipe,
    opened: Mapping[str, Checkpoint | None],
    reader: Reader,
    emit: Emit,
    errors: list[LowmemAimError],
) -> Inputs | None:
    """The opened models compared with their reference, as one thing; None if the reference is not among them.

    Models whose settings do not fit are left out, and `errors` gets what is wrong with them. Raises ReaderNeeded if
    nothing is wrong as far as the reader knows by itself.
    """
    inputs = _inputs_of(recipe, opened)
    if inputs is None:
        return None
    unlike: set[Checkpoint] = set()
    unknown: ReaderNeeded | None = None
    try:
        inputs.roles = reader.roles(inputs.reference)
    except ReaderNeeded as needed:
        unknown = needed
    with noted(errors):
        check_settings(inputs, reader, emit, unlike, recipe.sliced)
    if unknown:
        raise unknown
    if unlike:  # that their tensors differ follows from it
        inputs = inputs.without(unlike)
    inputs = with_own_heads(inputs, reader, emit)
    for other in inputs.others:
        try:
            inputs = _in_the_references_names(other, inputs, reader, emit)
        except ModelError as error:
            errors.append(error)
            inputs = inputs.without({other})
    with noted(errors):
        find_rows(inputs, recipe, {**opened, **inputs.opened}, reader, emit)
        inputs.matched = True
    inputs.dropped = repeated_heads(inputs)
    return inputs


def _in_the_references_names(other: Checkpoint, inputs: Inputs, reader: Reader, emit: Emit) -> Inputs:
    """The inputs with a model whose tensors are named otherwise under the reference's names. Raises ModelError.

    What a text model lacks of a vision-language model is carried over from the latter.
    """
    pieces = pieces_of(other, inputs.reference, reader)
    if other.config.get("model_type") != inputs.reference.config.get("model_type"):
        lacking = inputs.reference.tensors.keys() - other.tensors.keys() - pieces.keys()
        inputs.carried |= beside_text(inputs.reference, reader) & lacking
    if not pieces:
        return inputs
    name, parts = next(iter(pieces.items()))
    what = f"`{printable(other.label)}` has {len(pieces)} tensors under other names, or in another form"
    emit(Notice(f"{what}: `{printable(parts[0].tensor)}` is `{printable(name)}` in the output"))
    return inputs.with_model(other, RenamedCheckpoint(other, pieces, inputs.reference))


def _inputs_of(recipe: Recipe, opened: Mapping[str, Checkpoint | None]) -> Inputs | None:
    base = opened[recipe.base] if recipe.base else None
    experts = tuple(found for model in recipe.models if (found := opened[model.reference]))
    reference = opened[recipe.reference]
    there = {name: model for name, model in opened.items() if model and name in recipe.references}
    return Inputs(base, experts, reference, NO_ROLES, opened=there) if reference else None


def _tell_apart(checkpoints: list[Checkpoint]) -> None:
    """`run1/checkpoint-500` and `run2/checkpoint-500` where folders' names alone would not do."""
    labels = [checkpoint.label for checkpoint in checkpoints]
    for checkpoint, label in zip(checkpoints, labels, strict=True):
        if labels.count(label) > 1:
            parts = zip(checkpoint.place, checkpoint.labels, strict=True)
            checkpoint.label = "+".join(f"{plain_name(folder.parent)}/{part}" for folder, part in parts)
