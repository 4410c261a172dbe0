"""Vetted copies of a model's small files in a temporary folder: all that transformers is given of a model folder.

Libraries take some values of JSON files for paths (`fast_tokenizer_files`, `configuration_files`). In a folder of its
own, with vetted values, no such path leads to a file outside.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from lowmem_aim.errors import ModelError, printable
from lowmem_aim.models.checkpoint import Checkpoint
from lowmem_aim.models.config import CONFIG, MAX_CONFIG_BYTES, parse_json
from lowmem_aim.models.folder import is_plain
from lowmem_aim.models.known_files import LARGEST_FILE, OF_TOKENIZERS, TOKENIZERS, fits
from lowmem_aim.models.links import is_inside
from lowmem_aim.system.files import disk_errors, input_errors, is_file, temporary_folder

TOKENIZER_CONFIG = "tokenizer_config.json"
# Paths of the machine on which a model was saved, which transformers itself writes and nobody reads.
_LEFT_OVER = frozenset(
    {"name_or_path", "_name_or_path", "special_tokens_map_file", "tokenizer_file", "added_tokens_file"}
)
# Texts that are no paths, whatever they look like: tokens, chat templates, patterns.
_TEXT = re.compile(r".*(token|tokens|content|template|templates|pattern|regex|schema|prefix|suffix)")


def tokenizer_files(checkpoint: Checkpoint) -> dict[str, bytes]:
    """The tokenizer's files by name, with no value that is a path out of the folder; empty if there is no vocabulary.

    Raises ModelError for such a path, and for files that are too large or not what their names say.
    """
    if not _names(checkpoint, TOKENIZERS):
        return {}
    config = tokenizer_config(checkpoint)
    versions = config.get("fast_tokenizer_files")  # further tokenizer.json, for other versions of transformers
    names = [*_names(checkpoint, OF_TOKENIZERS), *(filter(is_plain, versions) if isinstance(versions, list) else ())]
    found = {name: checkpoint.small_file(name, LARGEST_FILE) for name in names}
    files = {name: content for name, content in found.items() if content is not None}
    return files | ({TOKENIZER_CONFIG: json.dumps(config).encode()} if config else {})


def _names(checkpoint: Checkpoint, patterns: Collection[str]) -> list[str]:
    """The names of the folder's regular files that fit the patterns, sorted; links out of the folder do not count."""
    folder = checkpoint.folder
    with input_errors(folder):
        files = sorted(file for file in folder.iterdir() if fits(file.name, patterns))
        return [file.name for file in files if is_file(file) and is_inside(folder, file)]


def tokenizer_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The tokenizer_config.json, without what other machines left in it; empty if there is none.

    Raises ModelError for values that lead out of the model folder, and for what is no JSON object.
    """
    content = checkpoint.small_file(TOKENIZER_CONFIG, MAX_CONFIG_BYTES)
    if content is None:
        return {}
    file = checkpoint.folder / TOKENIZER_CONFIG
    table = parse_json(content, file)
    if not isinstance(table, dict):
        raise ModelError(f"`{printable(str(file))}` is not a JSON object")
    kept = {key: value for key, value in table.items() if key not in _LEFT_OVER}
    outside = [
        f"`{printable(str(file))}`: `{printable(key)}` leads out of the model folder: `{printable(value)}`"
        for key, value in _paths_outside(kept)
    ]
    if outside:
        raise ModelError(outside, hint="put the tokenizer's files into the model's folder, and name them there")
    return kept


def _paths_outside(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield (dotted key, path) of all texts in a JSON value that a library could take for a path out of its folder."""
    if isinstance(value, dict):
        for name, item in value.items():
            if not _TEXT.fullmatch(name):
                yield from _paths_outside(item, f"{key}.{name}" if key else name)
    elif isinstance(value, list):
        for item in value:
            yield from _paths_outside(item, key)
    elif isinstance(value, str) and leads_out(value):
        yield key, value


def leads_out(text: str) -> bool:
    """Whether a path could lead out of the folder that it is relative to, on any system."""
    absolute = PurePosixPath(text).is_absolute() or PureWindowsPath(text).anchor != "" or text.startswith("~")
    return absolute or ".." in re.split(r"[/\\]", text)


def _without_paths(value: Any) -> Any:
    """The JSON value of a config without texts that lead out: a training's leftovers (`_name_or_path`), or a trap."""
    if isinstance(value, Mapping):
        kept = ((key, item) for key, item in value.items() if not (isinstance(item, str) and leads_out(item)))
        return {key: _without_paths(item) for key, item in kept if key != "configuration_files"}
    return [_without_paths(item) for item in value] if isinstance(value, list) else value


@contextlib.contextmanager
def vetted_folder(config: Mapping[str, Any], files: Mapping[str, bytes] | None = None) -> Iterator[Path]:
    """A temporary folder with the config, without paths that lead out, and with `files`. Raises DiskError."""
    with temporary_folder() as folder:
        for name, content in {CONFIG: json.dumps(_without_paths(config)).encode(), **(files or {})}.items():
            with disk_errors(Path(folder, name)):
                Path(folder, name).write_bytes(content)
        yield Path(folder)
