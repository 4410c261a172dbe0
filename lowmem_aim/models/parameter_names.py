"""The map between a checkpoint's tensor names and the parameter names of transformers' model.

A checkpoint may lack the base model's prefix (the public gpt2), use older names, or hold as many tensors what the
model holds as one parameter (the experts of a Mixtral layer are stacked and concatenated on loading). transformers
keeps the rules (`conversion_mapping`, `core_model_loading`); this module asks them for names, runs its converters
lazily on the tensors that a parameter needs, and takes statistics of a parameter back to the checkpoint's tensors.
Those two modules of transformers are not a stable interface: tests/inputs/test_meta_model.py guards what is used of
them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from lowmem_aim.errors import ModelError, printable
from lowmem_aim.models.checkpoint import Checkpoint
from lowmem_aim.models.headers import broadcasts, matrix_shape
from lowmem_aim.system.tensors import empty_apart

Read = Callable[[str], Tensor]


@dataclass(frozen=True)
class Place:
    """Some rows of a parameter of transformers' model."""

    parameter: str
    start: int
    rows: int


@dataclass
class _Recipe:
    """The making of parameters from checkpoint tensors: unchanged (`converter` None), or by transformers' converter."""

    first: str  # the parameter that transformers files the conversion under
    parts: list[tuple[str, str]] = field(default_factory=list)  # (the converter's pattern, checkpoint name)
    converter: Any = None

    @property
    def sources(self) -> list[str]:
        return [name for _, name in self.parts]

    @property
    def stacked(self) -> bool:
        """Whether each part is one expert of a stacked parameter."""
        return self.converter is not None and any(isinstance(o, MergeModulelist) for o in self.converter.operations)

    def run(self, model: nn.Module, read: Read) -> dict[str, Tensor]:
        """Make the parameters: name -> value."""
        if self.converter is None:
            return {self.first: read(self.parts[0][1])}
        converter = deepcopy(self.converter)
        for pattern, name in self.parts:
            converter.add_tensor(self.first, name, pattern, partial(read, name))
        made = converter.convert(self.first, model=model, config=model.config)
        return {target: value[0] if isinstance(value, list) else value for target, value in made.items()}


