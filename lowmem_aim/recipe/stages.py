"""The named stages of a recipe with several documents: which names they have, and in which order they are made."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from lowmem_aim.errors import printable
from lowmem_aim.recipe import places
from lowmem_aim.recipe.recipe import Recipe
from lowmem_aim.recipe.values import Remark, Values
from lowmem_aim.recipe.yaml_tree import Node

LONGEST_NAME = 100  # characters of a stage's name, which a folder and a label are called after
_OUTSIDE = '/\\:*?"<>|+@`'  # what some system takes for no plain file name, or a reference to a model as more than one
_NAME_HINT = "a stage's name is that of a folder: letters, digits, `-`, `_` and `.`"
_ONE_OUTPUT = "give each of the others a `name`, by which the others can use its result as a model"


def stages_by_name(root: Node, read: Values) -> dict[str, Node]:
    """The documents beside `root`, by name, without those whose names are wrong, which `read` is told of."""
    found: dict[str, Node] = {}
    for document in root.others:
        node, listed = document.get("name"), isinstance(document.value, dict)
        if node is None and listed:
            text = f"another document without a `name` (the first is at {root.where}): exactly one is the output"
            read.problem(document, text, _ONE_OUTPUT)
        name = read.text(node, "name")
        if node is None or name is None:
            continue
        if (problem := _wrong_name(name, node, found)) is None:
            found[name] = document
        else:
            read.problems.append(problem)
    if root.get("name") is not None:
        read.problem(root, "every document has a `name`, so none is the output", "leave out the `name` of one of them")
    return found


def _wrong_name(name: str, node: Node, others: Mapping[str, Node]) -> Remark | None:
    shown = printable(name)
    if set(name) & set(_OUTSIDE) or not name.isprintable() or name.startswith((".", "-", "~")) or name.endswith("."):
        return Remark(node.where, f"the `name` of a stage must be a plain file name, not `{shown}`", _NAME_HINT)
    if len(name) > LONGEST_NAME:
        return Remark(node.where, f"the `name` `{shown}` has more than {LONGEST_NAME} characters", _NAME_HINT)
    if twin := next((other for other in others if other.casefold() == name.casefold()), None):
        also = "" if twin == name else f" and `{twin}`, which some systems do not tell apart"
        text = f"two stages have the name `{shown}`{also} (the first is at {others[twin].where})"
        return Remark(node.where, text, "give each stage a name of its own")
    here = places.find(name, node.folder, _is_model)
    if not here.places:
        text = f"`{shown}` is the name of a stage, and there is a model in the folder `{printable(here.path)}`"
        return Remark(node.where, text, "give the stage another name; a path of the model is then no stage's name")
    return None


def _is_model(path: str) -> bool:
    return os.path.isfile(os.path.join(path, "config.json"))


def in_order(
    found: Mapping[str, Recipe], documents: Mapping[str, Node], last: Recipe | None, read: Values
) -> list[str]:
    """The names of stages, each after those that it uses.

    `last` is the recipe of the output; None if what uses a stage is not known. `read` is told of circles, of stages
    that nothing uses, and of stages that make several outputs.
    """
    uses = {name: [other for other in recipe.named if other in found] for name, recipe in found.items()}
    order: list[str] = []

    def visit(name: str, path: Sequence[str]) -> None:
        if name in path:
            circle = [*path[path.index(name) :], name]
            read.problem(documents[name], f"the stages wait for each other: {_told(circle)}", "end the circle")
        elif name not in order:
            for other in uses[name]:
                visit(other, [*path, name])
            if name not in order:
                order.append(name)

    for name in found:
        visit(name, [])
    if last:
        used = {*last.named, *(other for others in uses.values() for other in others)}
        for name in (name for name in found if name not in used):
            read.problem(documents[name], f"nothing uses the stage `{printable(name)}`", "leave it out, or merge it")
    for name in (name for name, recipe in found.items() if recipe.aim and recipe.aim.omegas):
        text = f"the stage `{printable(name)}` has several omegas: only the output may"
        read.problem(documents[name], text, "give the stage one omega")
    return order


def _told(circle: Sequence[str]) -> str:
    """A circle as text: `a` uses `b`, which uses `a`."""
    first, *others = (f"`{printable(name)}`" for name in circle)
    return f"{first} uses {', which uses '.join(others)}"
