"""Families of merges: an unrelaxed merge, its relaxed versions and their controls; and curves over AIM's omega."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lowmem_aim.errors import UsageError, printable
from lowmem_aim.evaluating.scores import Scores
from lowmem_aim.recipe.words import CONTROLS

_OF_A_POINT = ("omega", "control", "control_seed")  # keys of `aim` that points of one curve may differ in


def parents_of(models: Sequence[Scores]) -> dict[str, Scores]:
    """A model's name -> its parent among the models: the same merge without the relaxation; without those of none.

    Raises UsageError if a model has several.
    """
    found = {model.name: _candidates(model, models) for model in models}
    problems = [
        f"`{printable(name)}` has several parents: {', '.join(f'`{printable(parent.name)}`' for parent in parents)}"
        for name, parents in found.items()
        if len(parents) > 1
    ]
    if problems:
        raise UsageError(problems, hint="compare with one of them at a time")
    return {name: parents[0] for name, parents in found.items() if parents}


def _candidates(model: Scores, models: Sequence[Scores]) -> list[Scores]:
    """The unrelaxed models that a model may be made of; those that the `parent` names come before a digest's."""
    others = [other for other in models if other is not model and not other.relaxed and model.parent is not None]
    named = [other for other in others if model.parent in (other.name, other.digest)]
    return named or [other for other in others if model.relaxed and model.parent == other.parent]


def omega_of(model: Scores) -> float | None:
    """The one omega of a model that AIM relaxed; None without AIM, or if its omega differs between tensors."""
    omega = model.aim.get("omega") if model.aim else None
    return float(omega) if isinstance(omega, int | float) and not isinstance(omega, bool) else None


def relaxation_of(model: Scores) -> str:
    """AIM and ACM as a table tells them: `AIM 0.4`, `AIM 0.4, uniform`, `AIM 0.4 + ACM`; empty without."""
    omega = omega_of(model)
    aim = "AIM" if omega is None else f"AIM {omega:g}"
    aim += f", {model.control}" if model.control else ""
    used = [aim] if model.aim is not None or model.control else []
    return " + ".join(used + ["ACM"] * (model.acm is not None))


def in_families(models: Sequence[Scores], parents: dict[str, Scores]) -> list[Scores]:
    """The models family by family: the unrelaxed merge, then by omega, each point before its controls.

    Families come in the order of their first model.
    """
    names = [_family(model, parents) for model in models]
    place = {name: number for number, name in reversed(list(enumerate(names)))}
    order = sorted(
        range(len(models)), key=lambda at: (place[names[at]], models[at].name in parents, *_place(models[at]), at)
    )
    return [models[at] for at in order]


def _family(model: Scores, parents: dict[str, Scores]) -> str:
    if model.name in parents:
        return f"name {parents[model.name].name}"
    return f"digest {model.parent}" if model.relaxed and model.parent else f"name {model.name}"


def _place(model: Scores) -> tuple[bool, bool, float, int]:
    omega, number = omega_of(model), CONTROLS.index(model.control) + 1 if model.control else 0
    return model.relaxed, model.acm is not None, -1.0 if omega is None else omega, number


# --- curves -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """Models that differ in nothing but AIM's omega and its controls, by omega."""

    name: str  # of the unrelaxed merge
    lines: dict[str, list[tuple[float, Scores]]]  # control, "" for AIM itself -> its points, by omega


def curves_of(models: Sequence[Scores], parents: dict[str, Scores]) -> list[Curve]:
    """The curves over omega that have two points or more; the unrelaxed merge is that of omega 1."""
    groups: dict[tuple[str, str], list[Scores]] = {}
    for model in models:
        if omega_of(model) is not None:
            groups.setdefault((_family(model, parents), _but_omega(model)), []).append(model)
    curves = [_curve(group, parents.get(group[0].name)) for group in groups.values()]
    return [curve for curve in curves if any(len(line) > 1 for line in curve.lines.values())]


def _but_omega(model: Scores) -> str:
    """All of a model's relaxation but what the points of a curve differ in, as text."""
    aim: dict[str, Any] = {key: value for key, value in (model.aim or {}).items() if key not in _OF_A_POINT}
    return json.dumps([aim, dict(model.acm) if model.acm is not None else None], sort_keys=True)


def _curve(models: Sequence[Scores], parent: Scores | None) -> Curve:
    lines: dict[str, list[tuple[float, Scores]]] = {}
    for model in sorted(models, key=_place):
        omega = omega_of(model)
        if omega is not None:
            lines.setdefault(model.control or "", []).append((omega, model))
    if parent is not None and models[0].acm is None:
        for line in lines.values():
            if line[-1][0] < 1:
                line.append((1.0, parent))
    named = parent or models[0]
    return Curve(named.name if parent else named.method or named.name, lines)
