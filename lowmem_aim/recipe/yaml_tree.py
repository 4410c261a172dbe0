"""YAML as a tree of `Node`s with their file, line and column, read so that no input can run code or exhaust memory.

Only plain scalars, lists and tables are built, at most MAX_NODES of them and MAX_DEPTH deep, aliases expanded. Of a key
that appears twice in a table the last value is kept, and the root knows of it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from lowmem_aim.errors import RecipeError, nearest, printable
from lowmem_aim.system.faults import LONGEST_PATH, advice, cause

MAX_RECIPE_BYTES = 1_000_000
MAX_NODES = 10_000  # a real recipe has a few hundred; an alias bomb has billions
MAX_DEPTH = 40
MAX_NUMBER = 1000  # characters; `1:59:59:...` is a number to YAML, and the time to parse it grows with its square
STANDARD = "tag:yaml.org,2002:"
MANY_RECIPES = 1000  # in one folder, of which no more are compared
_RECIPE_FIRST = "name a recipe file first, and then the output folder"
_SYNTAX = "check indentation, brackets and quotes in this line and the one above"
COMMAND_LINE = "command line"  # the place of a recipe that flags alone give
PLAIN_TAGS = frozenset(["null", "bool", "int", "float", "str", "seq", "map", "merge", "timestamp", "value"])


@dataclass(frozen=True)
class Node:
    """A value of the recipe (a scalar, a list or a table of Nodes) and its place: `file:line:column`, or a flag."""

    value: Any
    where: str
    folder: str = ""  # of the recipe's file, for its relative paths; "": the current folder
    others: tuple[Node, ...] = ()  # at the top: the other documents of the file, which are named stages
    twice: tuple[tuple[str, str], ...] = ()  # of a root: each key that stands twice in its table, as (key, place)

    @property
    def by_flag(self) -> bool:
        """Whether the value was given on the command line."""
        return self.where.startswith("--")

    def get(self, key: str) -> Node | None:
        """The value of a key; None if the key is absent or null, or if the node is no table."""
        found: Node | None = self.value.get(key) if isinstance(self.value, dict) else None
        return None if found is None or found.value is None else found

    def switched_on(self, key: str) -> Node | None:
        """The value of a key that `false` switches off; None as in `get`, and for `false`."""
        found = self.get(key)
        return None if found is None or found.value is False else found

    def with_item(self, key: str, node: Node) -> Node:
        """A copy of the table with `key` set to `node`; a node that is no table counts as an empty one."""
        return replace(self, value={**(self.value if isinstance(self.value, dict) else {}), key: node})


def parse(text: str, source: str, folder: str = "") -> Node:
    """Parse YAML into a tree. `source` is the name for its lines, `folder` that of its file. Raises RecipeError.

    Of several documents the tree is that of `one_of`; empty ones do not count.
    """
    if len(text.encode("utf-8", "replace")) > MAX_RECIPE_BYTES:
        raise RecipeError(f"{source}: this is not a recipe: it has more than {MAX_RECIPE_BYTES} bytes", _RECIPE_FIRST)
    try:
        roots = list(_Loader(text, source).documents())
    except yaml.MarkedYAMLError as error:
        where = _at(source, error.problem_mark) if error.problem_mark else f"{source}:1:1"
        what = printable(error.problem or str(error))
        raise RecipeError(f"{where}: not valid YAML: {what}", _SYNTAX) from error
    except yaml.reader.ReaderError as error:
        above, start = text.count("\n", 0, error.position), text.rfind("\n", 0, error.position)
        where = f"{source}:{above + 1}:{error.position - start}"
        what = printable(f"the character {chr(error.character)!r} is not allowed")
        raise RecipeError(f"{where}: not valid YAML: {what}", "remove it, or write it as an escape") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise RecipeError(f"{source}:1:1: not valid YAML: {printable(str(error))}", _SYNTAX) from error
    converter = _Converter(source, folder)
    trees = [converter.document(root) for root in roots]
    if converter.problems:
        raise RecipeError(converter.problems, "write plain values, without tags or objects")
    filled = [tree for tree in trees if tree.value is not None]
    return one_of(filled or trees) if trees else Node({}, f"{source}:1:1")


def one_of(documents: Sequence[Node]) -> Node:
    """The first document without a `name`, or the last one if all have names, with the other ones in it."""
    unnamed = [document for document in documents if document.get("name") is None]
    root = unnamed[0] if unnamed else documents[-1]
    return replace(root, others=tuple(document for document in documents if document is not root))


def tree_of(value: Any, where: str) -> Node:
    """Turn Python's own mappings, lists and scalars into a tree; `where` names the value in messages.

    Raises RecipeError for a value of another kind, and for a tree that is too large or too deep.
    """
    count = 0

    def converted(value: Any, where: str, depth: int) -> Node:
        nonlocal count
        count += 1
        if count > MAX_NODES or depth > MAX_DEPTH:
            raise RecipeError(f"{where}: the recipe is too large or too deep")
        if isinstance(value, Mapping):
            items = {str(key): converted(item, f"{where}: {key}", depth + 1) for key, item in value.items()}
            return Node(items, where)
        if isinstance(value, list | tuple):
            return Node([converted(item, f"{where}[{place}]", depth + 1) for place, item in enumerate(value)], where)
        if isinstance(value, os.PathLike):
            return Node(os.fspath(value), where)
        if value is None or isinstance(value, bool | int | float | str):
            return Node(value, where)
        raise RecipeError(f"{where}: a {type(value).__name__} is not allowed in a recipe")

    return converted(value, where, 0)


def _at(source: str, mark: yaml.Mark) -> str:
    """The place of a mark: `file:line:column`, both counted from 1, the column in characters."""
    return f"{source}:{mark.line + 1}:{mark.column + 1}"


class _Loader(yaml.SafeLoader):
    """A loader that stops as soon as a file is too large or too deep: reading on would take minutes."""

    def __init__(self, text: str, source: str) -> None:
        super().__init__(text)
        self._source, self._nodes, self._depth = source, 0, 0

    def documents(self) -> Iterator[yaml.Node]:
        """Yield the root of each document."""
        while self.check_node():
            root = self.get_node()
            if root is not None:
                yield root

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._nodes += 1
        self._depth += 1
        if self._nodes > MAX_NODES or self._depth > MAX_DEPTH:
            where = _at(self._source, self.peek_event().start_mark)  # type: ignore[no-untyped-call]
            raise RecipeError(f"{where}: the recipe is too large or too deep")
        node: yaml.Node | None = super().compose_node(parent, index)
        self._depth -= 1
        return node


class _Converter:
    """A converter of yaml's nodes into ours, which counts what aliases expand to."""

    def __init__(self, source: str, folder: str) -> None:
        self.problems: list[str] = []  # what leaves a hole in the tree: the rest of it cannot be judged
        self.twice: list[tuple[str, str]] = []
        self._source = source
        self._folder = folder
        self._count = 0
        self._scalars = yaml.SafeLoader("")

    def document(self, root: yaml.Node) -> Node:
        """The tree of one document."""
        self.twice = []
        tree = self.convert(root)
        return replace(tree, twice=tuple(self.twice))

    def convert(self, node: yaml.Node, depth: int = 0) -> Node:
        where = _at(self._source, node.start_mark)
        self._count += 1
        if self._count > MAX_NODES or depth > MAX_DEPTH:
            raise RecipeError(f"{where}: the recipe is too large or too deep once its aliases are expanded")
        if node.tag.removeprefix(STANDARD) not in PLAIN_TAGS:
            self.problems.append(f"{where}: the YAML tag `{printable(node.tag)}` is not allowed")
            return Node(None, where, self._folder)
        if isinstance(node, yaml.SequenceNode):
            return Node([self.convert(item, depth + 1) for item in node.value], where, self._folder)
        if isinstance(node, yaml.MappingNode):
            return Node(self._table(node, where, depth), where, self._folder)
        return Node(self._scalar(node, where), where, self._folder)

    def _scalar(self, node: yaml.Node, where: str) -> Any:
        try:
            if node.tag != STANDARD + "str" and len(node.value) > MAX_NUMBER:
                raise ValueError("too long")
            value = self._scalars.construct_object(node)
        except (yaml.YAMLError, ValueError, LookupError, AttributeError) as error:  # the tag does not fit the value
            shown = printable(str(node.value)) + "` is not a valid value"
            self.problems.append(f"{where}: `{shown}: {printable(str(error))}")
            return None
        if value is not None and not isinstance(value, bool | int | float | str):
            return str(node.value)  # dates and the like: as they were written
        return value

    def _table(self, node: yaml.MappingNode, where: str, depth: int) -> dict[str, Node]:
        own: dict[str, Node] = {}
        merged: dict[str, Node] = {}
        for key_node, value_node in node.value:
            place = _at(self._source, key_node.start_mark)
            value = self.convert(value_node, depth + 1)
            if key_node.tag == STANDARD + "merge":  # `<<: *alias`, of one table or a list of them
                tables = value.value if isinstance(value.value, list) else [value]
                if not all(isinstance(table.value, dict) for table in tables):
                    self.problems.append(f"{place}: `<<` merges tables only")
                    continue
                for table in reversed(tables):
                    merged |= table.value
                continue
            key = str(key_node.value) if isinstance(key_node, yaml.ScalarNode) else ""
            if not key:
                self.problems.append(f"{place}: a key must be a plain word")
            elif key in own:
                self.twice.append((key, place))
            own[key] = replace(value, where=place)
        return merged | own