class ParameterNames:
    """The map of one model and one checkpoint. Raises ModelError if shapes differ or a conversion fails."""

    def __init__(self, model: Any, checkpoint: Checkpoint) -> None:
        """Map the tensors of `checkpoint` to the parameters of `model`, a PreTrainedModel on the meta device."""
        self.model, self.checkpoint = model, checkpoint
        self.unused: set[str] = set()  # checkpoint tensors that the model has no place for
        self._shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        self._dtypes = {name: value.dtype for name, value in model.state_dict().items()}
        self._known = dict.fromkeys(self._shapes, True)  # the table in which transformers' renaming looks names up
        self._recipes: dict[str, _Recipe] = {}
        self._waiting: dict[str, Tensor] = {}  # made along with another parameter, not yet asked for
        self._twins = _twins(model.all_tied_weights_keys)
        self._collect()
        self._check()

    def sources(self, parameter: str) -> list[str]:
        """The checkpoint tensors that `parameter`, or else its tied twin, is made of; [] if there are none."""
        recipe = self._recipe(parameter)
        return [] if recipe is None else recipe.sources

    def name(self, parameter: str) -> str:
        """The checkpoint's name of a parameter that is one tensor there; `parameter` itself if the file lacks it."""
        recipe = self._recipes.get(parameter)
        return parameter if recipe is None else recipe.parts[0][1]

    def plain(self, parameter: str) -> str | None:
        """The one checkpoint tensor that is this parameter unchanged; None if there is none."""
        recipe = self._recipe(parameter)
        return recipe.parts[0][1] if recipe is not None and recipe.converter is None else None

    def renamed(self) -> dict[str, str]:
        """Parameter -> its tensor in the checkpoint, for those that are one tensor unchanged, of another name."""
        plain = {name: recipe.parts[0][1] for name, recipe in self._recipes.items() if recipe.converter is None}
        return {name: stored for name, stored in plain.items() if name != stored}

    def load(self, parameter: str, read: Read | None = None) -> Tensor:
        """The parameter's value in memory of its own, in the model's dtype, or in the one that a converter has made.

        `read` fetches a whole checkpoint tensor (default: `Checkpoint.tensor`). A tensor that feeds several parameters
        is read once if they are loaded one after the other. Raises KeyError for an unknown parameter.
        """
        if parameter in self._waiting:
            return self._waiting.pop(parameter)
        recipe = self._recipe(parameter)
        if recipe is None:
            raise KeyError(parameter)
        fetch = read or self.checkpoint.tensor
        if recipe.converter is None:
            # A copy: matrix products on file mappings, at any alignment, may round differently, and a file cut off
            # while it is mapped would kill the process.
            return self._own(parameter, fetch(recipe.parts[0][1]))
        if _is_plain_stack(recipe.converter):
            return self._stack(recipe, fetch)
        made = recipe.run(self.model, lambda name: self._as_kept(name, fetch(name)))
        self._waiting.update({name: value for name, value in made.items() if name in self._shapes})
        return self._waiting.pop(parameter)

    def _own(self, parameter: str, stored: Tensor) -> Tensor:
        dtype = self._dtypes.get(parameter, stored.dtype)
        return empty_apart(tuple(stored.shape), dtype).copy_(stored)

    def _as_kept(self, name: str, value: Tensor) -> Tensor:
        """A tensor of the checkpoint in the dtype that an output keeps, where reading computes it in another."""
        kept_as = self.checkpoint.tensors[name].kept_as
        return value if kept_as is None else value.to(kept_as.torch)

    def scatter(self, parameter: str, statistic: Tensor) -> Iterator[tuple[str, Tensor]]:
        """(checkpoint name, its statistic) for each tensor that `parameter` is made of.

        `statistic` broadcasts against the parameter, the results against the checkpoint's tensors: (experts, 1, in)
        of stacked experts becomes (1, in) of each. A conversion that is not understood gives nothing.
        """
        recipe = self._recipe(parameter)
        for name, index in [] if recipe is None else _numbered(recipe):
            part = statistic[index] if recipe is not None and recipe.stacked else statistic
            shape = self.checkpoint.tensors[name].shape
            if recipe is not None and self._transposes(recipe, parameter, shape):
                part = part.transpose(-1, -2)
            if broadcasts(part.shape, shape):
                yield name, part.clone().contiguous()  # two tensors that share memory cannot be saved

    def _transposes(self, recipe: _Recipe, parameter: str, shape: tuple[int, ...]) -> bool:
        operations = [] if recipe.converter is None else recipe.converter.operations
        turns = [o for o in operations if isinstance(o, Transpose)]
        return any(not o.check_dims or shape != self._shapes[parameter] for o in turns)

    def _recipe(self, parameter: str) -> _Recipe | None:
        names = [parameter, *self._twins.get(parameter, ())]
        return next((self._recipes[name] for name in names if name in self._recipes), None)

    def _stack(self, recipe: _Recipe, read: Read) -> Tensor:
        """Stack and concatenate experts as the converter does, without its second and third copy of them."""
        shape = self._shapes[recipe.first]
        value = empty_apart(shape, self._dtypes[recipe.first])
        patterns = list(recipe.converter.source_patterns)
        width = shape[1] // len(patterns)
        for (name, index), (pattern, _) in zip(_numbered(recipe), recipe.parts, strict=True):
            place = patterns.index(pattern) * width
            value[index, place : place + width] = read(name)
        return value

    def places(self) -> dict[str, Place]:
        """The place of each checkpoint tensor that is some rows of one parameter, by its name.

        Rows are those of the parameter seen as (all but the last dimension) x last, so that they are the same numbers
        in every layout that stacks or concatenates them.
        """
        found = {}
        for target, recipe in self._recipes.items():
            if target != recipe.first or target not in self._shapes:
                continue
            if recipe.converter is None:
                found[recipe.parts[0][1]] = Place(target, 0, matrix_shape(self._shapes[target])[0])
            elif _is_plain_stack(recipe.converter) and len(self._shapes[target]) > 2:  # of a bias, a row is all of it
                patterns, height = list(recipe.converter.source_patterns), self._shapes[target][1]
                width = height // len(patterns)
                for (name, index), (pattern, _) in zip(_numbered(recipe), recipe.parts, strict=True):
                    found[name] = Place(target, index * height + patterns.index(pattern) * width, width)
        return found

    # -- building the map

    def _collect(self) -> None:
        rules = get_model_conversion_mapping(self.model)
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
        for name in sorted(self.checkpoint.tensors, key=dot_natural_key):
            target, pattern = self._target(name, renamings, converters)
            if target not in self._shapes:
                self.unused.add(name)
                continue
            recipe = self._recipes.setdefault(target, _Recipe(target))
            if pattern is not None:
                recipe.converter = recipe.converter or by_pattern[pattern]
            recipe.parts.append((pattern or name, name))

    def _target(self, name: str, renamings: list[Any], converters: list[Any]) -> tuple[str, str | None]:
        prefix, known = self.model.base_model_prefix, self._known
        target, pattern = rename_source_key(name, renamings, converters, prefix, known)
        if target not in known and name in known:
            # transformers' own second try: an old name's rule matched a name that is already the new one.
            target, pattern = rename_source_key(name, [], [], prefix, known)
        return target, pattern

    def _check(self) -> None:
        problems: list[str] = []
        for recipe in list(self._recipes.values()):
            problems += self._make(recipe)
        if problems:
            raise ModelError(problems, hint="do the config and the weights belong to the same model?")

    def _make(self, recipe: _Recipe) -> list[str]:
        """Run the conversion without data, for the shapes and for the further parameters that it makes."""
        shapes = self.checkpoint.tensors
        try:
            made = recipe.run(self.model, lambda name: torch.empty(shapes[name].shape, device="meta"))
        except Exception as error:  # transformers' converters raise anything
            return [f"`{printable(recipe.parts[0][1])}` cannot be converted: {printable(str(error))}"]
        problems = []
        for target, value in made.items():
            self._recipes[target] = recipe
            if target in self._shapes and tuple(value.shape) != self._shapes[target]:
                problems.append(
                    f"`{printable(recipe.parts[0][1])}` gives {list(value.shape)} for `{target}`, which the config "
                    f"makes {list(self._shapes[target])}"
                )
        return problems


