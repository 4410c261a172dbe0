"""Output heads that are tied to the embedding: stored although they are, and beside models with heads of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lowmem_aim.errors import ModelError, printable
from lowmem_aim.events import Emit, Notice
from lowmem_aim.models.checkpoint import Checkpoint
from lowmem_aim.models.config import TIES
from lowmem_aim.models.inputs import Inputs
from lowmem_aim.models.reader import Reader
from lowmem_aim.models.untied import UntiedCheckpoint


def with_own_heads(inputs: Inputs, reader: Reader, emit: Emit) -> Inputs:
    """The inputs with a head of its own in each model, the tied ones seen as untied, if any model has such a head.

    Else the inputs as they are. Raises ModelError for a model that transformers cannot build, ReaderNeeded.
    """
    kind = inputs.reference.config.get("model_type")  # a text model beside a vision-language model is not asked
    models = [model for model in dict.fromkeys(inputs.checkpoints) if model.config.get("model_type") == kind]
    if len({repr([*_ties(model.config)]) for model in models}) < 2:
        return inputs
    roles = {model: reader.roles(model) for model in models}
    own = [model for model, found in roles.items() if not found.tied and found.head & model.tensors.keys()]
    views = {model: UntiedCheckpoint(model, found.tied) for model, found in roles.items() if found.tied}
    if not own or not views:
        return inputs
    labels = ", ".join(f"`{printable(model.label)}`" for model in views)
    what = f"`{printable(own[0].label)}` has an output head of its own (`{TIES}` is false), and so has the output"
    emit(Notice(f"{what}: the head of {labels} is the embedding"))
    return inputs.replacing(views, reader.roles(views.get(inputs.reference, inputs.reference)))


def _ties(config: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) wherever a config says whether the head is tied."""
    for key, value in sorted(config.items()):
        if isinstance(value, Mapping):
            yield from _ties(value, f"{before}{key}.")
        elif key == TIES:
            yield f"{before}{key}", value


def repeated_heads(inputs: Inputs) -> frozenset[str]:
    """The tied heads that some model's files hold beside the embedding: an output leaves them out."""
    return frozenset(
        head
        for head, embedding in inputs.roles.tied.items()
        if any(head in model.tensors and embedding in model.tensors for model in inputs.checkpoints)
    )


def check_repeated(inputs: Inputs, has_weights: Callable[[Path], bool]) -> None:
    """Read the heads that are stored although they are tied. Raises ModelError for those that differ from their
    embedding.
    """
    problems = [
        f"`{printable(model.label)}`: `{printable(head)}` should be tied to `{printable(embedding)}` "
        f"(`{TIES}`) but differs from it"
        for model, pairs in _tied_models(inputs)
        for head, embedding in pairs.items()
        if head in model.tensors
        and embedding in model.tensors
        and all(map(has_weights, model.place))
        and not model.repeats(head, embedding)
    ]
    if problems:
        raise ModelError(problems, hint=f"set `{TIES}` to false in every config.json if the heads are meant to differ")


def _tied_models(inputs: Inputs) -> Iterator[tuple[Checkpoint, Mapping[str, str]]]:
    """Yield each tied model, and its pairs of head and embedding."""
    for model in dict.fromkeys(inputs.checkpoints):
        if isinstance(model, UntiedCheckpoint):
            yield model.model, model.pairs
        else:
            yield model, inputs.roles.tied
