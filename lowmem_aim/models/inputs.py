"""The opened models of a recipe, checked against each other, and the rows that each of them gives to a tensor.

Names, shapes, config and tokenizer come from the *reference*: the base, where it is merged or owns the tokenizer; else
the first model (in `relax`, the model that is relaxed).

`tokenizer_source: base` matches tokens by their text: `row_maps` then says which of a model's rows stands for which row
of the reference, so that experts with added, missing or permuted tokens merge. A base that is only AIM's reference
may have fewer rows than the model that is relaxed: the new rows are not relaxed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from lowmem_aim.errors import LowmemAimError, ModelError, joined, noted, printable, raise_all
from lowmem_aim.events import Emit, Notice
from lowmem_aim.models.checkpoint import Checkpoint
from lowmem_aim.models.headers import TensorInfo
from lowmem_aim.models.hub import Located, locate, plain_name
from lowmem_aim.models.roles import TensorRoles, roles_of
from lowmem_aim.models.tokenizer import vocabulary_of
from lowmem_aim.recipe.recipe import Recipe
from lowmem_aim.system.options import ReadMode
from lowmem_aim.system.tensors import dtype_name

# Config keys that change what a weight means without changing its shape: the first must agree, the others should.
MUST_AGREE = (
    "model_type",
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "tie_word_embeddings",
)
MOST_PROBLEMS = 20  # of one model that are told: a model of another size has one for each tensor
SHOULD_AGREE = ("rope_theta", "rope_scaling", "rope_parameters", "rms_norm_eps", "layer_norm_epsilon", "hidden_act")


@dataclass
class Inputs:
    """`base` is the recipe's base; `experts` are its models, in order. Use as a context manager."""

    base: Checkpoint | None
    experts: tuple[Checkpoint, ...]
    reference: Checkpoint
    roles: TensorRoles  # of the reference
    row_maps: dict[Path, Tensor] = field(default_factory=dict)  # by folder: (reference rows,) int64, -1: no such row
    dropped: frozenset[str] = field(default_factory=frozenset)  # tied heads that repeat their embedding

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        return (self.base, *self.experts) if self.base else self.experts

    @property
    def folders(self) -> list[Path]:
        """Of the models, each once; the first is the base's, if there is one."""
        return list(dict.fromkeys(checkpoint.folder for checkpoint in self.checkpoints))

    def row_map(self, checkpoint: Checkpoint, tensor: str) -> Tensor | None:
        return self.row_maps.get(checkpoint.folder) if tensor in self.roles.vocabulary else None


@contextlib.contextmanager
def open_inputs(
    recipe: Recipe,
    read: ReadMode,
    emit: Emit,
    use_cache: bool = True,
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
            inputs = _inputs_of(recipe, opened, use_cache)
        if inputs is None:
            raise joined(errors)
        _check(inputs, recipe, emit, errors)
        raise_all(errors)
        inputs.dropped = _repeated_heads(inputs, has_weights)
        yield inputs


def _open_all(
    recipe: Recipe, read: ReadMode, find: Callable[[str], Located], errors: list[LowmemAimError]
) -> dict[str, Checkpoint]:
    """Reference -> checkpoint, the base first; a model that is named twice is opened once."""
    opened: dict[str, Checkpoint] = {}
    for reference in dict.fromkeys([*([recipe.base] if recipe.base else []), *(m.reference for m in recipe.models)]):
        with noted(errors):
            located = find(reference)
            opened[reference] = Checkpoint.open(located.folder, located.label, read)
    _tell_apart(list(opened.values()))
    return opened


def _inputs_of(recipe: Recipe, opened: dict[str, Checkpoint], use_cache: bool) -> Inputs | None:
    """Of the models that are open; None if the one that the others are compared with is not."""
    base = opened.get(recipe.base) if recipe.base else None
    references = [model.reference for model in recipe.models]
    experts = tuple(opened[reference] for reference in references if reference in opened)
    merges_base = recipe.builds_on_base or recipe.base in references or recipe.tokenizer_source is not None
    reference = base if recipe.base and merges_base else opened.get(references[0])
    return Inputs(base, experts, reference, roles_of(reference, use_cache)) if reference else None


def _check(inputs: Inputs, recipe: Recipe, emit: Emit, errors: list[LowmemAimError]) -> None:
    with noted(errors):
        _check_configs(inputs, emit)
    with noted(errors):
        inputs.row_maps = _row_maps(inputs, recipe, emit)
        _check_tensors(inputs, emit)


def _tell_apart(checkpoints: list[Checkpoint]) -> None:
    """`run1/checkpoint-500` and `run2/checkpoint-500` where folders' names alone would not do."""
    labels = [checkpoint.label for checkpoint in checkpoints]
    for checkpoint, label in zip(checkpoints, labels, strict=True):
        if labels.count(label) > 1:
            checkpoint.label = f"{plain_name(checkpoint.folder.parent)}/{label}"


# --- do the models belong together? ---------------------------------------------------------------------------------


def _check_configs(inputs: Inputs, emit: Emit) -> None:
    problems = [text for other in _others(inputs) for text in _differences(other, inputs.reference, MUST_AGREE)]
    if problems:
        raise ModelError(problems, hint="only models of one architecture and size can be merged")
    for other in _others(inputs):
        for text in _differences(other, inputs.reference, SHOULD_AGREE):
            emit(Notice(f"{text}; the output has the latter", "warning"))


def _others(inputs: Inputs) -> list[Checkpoint]:
    return [other for other in dict.fromkeys(inputs.checkpoints) if other is not inputs.reference]


def _differences(other: Checkpoint, reference: Checkpoint, keys: Sequence[str]) -> Iterator[str]:
    for key in keys:
        ours, theirs = reference.config.get(key), other.config.get(key)
        if ours is not None and theirs is not None and ours != theirs:
            yield (
                f"`{printable(other.label)}` has `{key}` {printable(str(theirs))}, "
                f"but `{printable(reference.label)}` has {printable(str(ours))}"
            )


def _check_tensors(inputs: Inputs, emit: Emit) -> None:
    problems: list[str] = []
    vocabulary_differs = False
    for other in _others(inputs):
        found = {info.name: text for info in inputs.reference if (text := _tensor_problem(inputs, other, info))}
        vocabulary_differs |= any(name in inputs.roles.vocabulary and name in other.tensors for name in found)
        problems += [*found.values()][:MOST_PROBLEMS]
        if len(found) > MOST_PROBLEMS:
            problems.append(f"`{printable(other.label)}`: {len(found) - MOST_PROBLEMS} more tensors do not fit")
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
        found, expected = dtype_name(theirs.dtype), dtype_name(ours.dtype)
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


def _repeated_heads(inputs: Inputs, has_weights: Callable[[Path], bool]) -> frozenset[str]:
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


# --- vocabularies ---------------------------------------------------------------------------------------------------


def _row_maps(inputs: Inputs, recipe: Recipe, emit: Emit) -> dict[Path, Tensor]:
    """The maps of the models whose rows are not simply the reference's, by folder."""
    if recipe.tokenizer_source:
        maps = {other.folder: _by_text(inputs, other) for other in _others(inputs)}
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
    return next((t.shape[0] for t in checkpoint if t.name in roles.vocabulary), 0)
