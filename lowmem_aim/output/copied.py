"""The files that an output takes over from its reference as they are: tokenizer, processors, templates, licence.

Regular files whose names `models.known_files` lists, and such files in the folders that modules.json names and in
additional_chat_templates: never code, a hidden file or a link that leads out. Keys of JSON that would run code are
dropped. What is left behind and might be missed is told.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lowmem_aim.errors import LowmemAimError, ModelError, noted, printable, raise_all
from lowmem_aim.events import Emit, Notice, silent
from lowmem_aim.models.checkpoint import Checkpoint
from lowmem_aim.models.config import CONFIG, parse_json
from lowmem_aim.models.folder import CHAT_TEMPLATES
from lowmem_aim.models.headers import read_header
from lowmem_aim.models.known_files import (
    IN_MODULES,
    LARGEST_FILE,
    LEGAL,
    MODULES,
    NOT_MISSED,
    READ_BY_LOADERS,
    VOCABULARIES,
    fits,
)
from lowmem_aim.models.links import is_inside
from lowmem_aim.output.card import json_bytes
from lowmem_aim.output.code_keys import without_code
from lowmem_aim.output.verify import is_listable
from lowmem_aim.system.files import input_errors, is_file, is_folder
from lowmem_aim.units import shown

LARGEST_SUM = 256_000_000  # bytes
MOST_MARKS = 5_000_000  # brackets, braces and commas of a vocabulary; the largest have 2 million
MOST_TOLD = 5  # names of files that are left behind
_MODULE_FOLDER = re.compile(r"\w[\w-]*")  # `1_Pooling`; without a dot it is no file that an output has

_PLAIN = "download the file again, or remove it"
_LEADS_OUT = "a link that leads out of the folder"


def copied_files(
    reference: Checkpoint, emit: Emit = silent, *, more: Collection[str] = (), owner: str = "the reference"
) -> dict[str, bytes]:
    """The files that the output takes from the reference, by name relative to its folder; those of `more` names too.

    Notices call the reference `owner`. Raises ModelError with every file that is not what its name says: no JSON, or a
    Git LFS pointer.
    """
    with input_errors(reference.folder):
        return _copied(reference, emit, more, owner)


def _copied(reference: Checkpoint, emit: Emit, more: Collection[str], owner: str) -> dict[str, bytes]:
    root, taken = reference.folder, _Taken(reference, emit, owner)
    taken.take_all(root, (*READ_BY_LOADERS, *LEGAL, *more))
    folders = {CHAT_TEMPLATES: ("*.jinja",), **dict.fromkeys(taken.modules(), IN_MODULES)}
    for name, patterns in folders.items():
        if not is_inside(root, root / name):
            taken.left[f"{name}/"] = _LEADS_OUT
        elif is_folder(root / name):
            taken.take_all(root / name, patterns)
    raise_all(taken.errors)
    taken.left |= {f"{f.name}/": "" for f in root.iterdir() if is_folder(f) and f.name not in folders and _matters(f)}
    _, gone = without_code(reference.config)
    _tell_of_code(CONFIG, gone, emit)
    _tell_of_left(taken.left, owner, emit)
    return taken.files


@dataclass
class _Taken:
    """The files taken of a reference so far, and those left behind, with the reason."""

    reference: Checkpoint
    emit: Emit
    owner: str  # the reference, in notices
    files: dict[str, bytes] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    errors: list[LowmemAimError] = field(default_factory=list)

    def take_all(self, folder: Path, patterns: Collection[str]) -> None:
        """Take every file of a folder whose name is one of the patterns'."""
        for file in sorted(folder.iterdir()):
            name = file.relative_to(self.reference.folder).as_posix()
            if fits(file.name, patterns) and file.suffix.lower() != ".py" and not is_folder(file):
                with noted(self.errors):
                    self._take(name, file)
            elif _matters(file) and is_file(file):
                self.left[name] = "code" if file.suffix.lower() == ".py" else ""

    def _take(self, name: str, file: Path) -> None:
        if file.name.startswith("."):
            return
        if why := self._refusal(name, file):
            self.left[name] = why
        else:
            content = self.reference.small_file(name, LARGEST_FILE)
            if content is not None:
                self.files[name] = self._checked(name, content)

    def _refusal(self, name: str, file: Path) -> str:
        """Why a file is left behind, or an empty string."""
        if not is_listable(name):
            return "its name is too long, or has characters that other systems do not allow in names"
        if not is_file(file):
            return "no regular file"
        if not is_inside(self.reference.folder, file):
            return _LEADS_OUT
        size = file.stat().st_size
        if size > LARGEST_FILE:
            return f"more than {shown(LARGEST_FILE)}"
        together = size + sum(map(len, self.files.values()))
        return f"more than {shown(LARGEST_SUM)} together with the others" if together > LARGEST_SUM else ""

    def _checked(self, name: str, content: bytes) -> bytes:
        """The content, without keys that run code. Raises ModelError if it is not what the file's name says."""
        file = self.reference.folder / name
        if fits(file.name, VOCABULARIES):
            _check_vocabulary(content, file)
        elif file.suffix.lower() == ".json":
            value, gone = without_code(parse_json(content, file))
            _tell_of_code(name, gone, self.emit)
            return json_bytes(value) if gone else content
        elif file.suffix.lower() == ".safetensors":
            read_header(file)
            self.emit(
                Notice(
                    f"`{printable(name)}` is {self.owner}'s: weights in module folders are not merged",
                    "warning",
                )
            )
        return content

    def modules(self) -> list[str]:
        """The folders that modules.json names. Raises ModelError if one is not a plain name."""
        if MODULES not in self.files:
            return []
        file = self.reference.folder / MODULES
        entries = parse_json(self.files[MODULES], file)
        entries = entries if isinstance(entries, list) else [entries]
        paths = [entry.get("path", "") if isinstance(entry, dict) else None for entry in entries]
        for path in paths:
            if not isinstance(path, str) or (path and not _MODULE_FOLDER.fullmatch(path)):
                shown_path = printable(repr(path))
                raise ModelError(f"`{printable(str(file))}` names the folder {shown_path}: not a plain name", _PLAIN)
        return [path for path in paths if path]


def _matters(file: Path) -> bool:
    return not file.name.startswith(".") and not fits(file.name, NOT_MISSED)


def _check_vocabulary(content: bytes, file: Path) -> None:
    """Raise ModelError if a large JSON file is none. Of what is parsed, no more than one table is kept at a time."""
    name = printable(str(file))
    if sum(map(content.count, (b"[", b"{", b","))) > MOST_MARKS:
        raise ModelError(f"`{name}` holds more than {MOST_MARKS} values")
    try:
        json.loads(content.decode("utf-8"), object_pairs_hook=lambda pairs: None)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"`{name}` is not valid JSON: {printable(str(error))}") from error


def _tell_of_code(name: str, gone: Sequence[str], emit: Emit) -> None:
    if gone:
        keys = ", ".join(f"`{key}`" for key in gone)
        emit(Notice(f"the output's {printable(name)} has no {keys}, which would make a loader run code", "warning"))


def _tell_of_left(left: dict[str, str], owner: str, emit: Emit) -> None:
    names = [f"`{printable(name)}`" + f" ({why})" * bool(why) for name, why in sorted(left.items())]
    more = [f"{len(names) - MOST_TOLD} more"] * (len(names) > MOST_TOLD)
    if names:
        emit(Notice(f"not copied from {owner}: {', '.join([*names[:MOST_TOLD], *more])}", "warning"))
