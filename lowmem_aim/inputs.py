"""The opened models of a recipe, checked against each other, and the rows that each of them gives to a tensor.

Names, shapes, config and tokenizer come from the *reference*: the base, or the first model where there is no base.
`tokenizer_source: base` matches tokens by their text: `row_maps` then says which of an expert's rows stands for which
row of the reference, so that experts with added, missing or permuted tokens merge.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import xxhash
from torch import Tensor

from lowmem_aim.checkpoint import Checkpoint, ReadMode, raw
from lowmem_aim.errors import LowmemAimError, ModelError, NetworkError, printable
from lowmem_aim.events import Emit, Notice
from lowmem_aim.headers import TensorInfo
from lowmem_aim.hub import locate
from lowmem_aim.recipe import Recipe
from lowmem_aim.skeleton import Skeleton, load_skeleton

# Config keys that change what a weight means without changing its shape.
MUST_AGREE = (
    "model_type",
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "tie_word_embeddings",
)


@dataclass
class Inputs:
    """`base` is the recipe's base; `experts` are its models, in order. Use as a context manager."""

    base: Checkpoint | None
    experts: tuple[Checkpoint, ...]
    skeleton: Skeleton
    row_maps: tuple[Tensor | None, ...] = ()  # by expert: (reference rows,) int64, -1 where it lacks the token
    dropped: frozenset[str] = field(default_factory=frozenset)  # tied heads that repeat their embedding

    @property
    def reference(self) -> Checkpoint:
        return self.base or self.experts[0]

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        return (self.base, *self.experts) if self.base else self.experts

    def row_map(self, expert: int, tensor: str) -> Tensor | None:
        return self.row_maps[expert] if self.row_maps and tensor in self.skeleton.vocabulary else None


@contextlib.contextmanager
def open_inputs(recipe: Recipe, read: ReadMode, emit: Emit) -> Iterator[Inputs]:
    """Locate, open and check all models. Raises ModelError or NetworkError with every problem at once."""
    with contextlib.ExitStack() as stack:
        opened = _open_all(recipe, read, emit)
        for checkpoint in opened.values():
            stack.enter_context(checkpoint)
        base = opened[recipe.base] if recipe.base else None
        inputs = Inputs(
            base, tuple(opened[m.reference] for m in recipe.models), load_skeleton(base or next(iter(opened.values())))
        )
        _check_configs(inputs)
        if recipe.tokenizer_source:
            inputs.row_maps = tuple(_row_map(inputs, expert) for expert in inputs.experts)
        _check_tensors(inputs, emit)
        inputs.dropped = _repeated_heads(inputs)
        yield inputs


def _open_all(recipe: Recipe, read: ReadMode, emit: Emit) -> dict[str, Checkpoint]:
    """Reference -> checkpoint, the base first; a model that is named twice is opened once."""
    opened: dict[str, Checkpoint] = {}
    errors: list[LowmemAimError] = []
    for reference in dict.fromkeys([*([recipe.base] if recipe.base else []), *(m.reference for m in recipe.models)]):
        try:
            located = locate(reference, emit)
            opened[reference] = Checkpoint.open(located.folder, located.label, read)
        except (ModelError, NetworkError) as error:
            errors.append(error)
    _raise_all(errors)
    return opened


def _raise_all(errors: list[LowmemAimError]) -> None:
    """One error with all problems and hints, of the first one's kind."""
    if errors:
        problems = [problem for error in errors for problem in error.problems]
        hints = dict.fromkeys(error.hint for error in errors if error.hint)
        raise type(errors[0])(problems, hint="; ".join(hints))


# --- do the models belong together? ---------------------------------------------------------------------------------


def _check_configs(inputs: Inputs) -> None:
    reference = inputs.reference
    problems = []
    for expert in inputs.experts:
        for key in MUST_AGREE:
            ours, theirs = reference.config.get(key), expert.config.get(key)
            if ours is not None and theirs is not None and ours != theirs:
                problems.append(
                    f"`{printable(expert.label)}` has `{key}` {printable(str(theirs))}, "
                    f"but `{printable(reference.label)}` has {printable(str(ours))}"
                )
    if problems:
        raise ModelError(problems, hint="only models of one architecture and size can be merged")


def _check_tensors(inputs: Inputs, emit: Emit) -> None:
    problems: list[str] = []
    vocabulary_differs = False
    for number, expert in enumerate(inputs.experts):
        for info in inputs.reference:
            problem = _tensor_problem(inputs, number, info)
            if problem:
                problems.append(problem)
                vocabulary_differs |= info.name in inputs.skeleton.vocabulary
        extra = [name for name in expert.tensors if name not in inputs.reference.tensors]
        extra = [name for name in extra if name not in inputs.skeleton.tied and name not in inputs.skeleton.buffers]
        if extra:
            emit(
                Notice(
                    f"`{printable(expert.label)}`: {len(extra)} tensor(s) that `{printable(inputs.reference.label)}` "
                    f"lacks are not merged, `{printable(extra[0])}` the first",
                    "warning",
                )
            )
    if problems:
        hint = "tokens differ: `tokenizer_source: base` in the recipe matches them by their text"
        raise ModelError(problems, hint=hint if vocabulary_differs else "are these fine-tunes of the same base?")


