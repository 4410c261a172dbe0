"""Which recipes can be merged in one reading of their models: those that take the same rows of the same tensors.

They may differ in method and parameters, in `aim` and in `acm`. What they share beside the rows: the reference, whose
names, shapes and small files the output has, and what is measured for AIM or compared for ACM.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

from lowmem_aim.recipe.recipe import Aim, ModelEntry, Recipe, Slice


def readings(recipes: Mapping[str, Recipe]) -> list[dict[str, Recipe]]:
    """Divide recipes, by name, into groups that are merged in one reading each; all keep their order."""
    groups: list[dict[str, Recipe]] = []
    for name, recipe in recipes.items():
        fitting = (group for group in groups if all(_share(recipe, other) for other in group.values()))
        group = next(fitting, None)
        if group is None:
            groups.append({name: recipe})
        else:
            group[name] = recipe
    return groups


def _share(one: Recipe, other: Recipe) -> bool:
    return (
        _rows(one) == _rows(other)
        and _agree(one.aim and measured_for(one.aim), other.aim and measured_for(other.aim))
        and _agree(one.acm, other.acm)
    )


def _agree(one: object, other: object) -> bool:
    """Whether two recipes ask for the same, or one asks for nothing."""
    return one is None or other is None or one == other


def measured_for(aim: Aim) -> Hashable:
    """The part of AIM's table that the measured activations follow from."""
    return aim.calibration, aim.samples, aim.block_size, aim.seed, aim.pack, aim.dtype


@dataclass(frozen=True)
class _Rows:
    """The part of a recipe that says which rows are read, and what the output is but for its values."""

    reference: str
    base: str | None
    slices: tuple[Hashable, ...]
    dtype: str | None
    tokenizer: Any
    chat_template: str | None
    layers_of_base: bool  # sliced layers take after the base's
    texts: Any  # of experts, that are measured: the order of all tensors follows from that


def _rows(recipe: Recipe) -> _Rows:
    return _Rows(
        recipe.reference,
        recipe.base,
        tuple(map(_slice, recipe.slices)),
        recipe.dtype,
        recipe.tokenizer,
        recipe.chat_template,
        recipe.sliced and recipe.builds_on_base,
        (recipe.solve, _parameters(recipe) if recipe.method.texts == "merged" else None),
    )


def _parameters(recipe: Recipe) -> Any:
    """All parameters: what texts become in a merged model follows from them."""
    return dict(recipe.parameters), [dict(expert.parameters) for expert in recipe.models]


def _slice(part: Slice) -> Hashable:
    return tuple(map(_entry, part.experts)), part.base and _entry(part.base), part.module and part.module.name


def _entry(entry: ModelEntry) -> Hashable:
    return entry.reference, entry.layers, entry.calibration
