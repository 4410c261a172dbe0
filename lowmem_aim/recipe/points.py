"""The points of a sweep: the recipe of each, made from one recipe by other methods, parameters and relaxations.

A *family* is an unrelaxed merge with everything that is made of it: by AIM with each omega, by ACM, and the controls.
The unrelaxed merge is always a point: changes are told against it.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lowmem_aim.errors import LowmemAimError, RecipeError, UsageError, did_you_mean, joined, noted, printable
from lowmem_aim.methods.registry import find_method
from lowmem_aim.recipe.from_flags import applied
from lowmem_aim.recipe.ranges import is_range
from lowmem_aim.recipe.reader import read_recipe
from lowmem_aim.recipe.recipe import Recipe
from lowmem_aim.recipe.spelling import OF_PARAMETERS
from lowmem_aim.recipe.yaml_tree import COMMAND_LINE, Node

CONTROL = "uniform"  # the control that each point with AIM has
MOST_POINTS = 1000
_OUTSIDE_NAMES = re.compile(r"[^\w.+-]+", re.ASCII)


@dataclass(frozen=True)
class Point:
    """One merge of a sweep."""

    name: str  # of its folder and its scores
    family: str  # the name of the unrelaxed merge
    recipe: Recipe
    tree: Node  # of which the recipe was read

    @property
    def is_control(self) -> bool:
        """Whether it is there to judge AIM by, not to be used."""
        return self.recipe.aim is not None and bool(self.recipe.aim.control)


@dataclass(frozen=True)
class Grid:
    """The values that a sweep tries, as a user gives them."""

    methods: Sequence[str] = ()  # (): the recipe's
    parameters: Sequence[str] = ()  # `density=0.3,0.5`
    omegas: str | None = None  # `0,0.4`; None: the recipe's
    controls: bool = True
    flags: Mapping[str, Any] = field(default_factory=dict)  # of AIM's calibration, as `merge` takes them

    def axes(self) -> dict[str, tuple[str, ...]]:
        """Parameter -> the values to try, as text. Raises RecipeError for all that is no `NAME=VALUE,...`."""
        found: dict[str, tuple[str, ...]] = {}
        wrong = []
        for text in self.parameters:
            name, equals, values = text.partition("=")
            listed = tuple(dict.fromkeys(value.strip() for value in values.split(",")))
            if not name or not equals or "" in listed:
                wrong.append(f"--parameter: `{printable(text)}` is not NAME=VALUE or NAME=VALUE,VALUE,...")
            name = OF_PARAMETERS.get(name, name)
            if name in found:
                wrong.append(f"--parameter: `{printable(name)}` is given twice")
            found[name] = listed
        if wrong:
            raise RecipeError(wrong, hint="such as `-p density=0.3,0.5,0.7`")
        return found


def points_of(tree: Node, grid: Grid) -> list[Point]:
    """The points of a grid over the recipe in `tree`, family by family. Raises RecipeError, UsageError: all at once."""
    if tree.others:
        raise RecipeError(f"{tree.where}: a sweep takes a recipe without stages", "merge the stages first")
    errors: list[LowmemAimError] = []
    found: dict[str, Point] = {}
    axes: dict[str, tuple[str, ...]] = {}
    with noted(errors):
        axes = grid.axes()
        errors += _ranges(grid, axes)
    known = dict(known_methods(tree, grid, errors))
    errors += unknown_parameters(axes, known)
    if not errors:
        for method, parameters in known.items():
            own = {name: values for name, values in axes.items() if name in parameters}
            for chosen in itertools.product(*own.values()):
                for point in _family(tree, grid, method, dict(zip(own, chosen, strict=True)), own, errors):
                    found.setdefault(point.name, point)
    if len(found) > MOST_POINTS:
        errors.append(UsageError(f"these are {len(found)} points, and a sweep has at most {MOST_POINTS}", "try fewer"))
    if errors:
        raise joined(errors)
    return list(found.values())


def _ranges(grid: Grid, axes: Mapping[str, Sequence[str]]) -> Iterator[UsageError]:
    """Yield an error for each range: a grid has none."""
    ranges = [f"--parameter: `{name}={value}`" for name, values in axes.items() for value in values if is_range(value)]
    ranges += [f"--omega: `{value}`" for value in (grid.omegas or "").split(",") if is_range(value)]
    for text in ranges:
        yield UsageError(f"{printable(text)} is a range", "`--search N` tries N points of ranges; a grid takes a list")


def unknown_parameters(axes: Iterable[str], known: Mapping[str, Sequence[str]]) -> Iterator[RecipeError]:
    """Yield an error for each parameter that none of the methods has; `known`: method -> its parameters."""
    every = sorted({parameter for parameters in known.values() for parameter in parameters})
    for name in axes if known else ():
        if name not in every:
            text = f"--parameter: no method of this sweep has `{printable(name)}`{did_you_mean(name, every)}"
            yield RecipeError(text, f"their parameters are {', '.join(every)}")


def known_methods(tree: Node, grid: Grid, errors: list[LowmemAimError]) -> Iterator[tuple[str, list[str]]]:
    """Each method of the sweep with its parameters; the reader tells of those that are unknown."""
    node = tree.get("merge_method")
    own = [node.value] if node is not None and isinstance(node.value, str) else []
    for name in dict.fromkeys(grid.methods or own):
        with noted(errors):
            method = find_method(name)
            if method is not None:
                yield name, list(method.parameters)
            else:
                read_recipe(applied(tree, {"method": name}))
    if not grid.methods and not own:
        with noted(errors):
            read_recipe(tree)


def _family(
    tree: Node,
    grid: Grid,
    method: str,
    chosen: Mapping[str, str],
    axes: Mapping[str, Sequence[str]],
    errors: list[LowmemAimError],
) -> Iterator[Point]:
    """The unrelaxed merge by a method and its parameters, and all that is made of it."""
    name = "-".join([method, *(f"{key}-{value}" for key, value in chosen.items() if len(axes[key]) > 1)])
    name = _OUTSIDE_NAMES.sub("_", name)
    flags: dict[str, Any] = {"method": method, "parameter": [f"{key}={value}" for key, value in chosen.items()]}
    merged = tree
    with noted(errors):
        merged = applied(tree, flags)
    for suffix, relaxed in _relaxations(merged, grid, errors):
        with noted(errors):
            yield Point(name + suffix, name, read_recipe(relaxed), relaxed)


def _relaxations(tree: Node, grid: Grid, errors: list[LowmemAimError]) -> Iterator[tuple[str, Node]]:
    """(the end of a point's name, its tree) for a merge unrelaxed, and relaxed in each way."""
    nothing = Node(None, COMMAND_LINE)
    yield "", tree.with_item("aim", nothing).with_item("acm", nothing)
    acm = "-acm" if tree.switched_on("acm") is not None else ""
    if acm:
        yield acm, tree.with_item("aim", nothing)
    flags = {**grid.flags, "omega": grid.omegas}
    with noted(errors):
        tree = applied(tree, flags)
    table = tree.switched_on("aim")
    if table is None or not isinstance(table.value, dict):
        if table is not None:
            yield "", tree  # the reader tells what is wrong with it
        return
    omega = table.get("omega")
    is_list = omega is not None and isinstance(omega.value, list)
    values = omega.value if is_list and omega is not None else [omega]
    if any(value is not None and isinstance(value.value, dict) for value in values):
        values, is_list = [omega], False  # filters: one omega for each kind of tensor
    for value in values:
        if value is not None and value.value == 1:
            continue  # the unrelaxed merge
        own = table if value is None else table.with_item("omega", value)
        number = value is not None and isinstance(value.value, int | float)
        suffix = f"-omega-{float(value.value)!r}".removesuffix(".0") if number and value is not None else "-aim"
        yield acm + suffix, tree.with_item("aim", own)
        if grid.controls and own.get("control") is None:
            control = own.with_item("control", Node(CONTROL, COMMAND_LINE))
            yield f"{acm}{suffix}-{CONTROL}", tree.with_item("aim", control)