def _twins(tied: dict[str, str]) -> dict[str, list[str]]:
    """Parameter -> the parameters that share its weight. transformers ties both ways, as either may be in the file."""
    groups: dict[str, list[str]] = {}
    for target, source in tied.items():
        groups.setdefault(source, [source]).append(target)
    return {name: [other for other in group if other != name] for group in groups.values() for name in group}


def _numbered(recipe: _Recipe) -> Iterator[tuple[str, int]]:
    """(checkpoint name, number among the parts of its pattern): the number is the index of an expert in a stack."""
    counts: dict[str, int] = {}
    for pattern, name in recipe.parts:
        yield name, counts.get(pattern, 0)
        counts[pattern] = counts.get(pattern, 0) + 1


def _is_plain_stack(converter: Any) -> bool:
    """Whether a converter stacks experts, or stacks them and concatenates along the outputs, and does nothing else.

    Nearly all mixtures of experts use one of the two.
    """
    kinds = [(type(o), getattr(o, "dim", None)) for o in converter.operations]
    stack, concatenate = (MergeModulelist, 0), (Concatenate, 1)
    single = len(converter.source_patterns) == 1
    return kinds == [stack, concatenate] or (kinds == [stack] and single)


def float_bytes(checkpoint: Checkpoint) -> dict[torch.dtype, int]:
    """Bytes of the checkpoint in each float dtype."""
    totals: dict[torch.dtype, int] = {}
    for info in checkpoint:
        if info.dtype.is_floating_point:
            dtype = info.output_dtype.torch
            totals[dtype] = totals.get(dtype, 0) + math.prod(info.shape) * info.output_dtype.itemsize
    return totals
