"""Whether the models of a recipe belong together: their tensors, their tied heads. (Their configs: `settings`.)"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lowmem_aim.errors import ModelError, printable
from lowmem_aim.events import Emit, Notice
from lowmem_aim.models.checkpoint import Checkpoint
from lowmem_aim.models.headers import TensorInfo
from lowmem_aim.models.inputs import Inputs


def check_tensors(inputs: Inputs, emit: Emit) -> None:
    """Compare every model's tensors with the reference's: names, shapes, and whether they are floats.

    Raises ModelError with the tensors that cannot be merged, of each model those of one kind as one problem; tensors
    that the reference lacks are a warning.
    """
    problems: list[_Problem] = []
    for other in inputs.others:
        found: dict[str, list[_Problem]] = {}
        for info in inputs.reference:
            if problem := _tensor_problem(inputs, other, info):
                found.setdefault(problem.kind, []).append(problem)
        problems += [_of_all(alike) for alike in found.values()]
        _tell_of_extra_tensors(inputs, other, emit)
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
    "vocabulary": "tokens differ: `tokenizer_source: base` in the recipe matches them by their text",
    "shape": "are these fine-tunes of the same base?",
}


def _of_all(alike: Sequence[_Problem]) -> _Problem:
    """The first of a model's problems of one kind, with the number of the others."""
    first, others = alike[0], len(alike) - 1
    more = f" (the same goes for {others} more tensor{'s' * (others > 1)})" if others else ""
    return replace(first, text=first.text + more)


def _tell_of_extra_tensors(inputs: Inputs, other: Checkpoint, emit: Emit) -> None:
    expected = inputs.reference.tensors.keys() | inputs.roles.tied.keys() | inputs.roles.buffers
    extra = [name for name in other.tensors if name not in expected]
    if extra:
        what = f"`{printable(other.label)}`: {len(extra)} tensor(s) that `{printable(inputs.reference.label)}` lacks"
        emit(Notice(f"{what} are not merged, starting with `{printable(extra[0])}`", "warning"))


def _tensor_problem(inputs: Inputs, other: Checkpoint, ours: TensorInfo) -> _Problem | None:
    """Why the other model's tensor cannot be merged with the reference's; None if it can."""
    label, name = printable(other.label), printable(ours.name)
    if ours.name in inputs.roles.buffers or ours.name in inputs.roles.tied:
        return None
    theirs = other.tensors.get(ours.name)
    if theirs is None:
        return _Problem("missing", f"`{label}` lacks the tensor `{name}`")
    if theirs.dtype.is_floating_point != ours.dtype.is_floating_point:
        found, expected = theirs.dtype.name, ours.dtype.name
        text = f"`{label}`: `{name}` is {found}, but {expected} in `{printable(inputs.reference.label)}`"
        return _Problem("numbers", text)
    row_map = inputs.row_map(other, ours.name)
    mapped = row_map is not None
    if row_map is not None and (len(row_map) != ours.shape[0] or int(row_map.max()) >= theirs.shape[0]):
        text = f"`{label}`: `{name}` has a different number of rows than its embedding; tokens cannot be matched"
        return _Problem("tokens", text)
    if theirs.shape[mapped:] != ours.shape[mapped:]:
        is_vocabulary = ours.name in inputs.roles.vocabulary
        text = (
            f"`{label}`: {'the vocabulary differs: ' * is_vocabulary}`{name}` has the shape {list(theirs.shape)}, "
            f"but {list(ours.shape)} in `{printable(inputs.reference.label)}`"
        )
        return _Problem("vocabulary" if is_vocabulary else "shape", text)
    return None


def repeated_heads(inputs: Inputs, has_weights: Callable[[Path], bool]) -> frozenset[str]:
    """Heads that the files hold although they are tied: dropped if each equals its embedding, else an error."""
    problems = []
    dropped = set()
    for head, embedding in inputs.roles.tied.items():
        for checkpoint in inputs.checkpoints:
            if head not in checkpoint.tensors or embedding not in checkpoint.tensors:
                continue
            dropped.add(head)
            if all(map(has_weights, checkpoint.place)) and checkpoint.digest(head) != checkpoint.digest(embedding):
                problems.append(
                    f"`{printable(checkpoint.label)}`: `{printable(head)}` should be tied to `{printable(embedding)}` "
                    "(`tie_word_embeddings`) but differs from it"
                )
    if problems:
        raise ModelError(
            problems, hint="set `tie_word_embeddings` to false in every config.json if the heads are meant to differ"
        )
    return frozenset(dropped)
