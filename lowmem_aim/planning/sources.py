"""The sources of the output's tensors: which tensor, and which of its rows, of which model.

A model's own name of a tensor, and the order of its rows, may be others than the output's: slices take layers from
anywhere in a model. Whoever reads a task reads its sources, and knows of no other names.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lowmem_aim.errors import ModelError, RecipeError, printable
from lowmem_aim.models.checkpoint import Checkpoint
from lowmem_aim.models.headers import TensorInfo
from lowmem_aim.models.inputs import Inputs
from lowmem_aim.models.token_rows import TokenRows
from lowmem_aim.planning.layers import depth, layer_count, layer_of
from lowmem_aim.recipe.recipe import ModelEntry, Recipe, Slice

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Source:
    """A tensor of one model, which goes into a tensor of the output."""

    checkpoint: Checkpoint
    tensor: str  # its name in that model
    # (rows of the output,) int64: the model's row for each, -1 where it has none. None: the rows are the same.
    row_map: Tensor | None = field(default=None, compare=False)

    @property
    def info(self) -> TensorInfo:
        """The dtype, shape and place in its file of the tensor."""
        return self.checkpoint.tensors[self.tensor]


@dataclass(frozen=True)
class Filling:
    """The rows of an embedding or a head that stand where a model has none: see `models.token_rows`."""

    givers: tuple[Source, ...]  # the mean of their rows is given; -1 in a row map: nothing of this model
    mean_from: int  # from this row of the output on, each model's rows are the mean of its rows before
    computed: bool  # some rows are means, and not only taken from a model


@dataclass(frozen=True)
class Match:
    """A tensor of the output, and the tensors of the models that go into it."""

    name: str
    model: Source  # whose shape and dtype it has
    part: Slice
    t: float  # its place on gradients
    layer: int | None  # of the output; None: outside the layers
    experts: tuple[Source, ...]
    own_names: tuple[str, ...]  # of the tensor in each of the slice's experts
    base: Source | None  # without a base, the model whose shape the output has
    shape: tuple[int, ...]  # of the output
    filling: Filling | None = None  # rows of the vocabulary that models lack
    buffer: bool = False  # not merged: state of the model that is not a weight, or what some model has no part of
    lacking: tuple[Checkpoint, ...] = ()  # models without this tensor, which can do without: it is `model`'s as it is
    vocabulary: bool = False  # it has a row for each token
    inputs_first: bool = False  # stored (in, out), not (out, in)


def matches(recipe: Recipe, inputs: Inputs) -> Iterator[Match]:
    """Yield every tensor of the output, in the reference's order, or in that of the slices.

    Models of the recipe that are not among the inputs are passed over. Raises RecipeError for layers that a model does
    not have, ModelError for a model whose layers are not one list.
    """
    return _of_slices(recipe, inputs) if recipe.sliced else _of_whole_models(recipe.slices[0], inputs)


def _of_whole_models(part: Slice, inputs: Inputs) -> Iterator[Match]:
    layers, stack = layer_count(inputs.reference.config), Stack("")
    for name in inputs.reference.tensors:
        if name not in inputs.dropped:
            place = _Place(part, depth(name, layers), layer_of(name, layers))
            yield _match(name, inputs.reference, place, stack, inputs)


def _of_slices(recipe: Recipe, inputs: Inputs) -> Iterator[Match]:
    """Yield the tensors before the layers, from the first slice's models; the layers; those after, from the last's."""
    stack = Stack.of(inputs)
    _check_ranges(recipe, inputs)
    outside = [name for name in inputs.reference.tensors if stack.layer(name) is None and name not in inputs.dropped]
    for name in outside:
        if name not in inputs.roles.after_layers:
            yield _match(name, inputs.reference, _Place(recipe.slices[0]), stack, inputs)
    layer = 0
    for part in recipe.slices:
        taken = list(_patterns(part, recipe, inputs))
        for index, (model, own) in enumerate(taken):
            place = _Place(part, index / (len(taken) - 1) if len(taken) > 1 else 1.0, layer, index)
            for name in stack.names(model, own):
                yield _match(stack.at(name, layer), model, place, stack, inputs, own)
            layer += 1
    for name in outside:
        if name in inputs.roles.after_layers:
            yield _match(name, inputs.reference, _Place(recipe.slices[-1]), stack, inputs)


def patterns(recipe: Recipe, inputs: Inputs) -> list[tuple[Checkpoint, int]]:
    """For each layer of an output of slices: the model, and its layer, whose tensors and settings it takes."""
    return [pattern for part in recipe.slices for pattern in _patterns(part, recipe, inputs)]


def _patterns(part: Slice, recipe: Recipe, inputs: Inputs) -> Iterator[tuple[Checkpoint, int]]:
    first = part.entries if recipe.builds_on_base else part.experts
    for entry in (*first, *part.entries):
        if entry.reference in inputs.opened:  # none is, where all models of a slice are wrong: that is told elsewhere
            yield from ((inputs.opened[entry.reference], layer) for layer in _layers(entry))
            return


def _layers(entry: ModelEntry) -> range:
    return entry.layers or range(0)


@dataclass(frozen=True)
class _Place:
    """The place of a tensor in the output: slice, place on gradients, layer, and the layer's place in the slice."""

    part: Slice
    t: float = 0.0
    layer: int | None = None
    index: int | None = None


