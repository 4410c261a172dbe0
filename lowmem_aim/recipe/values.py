"""The values in a recipe's tree, checked one by one. Problems are collected, so that all are reported at once."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lowmem_aim.errors import RecipeError, did_you_mean, nearest, printable
from lowmem_aim.methods.method import Parameter
from lowmem_aim.recipe import places
from lowmem_aim.recipe.recipe import Setting
from lowmem_aim.recipe.references import parsed
from lowmem_aim.recipe.words import is_hub_id
from lowmem_aim.recipe.yaml_tree import Node

_IN_FILE = re.compile(r"(?!--)(.+):(\d+):(\d+)", re.DOTALL)
_PLACE_FIRST = re.compile(r"[^`]+:\d+:\d+: ")
LONGEST_PATH, LONGEST_NAME = 4096, 255  # bytes; the limits of common systems


@dataclass(frozen=True)
class Remark:
    """A remark about a recipe: where, what, and for a problem what to do about it; "" leaves that to RecipeError."""

    where: str
    text: str
    hint: str = ""


class Values:
    """A reader of values from nodes that collects what is wrong with them, each problem with its place."""

    def __init__(self, stages: Collection[str] = ()) -> None:
        """`stages`: names that stand for other documents of the recipe, where a model is named."""
        self.stages = stages
        self.problems: list[Remark] = []
        self.notices: list[Remark] = []
        self.preferred: list[str] = []  # paths that are here, and could be Hub ids
        self.sought: dict[str, tuple[str, ...]] = {}  # paths found nowhere -> the folders that were looked in
        self.named_at: dict[str, str] = {}  # models and files -> where a file names them first

    def problem(self, node: Node, text: str, hint: str = "") -> None:
        """Note a problem at the place of `node`."""
        self.problems.append(Remark(node.where, text, hint))

    def error(self) -> RecipeError | None:
        """All problems as one error, in the order of their places; None if there are none."""
        told = together(sorted(self.problems, key=lambda problem: place_of(problem.where)[1:]))
        return RecipeError(told.keys(), [*told.values()]) if told else None

    def check_keys(
        self,
        table: Node,
        known: Sequence[str],
        unsupported: Mapping[str, tuple[str, str]],
        *,
        ignoring: bool = False,
    ) -> set[str]:
        """Note a problem for each key of `table` that is unknown, or known to mergekit but not supported.

        `unsupported`: key -> (why, what to do). `ignoring`: a key that is no slip of a known one is ignored, with a
        notice, as in mergekit. Returns the known keys that unknown ones were meant to be: these are not to be reported
        as missing too.
        """
        meant = set()
        for key, node in table.value.items():
            if node.value is None:
                continue  # as if it were absent
            if key in unsupported:
                why, hint = unsupported[key]
                self.problem(node, f"`{key}` is not supported: {why}", hint)
            elif key not in known and ignoring and not nearest(key, known, slips=2):
                self.notices.append(Remark(node.where, f"the key `{printable(key)}` is unknown and is ignored"))
            elif key not in known:
                hint = f"the keys allowed here are {', '.join(known)}"
                self.problem(node, f"unknown key `{printable(key)}`{did_you_mean(key, known)}", hint)
                meant.add(nearest(key, known))
        return meant

    def text(self, node: Node | None, what: str, hint: str = "") -> str | None:
        """The text of a node without outer spaces; None if the node is empty, or after a problem.

        `what` is its key, and `hint` what to do about a value that is wrong.
        """
        if node is None or node.value is None:
            return None
        value = node.value
        if not isinstance(value, str) or not value.strip():
            self.problem(node, f"`{what}` must be text", hint)
            return None
        if wrong := no_name(value.strip()):
            self.problem(node, f"`{what}`: `{printable(value)}` {wrong}", hint)
            return None
        return value.strip()

    def model(self, node: Node | None, what: str) -> str | None:
        """The reference of a model, its paths as seen from the current folder; None as in `text`. See `references`.

        The name of a stage stands for its result, also where an adapter is added to it.
        """
        long = node is not None and isinstance(node.value, dict)
        hint = f"name a folder or a model on the Hub: `{what}: folder-or-id`"
        text = self._long_form(node, what) if node is not None and long else self.text(node, what, hint)
        if node is None or text is None:
            return None
        model, *adapters = parsed(text, lambda path: path in self.stages or _is_folder(path, node.folder)).parts
        found = model if model in self.stages else self._placed_model(node, model)
        if found in self.sought and "/" not in found and (meant := nearest(found, self.stages)):
            self.problem(
                node,
                f"`{what}`: neither a stage nor a folder is named `{printable(found)}`",
                f"did you mean the stage `{meant}`?",
            )
            found = meant  # so that the stage counts as used, and no folder of the wrong name is looked for
        reference = "+".join([found, *(self._placed_model(node, part) for part in adapters)])
        self.note_place(node, reference)
        return reference

    def _placed_model(self, node: Node, text: str) -> str:
        return self.placed(node, self._without_idle_revision(node, text), os.path.isdir)

    def _long_form(self, node: Node, what: str) -> str | None:
        """The text of `{model: ..., lora: ..., override_architecture: ...}`, or of one `{path, revision}` by itself."""
        if "model" not in node.value:
            return self._path(node, what)
        self.check_keys(node, ("model", "lora", "override_architecture"), {})
        if override := node.get("override_architecture"):
            why = "`override_architecture` is not used: a tensor's role follows from `model_type` in the model's config"
            self.notices.append(Remark(override.where, why))
        inner = {key: node.get(key) for key in ("model", "lora")}
        parts = [self._path(part, f"{what}: {key}") for key, part in inner.items() if part is not None]
        if inner["model"] is None:
            self.problem(node, f"`{what}` names no model", "write `{model: folder-or-id, lora: folder-or-id}`")
            return None
        return None if None in parts else "+".join(filter(None, parts))

    def _path(self, node: Node, what: str) -> str | None:
        """A path or id, with its revision if it is on the Hub; from a text, or from `{path, revision}`."""
        if not isinstance(node.value, dict):
            return self.text(node, what)
        self.check_keys(node, ("path", "revision"), {})
        path, revision = (self.text(node.get(key), f"{what}: {key}") for key in ("path", "revision"))
        if path is None and node.get("path") is None:
            self.problem(node, f"`{what}` names no `path`", "write `{path: folder-or-id}`")
        if path is None or revision is None:
            return path
        if _is_folder(path, node.folder):
            return self._told_idle(node, path)
        return f"{path}@{revision}"

    def _without_idle_revision(self, node: Node, reference: str) -> str:
        """A path or id, without its `@revision` if the path is a folder, which has none."""
        path, at, _ = reference.rpartition("@")
        idle = at and _is_folder(path, node.folder) and not _is_folder(reference, node.folder)
        return self._told_idle(node, path) if idle else reference

    def _told_idle(self, node: Node, path: str) -> str:
        self.notices.append(Remark(node.where, f"`{printable(path)}` is a folder: its revision says nothing"))
        return path

    def note_place(self, node: Node, name: str) -> None:
        """Note where a file names a model or a file first."""
        if place_of(node.where)[1]:
            self.named_at.setdefault(name, node.where)

    def placed(self, node: Node, path: str, exists: Callable[[str], bool]) -> str:
        """A path of the recipe as seen from the current folder; two different things of that name are a problem."""
        found = places.find(path, node.folder, exists)
        if found.doubt:
            self.problem(node, found.doubt, "write the full path of the one that you mean")
        if found.places:
            self.sought[path] = found.places
        elif is_hub_id(path):
            self.preferred.append(path)
        return found.path

    def setting(self, node: Node, parameter: Parameter, hint: str = "") -> Setting | None:
        """A parameter's value as the recipe gives it: a scalar, a gradient or filters; None after a problem.

        `hint`: what to do about a value that is wrong.
        """
        listed = node.value if isinstance(node.value, list) else [node]
        if not any(isinstance(item.value, dict) for item in listed):
            value = self.value(node, parameter, hint)
            return None if value is None else Setting(value)
        rules = []
        for item in listed:
            rule = item if isinstance(item.value, dict) else item.with_item("value", item)
            self.check_keys(rule, ("filter", "value"), {})
            pattern, value_node = rule.get("filter"), rule.get("value")
            if value_node is None:
                self.problem(rule, f"a filter of `{parameter.name}` needs a `value`", hint)
                continue
            if pattern is not None and not (isinstance(pattern.value, str) and pattern.value):
                text = f"a filter of `{parameter.name}` must be a part of tensor names, or `*`"
                self.problem(pattern, text, hint)
                continue
            rules.append((pattern.value if pattern else "", self.value(value_node, parameter, hint)))
        return Setting(tuple(rules), filtered=True, where=node.where)

    def value(self, node: Node, parameter: Parameter, hint: str = "") -> Any:
        """A scalar, or a gradient as a tuple, checked; None after a problem."""
        if isinstance(node.value, list):
            return self._gradient(node, parameter, hint)
        if isinstance(node.value, dict):
            self.problem(node, f"`{parameter.name}` cannot be a table", hint)
            return None
        number = parameter.kind == "number" and node.value not in parameter.words
        value = _number(node.value) if number else _switch(node.value) if parameter.kind != "number" else node.value
        wrong = parameter.problem(value)
        if wrong:
            self.problem(node, wrong, hint)
            return None
        return value

    def _gradient(self, node: Node, parameter: Parameter, hint: str) -> tuple[Any, ...] | None:
        if not node.value:
            self.problem(node, f"`{parameter.name}` cannot be an empty list", hint)
            return None
        if any(isinstance(item.value, list) for item in node.value):
            self.problem(node, f"`{parameter.name}` cannot be a list of lists", hint)
            return None
        values = [self.value(item, parameter, hint) for item in node.value]
        return tuple(values) if None not in values else None


def together(remarks: Iterable[Remark]) -> dict[str, str]:
    """Each remark as a line -> its hint; what is said of several places in a file is said once, with all of them."""
    places: dict[tuple[str, str, str], list[str]] = {}
    for remark in remarks:
        file, line, column = place_of(remark.where)
        found = places.setdefault((file, remark.text, remark.hint), [])
        place = f"{line}:{column}"
        if line and place not in found:
            found.append(place)
    return {
        f"{':'.join([file, *found[:1]])}: {text}{_also_at(found[1:])}": hint
        for (file, text, hint), found in places.items()
    }


def _also_at(places: Sequence[str]) -> str:
    return f" (and at {', '.join(places)})" if places else ""


def place_of(where: str) -> tuple[str, int, int]:
    """(file, line, column) of a place in a file; (the place, 0, 0) of a flag, which has neither and so comes first."""
    found = _IN_FILE.fullmatch(where)
    return (found[1], int(found[2]), int(found[3])) if found else (where, 0, 0)


def begins_with_place(problem: str) -> bool:
    """Whether a problem says first at which place of which file it is."""
    return _PLACE_FIRST.match(problem) is not None


def _is_folder(path: str, beside: str) -> bool:
    """Whether a recipe's path leads to a folder; `beside` is the folder of the recipe's file."""
    return os.path.isdir(os.path.expanduser(places.find(path, beside, os.path.isdir).path))


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


def _switch(value: Any) -> Any:
    """`value` as true or false if it is 1 or 0, which mergekit takes for them: `normalize: 1.0`."""
    return bool(value) if isinstance(value, int | float) and value in (0, 1) else value


def _number(value: Any) -> Any:
    """`value` as a number if it is one: YAML 1.1 reads `1e-5` as a text."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value
