"""Recipe + headers -> what to do, in which order, and where every byte of the output goes. Pure: nothing is read.

Shards are laid out as `safetensors.save_file` would: by falling alignment of the dtype, then by name. Tasks come in
that order, so that a shard is written front to back.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from lowmem_aim.errors import RecipeError, UsageError
from lowmem_aim.headers import DTYPES, TensorInfo
from lowmem_aim.inputs import Inputs
from lowmem_aim.methods import Subject
from lowmem_aim.recipe import Recipe

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# The order in which the safetensors library writes dtypes, the last first.
_DTYPE_ORDER = ("BOOL", "U8", "I8", "I16", "F16", "BF16", "I32", "F32", "F64", "I64")
SMALLEST_SHARD = 1_000
# What becomes of an expert's NaN and Inf: they end the merge, or take the base's value, as if the expert had no say.
NonFinite = Literal["stop", "base"]


@dataclass(frozen=True)
class Task:
    """One tensor of the output."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype  # of the output
    action: Literal["merge", "copy"]  # copy: the reference's bytes as they are
    parameters: Mapping[str, Any]  # of the method, by recipe name
    whole: bool = False  # its rows may not come in several slices
    omega: float = 1.0  # of AIM, if it relaxes this tensor
    layer: int | None = None  # None: outside the layers
    begin: int = 0  # byte offset of the data in its shard's file

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @property
    def kind(self) -> str:
        return kind_of(self.name, self.layer)

    @property
    def end(self) -> int:
        return self.begin + self.nbytes


@dataclass(frozen=True)
class Shard:
    """One output file: its header as bytes, and its tensors in file order with their offsets."""

    name: str
    header: bytes
    tasks: tuple[Task, ...]

    @property
    def nbytes(self) -> int:
        return self.tasks[-1].end if self.tasks else len(self.header)


