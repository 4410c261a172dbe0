"""The values in a recipe's tree, checked one by one. Problems are collected, so that all are reported at once."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lowmem_aim.errors import did_you_mean, printable
from lowmem_aim.methods.method import Parameter
from lowmem_aim.recipe import places
from lowmem_aim.recipe.recipe import Setting
from lowmem_aim.recipe.words import is_hub_id
from lowmem_aim.recipe.yaml_tree import Node

LONGEST_PATH, LONGEST_NAME = 4096, 255  # bytes; the limits of common systems


class Values:
    """A reader of values from nodes that collects what is wrong with them, each problem with its place."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.notices: list[str] = []
        self.preferred: list[str] = []  # paths that are here, and could be Hub ids
        self.sought: dict[str, tuple[str, ...]] = {}  # paths found nowhere -> the folders that were looked in

    def problem(self, node: Node, text: str) -> None:
        """Note a problem at the place of `node`."""
        self.problems.append(f"{node.where}: {text}")

    def check_keys(self, table: Node, known: Sequence[str], unsupported: Mapping[str, str]) -> None:
        """Note a problem for each key of `table` that is unknown, or known to mergekit but not supported."""
        for key, node in table.value.items():
            if node.value is None:
                continue  # as if it were absent
            if key in unsupported:
                self.problem(node, f"`{key}` is not supported: {unsupported[key]}")
            elif key not in known:
                self.problem(node, f"unknown key `{printable(key)}`{did_you_mean(key, known)}")

    def text(self, node: Node | None, what: str) -> str | None:
        """The text of a node without outer spaces; None if the node is empty, or after a problem. `what` is its key."""
        if node is None or node.value is None:
            return None
        value = node.value
        if isinstance(value, dict) and set(value) == {"path"}:  # mergekit's long form of a model reference
            value = value["path"].value
        if not isinstance(value, str) or not value.strip():
            self.problem(node, f"`{what}` must be text")
            return None
        if wrong := no_name(value.strip()):
            self.problem(node, f"`{what}`: `{printable(value)}` {wrong}")
            return None
        return value.strip()

    def model(self, node: Node | None, what: str) -> str | None:
        """The reference of a model: a Hub id, or a folder's path from the current folder; None as in `text`."""
        text = self.text(node, what)
        return text if node is None or text is None else self.placed(node, text, os.path.isdir)

    def placed(self, node: Node, path: str, exists: Callable[[str], bool]) -> str:
        """A path of the recipe as seen from the current folder; two different things of that name are a problem."""
        found = places.find(path, node.folder, exists)
        if found.doubt:
            self.problem(node, found.doubt)
        if found.places:
            self.sought[path] = found.places
        elif is_hub_id(path):
            self.preferred.append(path)
        return found.path

    def setting(self, node: Node, parameter: Parameter) -> Setting | None:
        """A parameter's value as the recipe gives it: a scalar, a gradient or filters; None after a problem."""
        filtered = isinstance(node.value, list) and any(isinstance(item.value, dict) for item in node.value)
        if not filtered:
            value = self.value(node, parameter)
            return None if value is None else Setting(value)
        rules = []
        for item in node.value:
            rule = item if isinstance(item.value, dict) else item.with_item("value", item)
            self.check_keys(rule, ("filter", "value"), {})
            pattern, value_node = rule.get("filter"), rule.get("value")
            if value_node is None:
                self.problem(rule, f"a filter of `{parameter.name}` needs a `value`")
                continue
            if pattern is not None and not (isinstance(pattern.value, str) and pattern.value):
                self.problem(pattern, f"a filter of `{parameter.name}` must be a part of tensor names, or `*`")
                continue
            rules.append((pattern.value if pattern else "", self.value(value_node, parameter)))
        return Setting(tuple(rules), filtered=True, where=node.where)

    def value(self, node: Node, parameter: Parameter) -> Any:
        """A scalar, or a gradient as a tuple, checked; None after a problem."""
        if isinstance(node.value, list):
            values = [self.value(item, parameter) for item in node.value]
            if parameter.kind != "number" or not values or not all(isinstance(v, int | float) for v in values):
                self.problem(node, f"`{parameter.name}` cannot be this list")
                return None
            return tuple(values)
        value = _number(node.value) if parameter.kind == "number" else node.value
        wrong = parameter.problem(value)
        if wrong:
            self.problem(node, wrong)
            return None
        return value


def no_name(text: str) -> str:
    """The reason why a text can be neither a path nor a Hub id; empty if it can."""
    try:
        parts = text.encode("utf-8").split(b"/")
    except UnicodeEncodeError:
        return "is not Unicode"
    if "\0" in text:
        return "holds a NUL character"
    if len(text) > LONGEST_PATH or any(len(part) > LONGEST_NAME for part in parts):
        return "is too long for a path"
    if text.startswith("~") and os.path.expanduser(text) == text:
        return "is of a user who is not known here"
    return ""


def _number(value: Any) -> Any:
    """`value` as a number if it is one: YAML 1.1 reads `1e-5` as a text."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value
