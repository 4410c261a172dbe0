"""Code that the files of tasks bring along: found without running any of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from lowmem_aim.errors import UsageError, printable


def codes(folders: Sequence[Path], entries: Sequence[Any]) -> Iterator[UsageError]:
    """Yield an error for each task of a file in one of the user's folders that brings code along."""
    own = {folder.resolve() for folder in folders}
    for entry in entries:
        path = entry.yaml_path and Path(entry.yaml_path).resolve()
        if path is None or own.isdisjoint(path.parents):
            continue
        if codes := sorted(set(_codes_in(path, set()))):
            what = ", ".join(f"`{printable(name)}`" for name in codes[:3])
            yield UsageError(
                f"the task `{printable(entry.name)}` in `{printable(str(path))}` runs code of its own: {what}",
                hint="`--allow-task-code`, if you trust these files",
            )


def _codes_in(path: Path, seen: set[Path]) -> Iterator[str]:
    """Yield the names of functions and classes that a task's file, or one that it includes, has run."""
    if path in seen:
        return
    seen.add(path)
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UsageError(f"the task file `{printable(str(path))}` cannot be read: {printable(str(error))}") from error
    nodes = [root]
    while nodes:
        node = nodes.pop()
        if isinstance(node, yaml.ScalarNode) and node.tag.startswith("!"):
            yield str(node.value)
        elif isinstance(node, yaml.SequenceNode):
            nodes += node.value
        elif isinstance(node, yaml.MappingNode):
            nodes += [value for _, value in node.value]
            if node is root:
                yield from _codes_named(node, path, seen)


def _codes_named(root: yaml.MappingNode, path: Path, seen: set[Path]) -> Iterator[str]:
    """Yield the class that a task is of, and what runs in the files that it includes."""
    for key, value in root.value:
        if key.value == "class":
            yield str(value.value)
        if key.value == "include":
            files = [item.value for item in value.value] if isinstance(value, yaml.SequenceNode) else [value.value]
            for file in files:
                yield from _codes_in((path.parent / file).resolve(), seen)