def _tensor_problem(inputs: Inputs, number: int, ours: TensorInfo) -> str:
    """Why the expert's tensor cannot be merged with the reference's, or an empty string."""
    expert = inputs.experts[number]
    label, name = printable(expert.label), printable(ours.name)
    if ours.name in inputs.skeleton.buffers or ours.name in inputs.skeleton.tied:
        return ""
    theirs = expert.tensors.get(ours.name)
    if theirs is None:
        return f"`{label}` lacks the tensor `{name}`"
    if theirs.dtype.is_floating_point != ours.dtype.is_floating_point:
        return f"`{label}`: `{name}` is {_short(theirs)}, but {_short(ours)} in `{printable(inputs.reference.label)}`"
    row_map = inputs.row_map(number, ours.name)
    mapped = row_map is not None
    if row_map is not None and (len(row_map) != ours.shape[0] or int(row_map.max()) >= theirs.shape[0]):
        return f"`{label}`: `{name}` has another number of rows than its embedding; tokens cannot be matched"
    if theirs.shape[mapped:] != ours.shape[mapped:]:
        is_vocabulary = ours.name in inputs.skeleton.vocabulary
        return (
            f"`{label}`: {'the vocabulary differs: ' * is_vocabulary}`{name}` has the shape {list(theirs.shape)}, "
            f"but {list(ours.shape)} in `{printable(inputs.reference.label)}`"
        )
    return ""


def _short(info: TensorInfo) -> str:
    return str(info.dtype).removeprefix("torch.")


def _repeated_heads(inputs: Inputs) -> frozenset[str]:
    """Heads that the files hold although they are tied: dropped if each equals its embedding, else an error."""
    problems = []
    dropped = set()
    for head, embedding in inputs.skeleton.tied.items():
        for checkpoint in inputs.checkpoints:
            if head not in checkpoint.tensors or embedding not in checkpoint.tensors:
                continue
            dropped.add(head)
            if _digest_of(checkpoint, head) != _digest_of(checkpoint, embedding):
                problems.append(
                    f"`{printable(checkpoint.label)}`: `{printable(head)}` should be tied to `{printable(embedding)}` "
                    "(`tie_word_embeddings`) but differs from it"
                )
    if problems:
        raise ModelError(
            problems, hint="set `tie_word_embeddings` to false in every config.json if the heads are meant to differ"
        )
    return frozenset(dropped)


def _digest_of(checkpoint: Checkpoint, name: str) -> str:
    """Of the tensor's bytes, read a little at a time."""
    rows, columns = checkpoint.tensors[name].matrix
    step = max(1, (1 << 20) // max(columns, 1))
    digest = xxhash.xxh3_128()
    for start in range(0, rows, step):
        digest.update(raw(checkpoint.rows(name, start, min(start + step, rows))))
    return str(digest.hexdigest())


# --- vocabularies ---------------------------------------------------------------------------------------------------


def vocabulary_of(checkpoint: Checkpoint) -> dict[str, int]:
    """Token text -> id, of the folder's tokenizer. Raises ModelError."""
    return dict(load_tokenizer(checkpoint).get_vocab())


def load_tokenizer(checkpoint: Checkpoint):  # type: ignore[no-untyped-def]  # transformers has no types to name
    """transformers' tokenizer of a model folder; never custom code. Raises ModelError."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(checkpoint.folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # it raises whatever its parsers do
        raise ModelError(
            f"`{printable(checkpoint.label)}` has no tokenizer that transformers can load: {printable(str(error))}",
            hint="put its tokenizer files into the model's folder",
        ) from error


def _row_map(inputs: Inputs, expert: Checkpoint) -> Tensor | None:
    """For each row of the reference's embedding the expert's row of the same token, -1 if there is none."""
    sizes = [_vocabulary_rows(inputs.skeleton, checkpoint) for checkpoint in (inputs.reference, expert)]
    ours, theirs = vocabulary_of(inputs.reference), vocabulary_of(expert)
    if ours == theirs and sizes[0] == sizes[1]:
        return None  # the same vocabulary, padding included
    rows = torch.full((sizes[0],), -1, dtype=torch.int64)  # padding stays the reference's
    for token, ours_id in ours.items():
        theirs_id = theirs.get(token, -1)
        if ours_id < sizes[0] and theirs_id < sizes[1]:
            rows[ours_id] = theirs_id
    return rows


def _vocabulary_rows(skeleton: Skeleton, checkpoint: Checkpoint) -> int:
    return next((t.shape[0] for t in checkpoint if t.name in skeleton.vocabulary), 0)
