"""British and American spellings of a recipe's keys: either is read, and one is used from then on."""

from __future__ import annotations

from collections.abc import Mapping

from lowmem_aim.recipe.yaml_tree import Node

# mergekit's parameters are American, and ACM's key is British.
OF_PARAMETERS = {"normalise": "normalize", "normalise_weights": "normalize_weights"}
OF_ACM = {"normalize": "normalise"}


def in_one_spelling(root: Node) -> Node:
    """The tree of a recipe with each key in the spelling that is used here.

    A table with both spellings is left as it is: its reader does not know the other one.
    """
    root = _within(_within(root, "parameters", OF_PARAMETERS), "acm", OF_ACM)
    models = root.get("models")
    if models is None or not isinstance(models.value, list):
        return root
    return root.with_item("models", _of(models, [_within(one, "parameters", OF_PARAMETERS) for one in models.value]))


def _within(table: Node, key: str, spellings: Mapping[str, str]) -> Node:
    """A table with the keys of the table under `key` in one spelling."""
    inner = table.get(key)
    if inner is None or not isinstance(inner.value, dict) or not spellings.keys() & inner.value.keys():
        return table
    new = {spellings.get(name, name): value for name, value in inner.value.items()}
    return table.with_item(key, _of(inner, new)) if len(new) == len(inner.value) else table


def _of(node: Node, value: object) -> Node:
    return Node(value, node.where, node.folder)
