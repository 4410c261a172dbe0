"""The sources of the output's tensors: which tensor, and which of its rows, of which model.

A model's own name of a tensor, and the order of its rows, may be others than the output's: slices take layers from
anywhere in a model. Whoever reads a task reads its sources, and knows of no other names.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lowmem_aim.models.checkpoint import Checkpoint
from lowmem_aim.models.headers import TensorInfo
from lowmem_aim.models.inputs import Inputs
from lowmem_aim.models.token_rows import TokenRows
from lowmem_aim.planning.layers import layer_count, layer_of
from lowmem_aim.planning.modules import Portion, check_ranges, layers_of, portions
from lowmem_aim.planning.stacks import Depths, Stack, is_counted
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
    part: Slice | None  # None: it is `model`'s as it is
    t: float  # its place on gradients
    layer: int | None  # of the output's text layers; None: outside these
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
    """Yield every tensor of the output: section by section, each in the reference's order, or in that of its slices.

    Models of the recipe that are not among the inputs are passed over. Raises RecipeError for modules and layers that a
    model does not have, ModelError for layers that are not one list.
    """
    divided, depths = portions(recipe, inputs), Depths.of(inputs.reference, inputs.roles)
    check_ranges(divided, inputs)
    for portion in divided:
        if portion.sliced:
            yield from _of_slices(portion, recipe, inputs)
        else:
            yield from _of_whole_models(portion, depths, inputs)


def _of_whole_models(portion: Portion, depths: Depths, inputs: Inputs) -> Iterator[Match]:
    part, stack, layers = next(iter(portion.slices), None), Stack(""), layer_count(inputs.reference.config)
    for name in _names(portion, inputs):
        layer = layer_of(name, layers) if is_counted(name, inputs.roles) else None
        yield _match(name, inputs.reference, _Place(part, depths.at(name), layer), stack, inputs)


def _of_slices(portion: Portion, recipe: Recipe, inputs: Inputs) -> Iterator[Match]:
    """Yield the tensors before the layers, from the first slice's models; the layers; those after, from the last's."""
    stack, section = portion.stack, portion.section
    outside = [name for name in _names(portion, inputs) if stack.layer(name) is None]
    for name in outside:
        if name not in section.after:
            yield _match(name, inputs.reference, _Place(portion.slices[0]), stack, inputs)
    yield from _of_layers(portion, recipe, inputs)
    for name in outside:
        if name in section.after:
            yield _match(name, inputs.reference, _Place(portion.slices[-1]), stack, inputs)


def _of_layers(portion: Portion, recipe: Recipe, inputs: Inputs) -> Iterator[Match]:
    stack, layer = portion.stack, 0
    for part in portion.slices:
        taken = list(_patterns(part, recipe, inputs)) if stack.prefix else []
        for index, (model, own) in enumerate(taken):
            t = index / (len(taken) - 1) if len(taken) > 1 else 1.0
            for name in stack.names(model, own):
                place = _Place(part, t, layer if is_counted(name, inputs.roles) else None, index)
                yield _match(stack.at(name, layer), model, place, stack, inputs, own)
            layer += 1


def _names(portion: Portion, inputs: Inputs) -> Iterator[str]:
    """Yield the reference's tensors in a section."""
    for name in inputs.reference.tensors:
        if name not in inputs.dropped and portion.section.holds(name):
            yield name


def patterns(portion: Portion, recipe: Recipe, inputs: Inputs) -> list[tuple[Checkpoint, int]]:
    """For each layer of a section made of slices: the model, and its layer, whose tensors and settings it takes."""
    return [pattern for part in portion.slices for pattern in _patterns(part, recipe, inputs)]


def _patterns(part: Slice, recipe: Recipe, inputs: Inputs) -> Iterator[tuple[Checkpoint, int]]:
    first = part.entries if recipe.builds_on_base else part.experts
    for entry in (*first, *part.entries):
        if entry.reference in inputs.opened:  # none is, where all models of a slice are wrong: that is told elsewhere
            yield from ((inputs.opened[entry.reference], layer) for layer in layers_of(entry))
            return


@dataclass(frozen=True)
class _Place:
    """The place of a tensor in the output: slice, place on gradients, layer, and the layer's place in the slice."""

    part: Slice | None
    t: float = 0.0
    layer: int | None = None  # None: none of those that AIM and ACM work on
    index: int | None = None


def _match(
    name: str, model: Checkpoint, place: _Place, stack: Stack, inputs: Inputs, layer: int | None = None
) -> Match:
    """The match of the output's tensor `name`, which has the shape of the model's tensor of that name in `layer`."""
    alike, roles = stack.at(name, 0), inputs.roles

    def own_name(entry: ModelEntry) -> str:
        return name if place.index is None else stack.at(name, layers_of(entry)[place.index])

    def source(entry: ModelEntry) -> Source:
        opened = inputs.opened[entry.reference]
        return Source(opened, own_name(entry), inputs.row_map(opened, name))

    pattern = Source(model, name if layer is None else stack.at(name, layer), inputs.row_map(model, name))
    rows = inputs.rows_of(name)
    part = place.part
    experts = [source(entry) for entry in part.experts if entry.reference in inputs.opened] if part else []
    base = source(part.base) if part and part.base and part.base.reference in inputs.opened else pattern
    beside = name in inputs.carried and any(one.tensor not in one.checkpoint.tensors for one in (base, *experts))
    buffer = alike in stack.alike(roles.buffers) or beside
    optional = alike in stack.alike(roles.optional)
    lacking = () if buffer else tuple(_lacking([base, *experts], name, inputs, optional))
    merged = part is not None and not buffer and not lacking
    return Match(
        name,
        pattern,
        part,
        place.t,
        place.layer,
        experts=tuple(experts) if merged else (),
        own_names=tuple(own_name(entry) for entry in part.experts) if part else (),
        base=base if merged else None,
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