def _match(
    name: str, model: Checkpoint, place: _Place, stack: Stack, inputs: Inputs, layer: int | None = None
) -> Match:
    """The match of the output's tensor `name`, which has the shape of the model's tensor of that name in `layer`."""
    alike, roles = stack.at(name, 0), inputs.roles

    def own_name(entry: ModelEntry) -> str:
        return name if place.index is None else stack.at(name, _layers(entry)[place.index])

    def source(entry: ModelEntry) -> Source:
        opened = inputs.opened[entry.reference]
        return Source(opened, own_name(entry), inputs.row_map(opened, name))

    pattern = Source(model, name if layer is None else stack.at(name, layer), inputs.row_map(model, name))
    rows = inputs.rows_of(name)
    buffer = alike in stack.alike(roles.buffers) or name in inputs.carried
    part = place.part
    experts = [source(entry) for entry in part.experts if entry.reference in inputs.opened]
    base = source(part.base) if part.base and part.base.reference in inputs.opened else pattern
    optional = alike in stack.alike(roles.optional)
    lacking = () if buffer else tuple(_lacking([base, *experts], name, inputs, optional))
    return Match(
        name,
        pattern,
        part,
        place.t,
        place.layer,
        experts=() if buffer or lacking else tuple(experts),
        own_names=tuple(own_name(entry) for entry in part.experts),
        base=None if buffer or lacking else base,
        shape=pattern.info.shape if rows is None else (rows.count, *pattern.info.shape[1:]),
        filling=None if rows is None else _filling(name, rows, inputs),
        buffer=buffer,
        lacking=lacking,
        vocabulary=name in roles.vocabulary,
        inputs_first=alike in stack.alike(roles.inputs_first),
    )


def _lacking(sources: Sequence[Source], name: str, inputs: Inputs, optional: bool) -> Iterator[Checkpoint]:
    """Yield the models that lack the output's tensor `name` and can do without; `optional`: all models can."""
    for model in dict.fromkeys(
        source.checkpoint for source in sources if source.tensor not in source.checkpoint.tensors
    ):
        if optional or (name in inputs.roles.head and model.is_headless):
            yield model


def _filling(name: str, rows: TokenRows, inputs: Inputs) -> Filling:
    models = {checkpoint.place: checkpoint for checkpoint in inputs.checkpoints}
    givers = tuple(Source(models[place], name, row_map) for place, row_map in rows.given.items())
    return Filling(givers, rows.mean_from, rows.has_means)


@dataclass(frozen=True)
class Stack:
    """The list of a model's layers, as it shows in the names of tensors; with an empty prefix, no name is in it."""

    prefix: str  # of all names in the list, such as `model.layers.`

    @classmethod
    def of(cls, inputs: Inputs) -> Stack:
        """The list of the reference's layers. Raises ModelError if it is not one list, or is not known."""
        if not inputs.roles.layers:
            raise ModelError(
                f"the layers of `{printable(inputs.reference.label)}` are not one list, so `slices` cannot be taken",
                hint="list whole models under `models`",
            )
        return cls(inputs.roles.layers)

    def layer(self, name: str) -> int | None:
        """The number of a tensor's layer; None for tensors outside the layers."""
        number = (
            name.removeprefix(self.prefix).partition(".")[0] if self.prefix and name.startswith(self.prefix) else ""
        )
        return int(number) if number.isdecimal() else None

    def at(self, name: str, layer: int) -> str:
        """The name of the same tensor of another layer; a name outside the layers as it is."""
        if self.layer(name) is None:
            return name
        return f"{self.prefix}{layer}.{name.removeprefix(self.prefix).partition('.')[2]}"

    def alike(self, names: frozenset[str]) -> frozenset[str]:
        """The names as those of layer 0: roles are the same in all layers."""
        return _alike(self, names)

    def names(self, model: Checkpoint, layer: int) -> list[str]:
        """The tensors of a layer of a model."""
        return _by_layer(self, model).get(layer, [])


@functools.lru_cache(maxsize=8)
def _alike(stack: Stack, names: frozenset[str]) -> frozenset[str]:
    return frozenset(stack.at(name, 0) for name in names)


@functools.lru_cache(maxsize=8)
def _by_layer(stack: Stack, model: Checkpoint) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for name in model.tensors:
        if (layer := stack.layer(name)) is not None:
            found.setdefault(layer, []).append(name)
    return found


def _check_ranges(recipe: Recipe, inputs: Inputs) -> None:
    """Raise RecipeError for every source of a slice that ends beyond its model's layers."""
    problems = []
    for part in recipe.slices:
        for entry in part.entries:
            model = inputs.opened.get(entry.reference)
            count = layer_count(model.config) if model else 0
            if model and _layers(entry).stop > count:
                has = f"`{printable(model.label)}` has {count} layers"
                problems.append(f"{entry.where}: `layer_range` ends at {_layers(entry).stop}, but {has}")
    if problems:
        raise RecipeError(dict.fromkeys(problems), hint="`layer_range: [0, 16]` takes the layers 0 to 15")
