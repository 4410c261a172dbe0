"""The lists of a model's layers, as they show in the names of tensors."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

from lowmem_aim.models.checkpoint import Checkpoint
from lowmem_aim.models.roles import TensorRoles
from lowmem_aim.planning.layers import depth, layer_count


@dataclass(frozen=True)
class Stack:
    """A list of layers; with an empty prefix, no name is in it."""

    prefix: str  # of all names in the list, such as `model.layers.`

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

    def count(self, model: Checkpoint) -> int:
        """The number of layers that a model's tensors show."""
        return max(_by_layer(self, model), default=-1) + 1


@functools.lru_cache(maxsize=16)
def _alike(stack: Stack, names: frozenset[str]) -> frozenset[str]:
    return frozenset(stack.at(name, 0) for name in names)


@functools.lru_cache(maxsize=16)
def _by_layer(stack: Stack, model: Checkpoint) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for name in model.tensors:
        if (layer := stack.layer(name)) is not None:
            found.setdefault(layer, []).append(name)
    return found


def is_of_text(stack: Stack, roles: TensorRoles) -> bool:
    """Whether a list is that of the layers which the config counts, and which AIM and ACM work on."""
    return stack.prefix == roles.layers


def count_in(stack: Stack, model: Checkpoint, roles: TensorRoles) -> int:
    """The number of layers of a model: of the text's as its config says, of others as its tensors show."""
    return (layer_count(model.config) if is_of_text(stack, roles) else 0) or stack.count(model)


def is_counted(tensor: str, roles: TensorRoles) -> bool:
    """Whether a tensor's layer is one of those that are shown and relaxed: not that of a tower beside the text."""
    return roles.text is None or roles.text.holds(tensor)


@dataclass(frozen=True)
class Depths:
    """The depths of a model's tensors in its lists of layers."""

    counts: Mapping[Stack, int]  # layers; empty: the lists are not known
    layers: int  # as the config says

    @classmethod
    def of(cls, model: Checkpoint, roles: TensorRoles) -> Depths:
        """The depths in a model that has these roles."""
        prefixes = [roles.layers, *(section.layers for sections in roles.divisions for section in sections)]
        stacks = [Stack(prefix) for prefix in dict.fromkeys(prefixes) if prefix]
        return cls({stack: count_in(stack, model, roles) for stack in stacks}, layer_count(model.config))

    def at(self, tensor: str) -> float:
        """A tensor's place on gradients, in [0, 1]: 0 outside the layers, as in mergekit."""
        if not self.counts:
            return depth(tensor, self.layers)
        for stack, count in self.counts.items():
            layer = stack.layer(tensor)
            if layer is not None:
                return layer / (count - 1) if layer < count > 1 else 0.0
        return 0.0
