"""A recipe's tree as YAML that can be run from any folder: paths that lead somewhere are written whole."""

from __future__ import annotations

import os
from typing import Any

import yaml

from lowmem_aim.recipe import places
from lowmem_aim.recipe.references import parsed
from lowmem_aim.recipe.words import BUILTIN, SOURCES
from lowmem_aim.recipe.yaml_tree import Node

# Keys of paths -> the words that are none there.
_PATHS = {
    **dict.fromkeys(("base_model", "model", "lora", "path"), ()),
    **dict.fromkeys(("tokenizer_source", "source"), SOURCES),
    "calibration": (BUILTIN,),
}


def written(tree: Node) -> str:
    """The YAML text of a recipe, without keys that are null."""
    return yaml.safe_dump(_plain(tree, ""), sort_keys=False, allow_unicode=True)


def _plain(node: Node, key: str) -> Any:
    if isinstance(node.value, dict):
        return {name: _plain(item, name) for name, item in node.value.items() if item.value is not None}
    if isinstance(node.value, list):
        return [_plain(item, key) for item in node.value]
    is_path = key in _PATHS and isinstance(node.value, str) and node.value not in _PATHS[key]
    return _whole(node) if is_path else node.value


def _whole(node: Node) -> str:
    """A path as it can be used anywhere, if it leads somewhere; of a model and its adapter, each part by itself."""

    def exists(path: str) -> bool:
        return os.path.lexists(os.path.expanduser(path))

    def found(path: str) -> str:
        return places.find(path, node.folder, exists).path

    parts = [found(part) for part in parsed(node.value, lambda path: exists(found(path))).parts]
    return "+".join(os.path.abspath(os.path.expanduser(part)) if exists(part) else part for part in parts)
