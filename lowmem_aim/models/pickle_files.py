"""The pickled weights in a model folder: which files they are, and what their safetensors are called."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lowmem_aim.errors import ModelError, printable
from lowmem_aim.models.config import load_json
from lowmem_aim.models.folder import (
    ADAPTER,
    ADAPTER_PICKLE,
    COMPLETE,
    INDEX,
    MOST_PROBLEMS,
    PICKLES,
    SINGLE,
    is_plain,
)
from lowmem_aim.models.headers import MAX_HEADER_BYTES
from lowmem_aim.models.links import is_inside
from lowmem_aim.system.files import input_errors, is_file

MODEL, MODEL_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_NUMBERED = re.compile(r"pytorch_model-(\d{5})-of-(\d{5})\.bin")
_AS_IT_IS = "it needs no conversion: name it in a recipe as it is"


@dataclass(frozen=True, eq=False)  # compared and hashed by identity
class PickledWeights:
    """The pickled weights of a model or of an adapter."""

    stem: str  # of the names of its safetensors: `model` or `adapter_model`
    files: tuple[Path, ...]
    weight_map: Mapping[str, Any] = field(default_factory=dict)  # tensor -> file's name, as the index has it

    @property
    def outputs(self) -> list[str]:
        """The name of the safetensors file for each of the files."""
        count = len(self.files)
        if count == 1:
            return [f"{self.stem}.safetensors"]
        return [f"{self.stem}-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]

    def expected(self, file: Path) -> set[str]:
        """The names of tensors that the index looks for in a file."""
        return {name for name, place in self.weight_map.items() if place == file.name}

    @property
    def index(self) -> str:
        """The name of the index of the safetensors, if there are several."""
        return f"{self.stem}.safetensors.index.json"


def pickled_weights(folder: Path) -> list[PickledWeights]:
    """The pickled weights in a folder: a model's, an adapter's, or both.

    Raises ModelError if there are none, if one of their files is missing or leads out of the folder, and for a folder
    that has safetensors already.
    """
    shown = printable(str(folder))
    with input_errors(folder):
        found = [weights for weights in (_model(folder), _adapter(folder)) if weights]
        there = [name for name in (SINGLE, INDEX, ADAPTER) if is_file(folder / name)]
        others = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
    if there:
        raise ModelError(f"`{shown}` has safetensors already (`{there[0]}`)", _AS_IT_IS)
    if not found:
        which = f"; `{printable(others[0])}` is not one of these" if others else ""
        raise ModelError(f"`{shown}` has neither {MODEL}, nor its shards, nor {ADAPTER_PICKLE}{which}", COMPLETE)
    problems = [problem for weights in found for file in weights.files for problem in _wrong(folder, file)]
    if problems:
        raise ModelError(problems[:MOST_PROBLEMS], COMPLETE)
    return found


def _model(folder: Path) -> PickledWeights | None:
    """The single file, as loaders prefer it; else the files that the index names; else those that are numbered."""
    if is_file(folder / MODEL):
        return PickledWeights("model", (folder / MODEL,))
    if is_file(folder / MODEL_INDEX):
        weight_map = _weight_map(folder / MODEL_INDEX)
        return PickledWeights("model", tuple(folder / name for name in sorted(set(weight_map.values()))), weight_map)
    numbered = [match for file in folder.iterdir() if (match := _NUMBERED.fullmatch(file.name))]
    counts = {int(match[2]) for match in numbered}
    names = [f"pytorch_model-{n:05}-of-{max(counts):05}.bin" for n in range(1, max(counts) + 1)] if counts else []
    return PickledWeights("model", tuple(folder / name for name in names)) if names else None


def _adapter(folder: Path) -> PickledWeights | None:
    return PickledWeights("adapter_model", (folder / ADAPTER_PICKLE,)) if is_file(folder / ADAPTER_PICKLE) else None


def _weight_map(file: Path) -> dict[str, str]:
    index, shown = load_json(file, MAX_HEADER_BYTES), printable(str(file))
    table = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(table, dict) or not table:
        raise ModelError(f"`{shown}` has no `weight_map`")
    odd = [name for name in table.values() if not (is_plain(name) and name.endswith(".bin"))]
    if odd:
        raise ModelError(f"`{shown}` names {printable(repr(odd[0]), 80)}: not a plain file name that ends in .bin")
    return table


def _wrong(folder: Path, file: Path) -> Iterator[str]:
    shown = printable(str(file))
    if not is_file(file):
        yield f"`{shown}` is missing"
    elif not is_inside(folder, file):
        yield f"`{shown}` is a link that leads out of its model folder"
