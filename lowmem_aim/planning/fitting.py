"""Whether the sources of each tensor fit each other: all there, of one shape, all floats or none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from lowmem_aim.errors import ModelError, printable
from lowmem_aim.events import Emit, Notice
from lowmem_aim.models.checkpoint import Checkpoint
from lowmem_aim.models.inputs import Inputs
from lowmem_aim.planning.modules import portions, unnamed
from lowmem_aim.planning.sources import Match, Source, matches
from lowmem_aim.recipe.recipe import Recipe
from lowmem_aim.units import counted


def check_sources(recipe: Recipe, inputs: Inputs, emit: Emit) -> None:
    """Compare the sources of every tensor with the one whose shape the output has.

    Raises ModelError with the tensors that cannot be merged, of each model those of one kind as one problem, and the
    errors of `matches`. Tensors of whole models that the reference lacks are a warning; those that a model lacks and
    can do without, and modules that the recipe does not name, are told.
    """
    found: dict[tuple[Checkpoint, str], list[_Problem]] = {}
    carried: dict[Checkpoint, dict[str, Checkpoint]] = {}  # model -> tensor that it lacks -> whose it is in the output
    for match in matches(recipe, inputs):
        for lacking in match.lacking:
            carried.setdefault(lacking, {})[match.name] = match.model.checkpoint
        givers = match.filling.givers if match.filling else ()
        for source in dict.fromkeys((*([match.base] if match.base else []), *match.experts, *givers)):
            known = inputs.matched or not match.vocabulary
            if problem := _problem(source, match, known):
                alike = found.setdefault((source.checkpoint, problem.kind), [])
                alike += [problem] * (problem not in alike)
    for portion in unnamed(portions(recipe, inputs)):
        label = printable(inputs.reference.label)
        what = f"the recipe does not name the module `{printable(portion.section.name)}`"
        emit(Notice(f"{what}: the output has that of `{label}`, as it is"))
    for model, names in carried.items():
        _tell_of_carried(model, names, emit)
    if not recipe.sliced:
        for other in inputs.others:
            _tell_of_extra_tensors(inputs, other, emit)
    problems = [_of_all(alike) for alike in found.values()]
    if problems:
        raise ModelError([problem.text for problem in problems], [_HINTS[problem.kind] for problem in problems])


@dataclass(frozen=True)
class _Problem:
    """Why a tensor cannot be merged: what kind of reason, and the whole of it."""

    kind: str
    text: str


_HINTS = {
    "missing": "is the download complete, and are these fine-tunes of the same base?",
    "numbers": "merge the model as it was before it was quantised",
    "tokens": "the model's tokenizer does not belong to its weights: download the model again",
    "vocabulary": "tokens differ: `tokenizer_source: base` or `union` in the recipe matches them by their text",
    "shape": "are these fine-tunes of the same base?",
}


def _of_all(alike: Sequence[_Problem]) -> _Problem:
    """The first of a model's problems of one kind, with the number of the others."""
    first, others = alike[0], len(alike) - 1
    more = f" (the same goes for {others} more tensor{'s' * (others > 1)})" if others else ""
    return replace(first, text=first.text + more)


def _tell_of_carried(model: Checkpoint, names: Mapping[str, Checkpoint], emit: Emit) -> None:
    """Tell how many tensors a model lacks and can do without, and whose they are in the output."""
    first = next(iter(names))
    owners = ", ".join(f"`{printable(owner.label)}`" for owner in dict.fromkeys(names.values()))
    lacks = f"{counted(len(names), 'tensor')} that it can do without, such as `{printable(first)}`"
    what = f"`{printable(model.label)}` lacks {lacks}"
    emit(Notice(f"{what}: the output has those of {owners}, as they are"))


def _tell_of_extra_tensors(inputs: Inputs, other: Checkpoint, emit: Emit) -> None:
    expected = inputs.reference.tensors.keys() | inputs.roles.tied.keys() | inputs.roles.buffers
    extra = [name for name in other.tensors if name not in expected]
    if extra:
        what = f"{counted(len(extra), 'tensor')} that `{printable(inputs.reference.label)}` lacks"
        text = f"`{printable(other.label)}`: not merged: {what}, starting with `{printable(extra[0])}`"
        emit(Notice(text, "warning"))


def _problem(source: Source, match: Match, known: bool) -> _Problem | None:
    """Why a model's tensor cannot go into the output's; None if it can. `known`: which of its rows go there."""
    model, name = source.checkpoint, printable(source.tensor)
    label, pattern = printable(model.label), match.model
    if source.tensor not in model.tensors:
        return _Problem("missing", f"`{label}` lacks the tensor `{name}`")
    theirs, ours = source.info, pattern.info
    expected = f"in `{printable(pattern.checkpoint.label)}`"
    if pattern.tensor != source.tensor:
        expected = f"in `{printable(pattern.tensor)}` of `{printable(pattern.checkpoint.label)}`"
    if theirs.dtype.is_floating_point != ours.dtype.is_floating_point:
        return _Problem("numbers", f"`{label}`: `{name}` is {theirs.dtype.name}, but {ours.dtype.name} {expected}")
    if not known:
        return None
    rows = source.row_map
    mapped = rows is not None
    if rows is not None and int(rows.max()) >= theirs.shape[0]:
        text = f"`{label}`: `{name}` has a different number of rows than its embedding; tokens cannot be matched"
        return _Problem("tokens", text)
    if theirs.shape[mapped:] != match.shape[mapped:]:
        text = (
            f"`{label}`: {'the vocabulary differs: ' * match.vocabulary}`{name}` has the shape {list(theirs.shape)}, "
            f"but {list(match.shape)} {expected}"
        )
        return _Problem("vocabulary" if match.vocabulary else "shape", text)
    return None
