"""The merges that a search may choose from: methods, their parameters and AIM's omega, each a range or categories.

    space.chosen(trial) -> {"merge_method": "ties", "density": "0.43", "aim.omega": "0.7"} -> space.point(name, chosen)

Whoever suggests values is asked for one after the other; a parameter that the chosen method does not have is not asked
for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from lowmem_aim.errors import LowmemAimError, RecipeError, noted, raise_all
from lowmem_aim.methods.registry import find_method
from lowmem_aim.recipe.from_flags import applied
from lowmem_aim.recipe.points import CONTROL, Grid, Point, known_methods, unknown_parameters
from lowmem_aim.recipe.ranges import Domain, Range, domain_of, number_text
from lowmem_aim.recipe.reader import read_recipe
from lowmem_aim.recipe.written import written
from lowmem_aim.recipe.yaml_tree import COMMAND_LINE, Node

METHOD, OMEGA = "merge_method", "aim.omega"  # what suggestions are called; parameters are called as in recipes
_NOTHING = Node(None, COMMAND_LINE)


class Suggests(Protocol):
    """Whoever suggests values: a trial of optuna, for one."""

    def suggest_float(self, name: str, low: float, high: float, /) -> float:
        """A number from `low` to `high`."""

    def suggest_int(self, name: str, low: int, high: int, /) -> int:
        """A whole number from `low` to `high`."""

    def suggest_categorical(self, name: str, choices: Sequence[str], /) -> Any:
        """One of the choices."""


@dataclass(frozen=True)
class Space:
    """The merges that a search may choose from."""

    tree: Node  # of the recipe that all are made from
    parameters: Mapping[str, Mapping[str, Domain]]  # method -> parameter -> values
    omega: Domain | None  # None: the recipe's, or no AIM
    flags: Mapping[str, Any] = field(default_factory=dict)  # of AIM's calibration, as `merge` takes them

    def chosen(self, trial: Suggests) -> dict[str, str]:
        """The values that a trial chooses: name -> value, as text."""
        methods = tuple(self.parameters)
        found = {METHOD: str(trial.suggest_categorical(METHOD, methods)) if len(methods) > 1 else methods[0]}
        for name, domain in self.parameters[found[METHOD]].items():
            found[name] = _suggested(trial, name, domain)
        if self.omega is not None:
            found[OMEGA] = _suggested(trial, OMEGA, self.omega)
        return found

    def point(self, name: str, chosen: Mapping[str, str]) -> Point:
        """The merge of the chosen values. Raises RecipeError, UsageError."""
        parameters = [f"{key}={value}" for key, value in chosen.items() if key not in (METHOD, OMEGA)]
        flags = {"method": chosen[METHOD], "parameter": parameters, "omega": chosen.get(OMEGA), **self.flags}
        tree = applied(self.tree, flags)
        table = tree.switched_on("aim")
        omega = table.get("omega") if table is not None else None
        if omega is not None and omega.value == 1:
            tree = tree.with_item("aim", _NOTHING)  # the unrelaxed merge
        return Point(name, name, read_recipe(tree), tree)

    def samples(self) -> list[Point]:
        """A few points by which all can be checked that a search may choose: of each method the first and the last.

        Every category and both ends of every range are read. Raises RecipeError, UsageError: all problems at once.
        """
        errors: list[LowmemAimError] = []
        found: dict[str, Point] = {}
        for method in self.parameters:
            picks = [_Picks(method, at) for at in range(self._most_values(method))]
            for pick in (*picks, _Picks(method, -1)):
                with noted(errors):
                    point = self.point(f"{method}-{len(found)}", self.chosen(pick))
                    if pick.at in (0, -1):
                        found.setdefault(written(point.tree), point)
        raise_all(errors)
        return list(found.values())

    def _most_values(self, method: str) -> int:
        domains = [*self.parameters[method].values(), *([] if self.omega is None else [self.omega])]
        return max((len(domain) for domain in domains if not isinstance(domain, Range)), default=1)

    def as_json(self) -> dict[str, Any]:
        """The space as JSON values, which say whether two searches choose from the same."""
        domains = {method: {name: _json(d) for name, d in own.items()} for method, own in self.parameters.items()}
        return {"recipe": written(applied(self.tree, {})), "methods": domains, OMEGA: _json(self.omega)} | {
            key: value for key, value in self.flags.items() if value not in (None, ())
        }


def space_of(tree: Node, grid: Grid) -> Space:
    """The merges between the values of a grid, over the recipe in `tree`. Raises all that is wrong with them at once.

    Categories of omega come from the recipe, where it lists several and the grid has none.
    """
    if tree.others:
        raise RecipeError(f"{tree.where}: a sweep takes a recipe without stages", "merge the stages first")
    errors: list[LowmemAimError] = []
    axes: dict[str, Domain] = {}
    with noted(errors):
        for name, values in grid.axes().items():
            with noted(errors):
                axes[name] = domain_of(values, "--parameter")
    omega: Domain | None = None
    with noted(errors):
        texts = tuple(part.strip() for part in (grid.omegas or "").split(",") if part.strip())
        omega = domain_of(texts, "--omega") if texts else _listed_omegas(tree)
    known = dict(known_methods(tree, grid, errors))
    errors += unknown_parameters(axes, known)
    raise_all(errors)
    parameters = {method: dict(_own(method, axes, names)) for method, names in known.items()}
    return Space(tree, parameters, omega, grid.flags)


def companions(point: Point, controls: bool) -> Iterator[Point]:
    """Yield what a relaxed point is judged by: the unrelaxed merge and, with AIM, its control."""
    recipe = point.recipe
    if recipe.aim is not None or recipe.acm is not None:
        yield _changed(point, "unrelaxed", point.tree.with_item("aim", _NOTHING).with_item("acm", _NOTHING))
    table = point.tree.switched_on("aim")
    if controls and recipe.aim is not None and not recipe.aim.control and table is not None:
        control = table.with_item("control", Node(CONTROL, COMMAND_LINE))
        yield _changed(point, CONTROL, point.tree.with_item("aim", control))


def _changed(point: Point, suffix: str, tree: Node) -> Point:
    return Point(f"{point.name}-{suffix}", point.family, read_recipe(tree), tree)


def _own(method: str, axes: Mapping[str, Domain], names: Sequence[str]) -> Iterator[tuple[str, Domain]]:
    """Each parameter of a method with its values: whole numbers where the method's own value is one."""
    found = find_method(method)
    for name, domain in axes.items():
        if name in names and found is not None:
            counts = type(found.parameters[name].default) is int
            yield name, Range(domain.low, domain.high, counts) if isinstance(domain, Range) else domain


