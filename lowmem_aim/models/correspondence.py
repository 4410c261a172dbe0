"""Which tensors of a model are those of another that names them otherwise, or stacks experts otherwise.

transformers knows the names that a model's tensors have had, and which of them it stacks: the same parameter of both
models, by transformers' name, is the same weight. A model that is part of another (the text model in a vision-language
model) has the same parameters below another prefix. Where transformers knows nothing of a model's names, a prefix that
all of them have is taken off.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lowmem_aim.errors import ModelError, printable
from lowmem_aim.models.checkpoint import Checkpoint
from lowmem_aim.models.reader import Reader

Places = Mapping[str, Any]  # what `Reader.places` gives


@dataclass(frozen=True)
class Piece:
    """Some rows of a model's tensor."""

    tensor: str
    start: int
    rows: int


Pieces = dict[str, tuple[Piece, ...]]  # by the reference's names


def pieces_of(other: Checkpoint, reference: Checkpoint, reader: Reader) -> Pieces:
    """For each tensor of the reference that `other` has under another name, or in another form, what it is made of.

    Empty if the names are the same. Raises ModelError if no name is known.
    """
    if reference.tensors.keys() <= other.tensors.keys() or other.tensors.keys() <= reference.tensors.keys():
        return {}  # what is missing has no other name
    found = _by_prefix(other, reference)
    if not found:
        with contextlib.suppress(ModelError):  # of a model that is not what its config says: its tensors will tell
            found = _by_parameter(other, reference, reader)
    if not found and not reference.tensors.keys() & other.tensors.keys():
        prefix = _common_prefix(other)
        named = (
            f"all are named `{printable(prefix)}*`" if prefix else f"`{printable(min(other.tensors))}` is one of them"
        )
        raise ModelError(
            f"none of the {len(other.tensors)} tensors of `{printable(other.label)}` is known in "
            f"`{printable(reference.label)}`: {named}",
            hint="are these fine-tunes of the same base?",
        )
    return found


def beside_text(reference: Checkpoint, reader: Reader) -> frozenset[str]:
    """The tensors of the reference that are no part of what continues text: a vision tower, a projector.

    Raises ModelError as `Reader.places`.
    """
    found = reader.places(reference)
    inside = f"{found['decoder']}."
    heads = reader.roles(reference).vocabulary
    apart = {name for name, (parameter, *_) in found["tensors"].items() if not parameter.startswith(inside)}
    return frozenset(apart - heads if found["decoder"] else ())


def _by_prefix(other: Checkpoint, reference: Checkpoint) -> Pieces:
    """The tensors of two models whose names differ in what all of one model's begin with; empty if they do not."""
    theirs, ours = _common_prefix(other), _common_prefix(reference)
    names = {name: theirs + name.removeprefix(ours) for name in reference.tensors}
    if theirs == ours or not all(name in other.tensors for name in names.values()):
        return {}
    return {ours: (Piece(name, 0, other.tensors[name].matrix[0]),) for ours, name in names.items()}


def _common_prefix(model: Checkpoint) -> str:
    """The whole parts of names with which all names of a model begin, such as `module.`; "" if there are none."""
    names = [name.split(".")[:-1] for name in model.tensors]
    common = []
    for parts in zip(*names, strict=False):
        if len(set(parts)) > 1 or parts[0].isdecimal():
            break
        common.append(parts[0])
    return "".join(f"{part}." for part in common)


def _by_parameter(other: Checkpoint, reference: Checkpoint, reader: Reader) -> Pieces:
    """The tensors that lie in the same rows of the same parameter of transformers' models."""
    ours, theirs = reader.places(reference), reader.places(other)
    by_parameter: dict[str, list[tuple[int, int, str]]] = {}
    for name, (parameter, start, rows) in theirs["tensors"].items():
        by_parameter.setdefault(parameter, []).append((start, start + rows, name))
    found: Pieces = {}
    for name, (parameter, start, rows) in ours["tensors"].items():
        same = _below(parameter, ours["decoder"], theirs["decoder"])
        pieces = _covering(sorted(by_parameter.get(same, ())), start, start + rows)
        if pieces and (len(pieces) > 1 or pieces[0].tensor != name or name not in other.tensors):
            found[name] = pieces
    return found


def _below(parameter: str, ours: str, theirs: str) -> str:
    """The name of a parameter of a model in another whose part that continues text lies elsewhere."""
    if ours and not parameter.startswith(f"{ours}."):
        return parameter
    inside = parameter.removeprefix(f"{ours}.") if ours else parameter
    return f"{theirs}.{inside}" if theirs else inside


def _covering(tensors: list[tuple[int, int, str]], start: int, stop: int) -> tuple[Piece, ...]:
    """The rows start:stop of a parameter as pieces of the tensors that it is made of; empty if some are missing."""
    pieces, reached = [], start
    for first, end, name in tensors:
        if first <= reached < end and reached < stop:
            upto = min(end, stop)
            pieces.append(Piece(name, reached - first, upto - reached))
            reached = upto
    return tuple(pieces) if reached == stop else ()
