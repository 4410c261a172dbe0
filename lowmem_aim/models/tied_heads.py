"""Output heads that are tied to the embedding: stored although they are, and beside models with heads of their own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lowmem_aim.errors import ModelError, printable
from lowmem_aim.events import Emit, Notice
from lowmem_aim.models.checkpoint import Checkpoint
from lowmem_aim.models.config import TIES
from lowmem_aim.models.inputs import Inputs
from lowmem_aim.models.reader import Reader
from lowmem_aim.models.roles import TensorRoles
from lowmem_aim.models.untied import UntiedCheckpoint, as_tied


def with_own_heads(inputs: Inputs, reader: Reader, emit: Emit) -> Inputs:
    """The inputs with a head of its own in each model, the tied ones seen as untied, if any model has such a head.

    Else the inputs as they are. A text model beside a vision-language model counts as any other. Raises ReaderNeeded.
    """
    models = list(dict.fromkeys(inputs.checkpoints))
    if len({repr([*_ties(model.config)]) for model in models}) < 2:
        return inputs
    roles = dict(_known_roles(models, reader))
    own = {model: heads for model, found in roles.items() if not found.tied and (heads := _heads(found, model))}
    tied = {model: found.tied for model, found in roles.items() if found.tied}
    if not own or not tied:
        return inputs
    views = {model: UntiedCheckpoint(model, _named_as_in(own, model, pairs)) for model, pairs in tied.items()}
    first, labels = next(iter(own)).label, ", ".join(f"`{printable(model.label)}`" for model in views)
    what = f"`{printable(first)}` has an output head of its own (`{TIES}` is false), and so has the output"
    emit(Notice(f"{what}: the head of {labels} is the embedding"))
    return inputs.replacing(views, reader.roles(views.get(inputs.reference, inputs.reference)))


def _known_roles(models: list[Checkpoint], reader: Reader) -> Iterator[tuple[Checkpoint, TensorRoles]]:
    """Yield each model that transformers can build of its tensors as they are named, with their roles."""
    for model in models:
        with contextlib.suppress(ModelError):
            yield model, reader.roles(model)


def _heads(roles: TensorRoles, model: Checkpoint) -> list[str]:
    """The names of the weights of the output head that a model holds."""
    return sorted(name for name in roles.head & model.tensors.keys() if name.endswith("weight"))


def _named_as_in(own: Mapping[Checkpoint, list[str]], tied: Checkpoint, pairs: Mapping[str, str]) -> dict[str, str]:
    """The pairs of head and embedding of a tied model, the head named as where the embedding has the same name.

    transformers' own name of the head need not be the one in files: a Llava's is `language_model.lm_head.weight`.
    """

    def named(head: str, embedding: str) -> str:
        alike = [heads[0] for model, heads in own.items() if embedding in model.tensors]
        return head if head in tied.tensors else (*alike, head)[0]

    return {named(head, embedding): embedding for head, embedding in pairs.items()}


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
        if (view := as_tied(model)) is not None:
            yield view.model, view.pairs
        else:
            yield model, inputs.roles.tied