def _listed_omegas(tree: Node) -> Domain | None:
    """The omegas that a recipe lists, as categories; None for one omega, or for one by filters."""
    table = tree.switched_on("aim")
    listed = table.get("omega") if table is not None else None
    if listed is None or not isinstance(listed.value, list) or any(isinstance(o.value, dict) for o in listed.value):
        return None
    return tuple(str(omega.value) for omega in listed.value)


def _suggested(trial: Suggests, name: str, domain: Domain) -> str:
    if not isinstance(domain, Range):
        return str(trial.suggest_categorical(name, domain)) if len(domain) > 1 else domain[0]
    if domain.whole:
        return str(trial.suggest_int(name, round(domain.low), round(domain.high)))
    return number_text(trial.suggest_float(name, domain.low, domain.high), domain)


def _json(domain: Domain | None) -> Any:
    return f"{domain.low!r}:{domain.high!r}" if isinstance(domain, Range) else domain and list(domain)


@dataclass(frozen=True)
class _Picks:
    """Suggests of each list of categories the one at a place, and one end of each range: of place -1 the last."""

    method: str
    at: int

    def suggest_float(self, name: str, low: float, high: float, /) -> float:
        return high if self.at else low

    def suggest_int(self, name: str, low: int, high: int, /) -> int:
        return high if self.at else low

    def suggest_categorical(self, name: str, choices: Sequence[str], /) -> str:
        if name == METHOD:
            return self.method
        return choices[min(self.at, len(choices) - 1)]
