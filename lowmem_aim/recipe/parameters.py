"""The `parameters` of a recipe, a module, a slice or a model, checked against the method that is to use them."""

from __future__ import annotations

from collections.abc import Collection

from lowmem_aim.errors import did_you_mean, nearest, printable
from lowmem_aim.methods.method import Method
from lowmem_aim.methods.registry import METHODS
from lowmem_aim.recipe.recipe import Setting
from lowmem_aim.recipe.spelling import OF_PARAMETERS
from lowmem_aim.recipe.values import Remark, Values
from lowmem_aim.recipe.yaml_tree import Node


def settings_of(read: Values, table: Node, method: Method | None, *, of_model: bool = False) -> dict[str, Setting]:
    """The parameters in a table of the recipe; `of_model`: the table is a model's.

    A name without a meaning is reported and left out, and one that is a slip of another counts as the latter, without
    a value: it is not to be reported as missing too.
    """
    node = table.get("parameters")
    if node is None:
        return {}
    if not isinstance(node.value, dict):
        hint = "write `parameters: {weight: 1.0}`, or one parameter per line below it"
        read.problem(node, "`parameters` must be a table", hint)
        return {}
    if not method:  # no method: reported already; a name that no method has is wrong in any case
        _check_names(read, node, {name for other in METHODS.values() for name in other.parameters})
        return {}
    settings: dict[str, Setting] = {}
    for written, value in node.value.items():
        if value.value is None:
            continue  # as if it were absent
        usual = str(OF_PARAMETERS.get(written, written))
        name = written if usual in node.value else usual
        parameter = method.parameters.get(name)
        if parameter is None or (of_model and not parameter.per_expert):
            meant = _unused(read, name, value, method, of_model)
            settings |= {meant: Setting(None)} if meant else {}
        else:
            settings[name] = read.setting(value, parameter, parameters_of(method)) or Setting(None)
    return settings


def _unused(read: Values, name: str, node: Node, method: Method, of_model: bool) -> str:
    """Tell of a parameter that is not used where it stands; returns the one that was meant, if it is misspelled.

    mergekit ignores such parameters silently, so recipes that people have hold some.
    """
    known = {parameter for other in METHODS.values() for parameter in other.parameters}
    usable = [key for key, parameter in method.parameters.items() if parameter.per_expert or not of_model]
    if name in method.parameters:
        text = f"`{name}` belongs to the whole merge, not to one model, and is ignored here"
    elif name in known:
        text = f"`{name}` has no meaning for `{method.name}` and is ignored"
    elif (meant := nearest(name, usable, slips=2)) or node.by_flag:
        near = f"; did you mean `{meant}`?" if meant else ""
        read.problem(node, f"unknown parameter `{printable(name)}`{near}", parameters_of(method))
        return meant
    else:
        text = f"the parameter `{printable(name)}` is unknown and is ignored"
    read.notices.append(Remark(node.where, text))
    return ""


def _check_names(read: Values, table: Node, known: Collection[str]) -> None:
    """Check the parameters' names alone, not their values."""
    for name, node in table.value.items():
        if name not in known:
            text = f"unknown parameter `{printable(name)}`{did_you_mean(name, known)}"
            read.problem(node, text, "`lowmem-aim methods NAME` lists a method's parameters")


def parameters_of(method: Method) -> str:
    """The hint for a parameter that is wrong."""
    return f"`lowmem-aim methods {method.name}` lists its parameters and their ranges"