def _instead(path: Path) -> str:
    """A suggestion of a recipe beside the one that cannot be read, of nearly the same name."""
    with contextlib.suppress(OSError, ValueError):
        if not path.exists():
            recipes = islice(
                (file for ending in ("yml", "yaml") for file in path.parent.glob(f"*.{ending}")), MANY_RECIPES
            )
            stems = {file.stem: file for file in recipes}
            meant = stems.get(nearest(path.stem, stems)) or stems.get(path.stem)
            return f"; did you mean `{printable(str(meant), LONGEST_PATH)}`?" if meant else ""
    return ""


def load_tree(path: Path) -> Node:
    """Read a recipe file into a tree. Raises RecipeError."""
    try:
        with path.open("rb") as stream:
            content = stream.read(MAX_RECIPE_BYTES + 1)  # /dev/zero has no end
    except OSError as error:
        what = f"{printable(str(path), LONGEST_PATH)}: cannot be read: {cause(error)}"
        raise RecipeError(f"{what}{_instead(path)}", advice(error) or _RECIPE_FIRST) from error
    return _decoded(content, printable(str(path)), os.path.dirname(path))


def read_tree(stream: BinaryIO, source: str) -> Node:
    """Read a recipe from a stream, whose relative paths start at the current folder, into a tree. Raises RecipeError.

    `source` is the name for its lines.
    """
    return _decoded(stream.read(MAX_RECIPE_BYTES + 1), source, "")


def _decoded(content: bytes, source: str, folder: str) -> Node:
    try:
        return parse(content.decode("utf-8"), source, folder)
    except UnicodeDecodeError as error:
        if len(content) > MAX_RECIPE_BYTES:  # cut at the limit, perhaps within a letter
            raise RecipeError(
                f"{source}: this is not a recipe: it has more than {MAX_RECIPE_BYTES} bytes", _RECIPE_FIRST
            ) from None
        raise RecipeError(f"{source}: this is not a recipe: it is not UTF-8 text", _RECIPE_FIRST) from error
