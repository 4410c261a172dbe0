"""Carried here from plan.py."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from lowmem_aim.planning.layers import kind_of
from lowmem_aim.recipe.recipe import Recipe

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