@dataclass(frozen=True)
class Plan:
    recipe: Recipe
    shards: tuple[Shard, ...]
    seed: int
    nonfinite: NonFinite = "stop"

    @property
    def tasks(self) -> tuple[Task, ...]:
        return tuple(task for shard in self.shards for task in shard.tasks)

    @property
    def output_bytes(self) -> int:
        return sum(shard.nbytes for shard in self.shards)

    @property
    def tensor_bytes(self) -> int:
        return sum(task.nbytes for task in self.tasks)

    def size(self) -> dict[str, Any]:
        """What there is to do: for the journal."""
        return {"tensors": len(self.tasks), "bytes": self.output_bytes, "shards": [shard.name for shard in self.shards]}

    def index(self) -> bytes:
        """model.safetensors.index.json."""
        weight_map = {task.name: shard.name for shard in self.shards for task in shard.tasks}
        index = {"metadata": {"total_size": self.tensor_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        return (json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode()


def make_plan(recipe: Recipe, inputs: Inputs, *, seed: int, shard_bytes: int, nonfinite: NonFinite = "stop") -> Plan:
    """Lay out the output.

    Raises RecipeError if a parameter has no value for some tensor, UsageError for flags that do not fit the recipe.
    """
    if nonfinite == "base" and not recipe.builds_on_base:
        raise UsageError(
            f"`--nonfinite base` needs a method that builds on a base, which `{recipe.method.name}` does not",
            hint="mend or replace the model that holds NaN or Inf, or leave the flag out",
        )
    if shard_bytes < SMALLEST_SHARD:
        raise UsageError(f"a shard size of {shard_bytes} bytes is too small", hint="the default is 5GB")
    layers = layer_count(inputs.reference.config)
    tasks = [_task(info, recipe, inputs, layers) for info in inputs.reference if info.name not in inputs.dropped]
    _check(tasks, recipe, inputs, seed)
    groups = _grouped(tasks, shard_bytes)
    return Plan(recipe, tuple(_shard(group, i + 1, len(groups)) for i, group in enumerate(groups)), seed, nonfinite)


def _task(info: TensorInfo, recipe: Recipe, inputs: Inputs, layers: int) -> Task:
    t, layer = depth(info.name, layers), layer_of(info.name, layers)
    if not info.dtype.is_floating_point or info.name in inputs.outline.buffers or info.numel == 0:
        return Task(info.name, info.shape, info.dtype, "copy", {}, layer=layer)
    dtype = getattr(torch, recipe.dtype) if recipe.dtype else info.dtype
    whole = recipe.method.whole_rows and len(info.shape) < 2
    omega = recipe.aim.omega_at(info.name, t) if recipe.aim else 1.0
    return Task(info.name, info.shape, dtype, "merge", recipe.resolve(info.name, t), whole, omega, layer)


def subject_of(name: str, shape: tuple[int, ...], recipe: Recipe, inputs: Inputs, seed: int) -> Subject:
    """The tensor as the method sees it."""
    return Subject(
        name,
        shape,
        math.prod(shape),
        len(inputs.experts),
        seed,
        based=recipe.builds_on_base,
        input_dim=-2 if name in inputs.outline.inputs_first else -1,
    )


def _check(tasks: Sequence[Task], recipe: Recipe, inputs: Inputs, seed: int) -> None:
    """Raises RecipeError with what the method refuses, each once: most parameters are the same for all tensors."""
    problems = [
        recipe.method.check(subject_of(task.name, task.shape, recipe, inputs, seed), task.parameters)
        for task in tasks
        if task.action == "merge"
    ]
    if found := [problem for problem in dict.fromkeys(problems) if problem]:
        raise RecipeError([f"{recipe.where}: {problem}" for problem in found])


# --- depth: where on a gradient a tensor lies -------------------------------------------------------------------------


def layer_count(config: Mapping[str, Any]) -> int:
    text_config = config.get("text_config")
    for table in (config, text_config if isinstance(text_config, dict) else {}):
        for key in ("num_hidden_layers", "n_layer", "num_layers"):
            if isinstance(table.get(key), int):
                return int(table[key])
    return 0


def layer_of(tensor: str, layers: int) -> int | None:
    """Its index from the tensor's name; None for tensors outside the layers."""
    match = re.search(r"(?:^|\.)(\d+)\.", tensor)
    return int(match[1]) if match and int(match[1]) < layers else None


def kind_of(tensor: str, layer: int | None) -> str:
    """The module's name in its layer, numbers of experts left out: `self_attn.q_proj`; outside the layers its own."""
    name = tensor.removesuffix(".weight")
    if layer is None:
        return ".".join(name.split(".")[-2:] if name.endswith(".bias") else name.split(".")[-1:])
    inside = name.partition(f".{layer}.")[2] if not name.startswith(f"{layer}.") else name.partition(".")[2]
    return ".".join("*" if part.isdecimal() else part for part in inside.split("."))


def depth(tensor: str, layers: int) -> float:
    """layer index / (layers - 1); 0 for tensors outside the layers."""
    index = layer_of(tensor, layers) or 0
    return index / (layers - 1) if layers > 1 else 0.0


# --- shards ---------------------------------------------------------------------------------------------------------


def _grouped(tasks: Sequence[Task], shard_bytes: int) -> list[list[Task]]:
    """Fill shards in the reference's order; a tensor larger than a shard has one to itself."""
    groups: list[list[Task]] = [[]]
    filled = 0
    for task in tasks:
        if groups[-1] and filled + task.nbytes > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(task)
        filled += task.nbytes
    return groups


def _shard(tasks: Sequence[Task], number: int, count: int) -> Shard:
    name = "model.safetensors" if count == 1 else f"model-{number:05}-of-{count:05}.safetensors"
    ordered = sorted(tasks, key=lambda t: (-_DTYPE_ORDER.index(_DTYPE_NAMES[t.dtype]), t.name))
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for task in ordered:
        offsets = [offset, offset + task.nbytes]
        table[task.name] = {"dtype": _DTYPE_NAMES[task.dtype], "shape": list(task.shape), "data_offsets": offsets}
        offset = offsets[1]
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the data starts aligned
    header = len(text).to_bytes(8, "little") + text
    placed = [replace(t, begin=len(header) + table[t.name]["data_offsets"][0]) for t in ordered]
    return Shard(name, header, tuple(placed))
