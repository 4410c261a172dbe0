"""Whether the models of a recipe belong together: their tensors, their tied heads. (Their configs: `settings`.)"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lowmem_aim.errors import ModelError, printable
from lowmem_aim.events import Emit, Notice
from lowmem_aim.models.checkpoint import Checkpoint
from lowmem_aim.models.headers import TensorInfo
from lowmem_aim.models.inputs import Inputs

PROBLEMS_OF_A_MODEL = 20  # of one model that are told: a model of another size has one for each tensor


def check_tensors(inputs: Inputs, emit: Emit) -> None:
    """Compare every model's tensors with the reference's: names, shapes, and whether they are floats.

    Raises ModelError with every tensor that cannot be merged; tensors that the reference lacks are a warning.
    """
    problems: list[str] = []
    vocabulary_differs = False
    for other in inputs.others:
        found = {info.name: text for info in inputs.reference if (text := _tensor_problem(inputs, other, info))}
        vocabulary_differs |= any(name in inputs.roles.vocabulary and name in other.tensors for name in found)
        problems += [*found.values()][:PROBLEMS_OF_A_MODEL]
        if len(found) > PROBLEMS_OF_A_MODEL:
            problems.append(f"`{printable(other.label)}`: {len(found) - PROBLEMS_OF_A_MODEL} more tensors do not fit")
        _tell_of_extra_tensors(inputs, other, emit)
    if problems:
        hint = "tokens differ: `tokenizer_source: base` in the recipe matches them by their text"
        raise ModelError(problems, hint=hint if vocabulary_differs else "are these fine-tunes of the same base?")


def _tell_of_extra_tensors(inputs: Inputs, other: Checkpoint, emit: Emit) -> None:
    expected = inputs.reference.tensors.keys() | inputs.roles.tied.keys() | inputs.roles.buffers
    extra = [name for name in other.tensors if name not in expected]
    if extra:
        what = f"`{printable(other.label)}`: {len(extra)} tensor(s) that `{printable(inputs.reference.label)}` lacks"
        emit(Notice(f"{what} are not merged, `{printable(extra[0])}` the first", "warning"))


def _tensor_problem(inputs: Inputs, other: Checkpoint, ours: TensorInfo) -> str:
    """Why the other model's tensor cannot be merged with the reference's, or an empty string."""
    label, name = printable(other.label), printable(ours.name)
    if ours.name in inputs.roles.buffers or ours.name in inputs.roles.tied:
        return ""
    theirs = other.tensors.get(ours.name)
    if theirs is None:
        return f"`{label}` lacks the tensor `{name}`"
    if theirs.dtype.is_floating_point != ours.dtype.is_floating_point:
        found, expected = theirs.dtype.name, ours.dtype.name
        return f"`{label}`: `{name}` is {found}, but {expected} in `{printable(inputs.reference.label)}`"
    row_map = inputs.row_map(other, ours.name)
    mapped = row_map is not None
    if row_map is not None and (len(row_map) != ours.shape[0] or int(row_map.max()) >= theirs.shape[0]):
        return f"`{label}`: `{name}` has another number of rows than its embedding; tokens cannot be matched"
    if theirs.shape[mapped:] != ours.shape[mapped:]:
        is_vocabulary = ours.name in inputs.roles.vocabulary
        return (
            f"`{label}`: {'the vocabulary differs: ' * is_vocabulary}`{name}` has the shape {list(theirs.shape)}, "
            f"but {list(ours.shape)} in `{printable(inputs.reference.label)}`"
        )
    return ""


def repeated_heads(inputs: Inputs, has_weights: Callable[[Path], bool]) -> frozenset[str]:
    """Heads that the files hold although they are tied: dropped if each equals its embedding, else an error."""
    problems = []
    dropped = set()
    for head, embedding in inputs.roles.tied.items():
        for checkpoint in inputs.checkpoints:
            if head not in checkpoint.tensors or embedding not in checkpoint.tensors:
                continue
            dropped.add(head)
            if has_weights(checkpoint.folder) and checkpoint.digest(head) != checkpoint.digest(embedding):
                problems.append(
                    f"`{printable(checkpoint.label)}`: `{printable(head)}` should be tied to `{printable(embedding)}` "
                    "(`tie_word_embeddings`) but differs from it"
                )
    if problems:
        raise ModelError(
            problems, hint="set `tie_word_embeddings` to false in every config.json if the heads are meant to differ"
        )
    return frozenset(dropped)
