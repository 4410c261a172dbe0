"""The parts of a plan: a task for each tensor of the output, a shard for each of its files."""

from __future__ import annotations

import json
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lowmem_aim.models.headers import matrix_shape
from lowmem_aim.planning.layers import kind_of
from lowmem_aim.planning.sources import Filling, Source
from lowmem_aim.recipe.recipe import Recipe
from lowmem_aim.system.dtypes import DTYPES, Dtype
from lowmem_aim.system.options import NonFinite


@dataclass(frozen=True)
class Task:
    """One tensor of the output: how it is made, and where its bytes go."""

    name: str
    shape: tuple[int, ...]
    dtype: Dtype  # of the output
    action: Literal["merge", "copy"]  # copy: the values of its one source
    parameters: Mapping[str, Any]  # of the method, by recipe name
    experts: tuple[Source, ...] = ()  # in the recipe's order
    base: Source | None = None  # what relaxing compares with
    filling: Filling | None = None  # rows for tokens that a model lacks
    vocabulary: bool = False  # it has a row for each token
    inputs_first: bool = False  # stored (in, out), not (out, in)
    tile: int = 0  # rows that its slices must have, in each matrix of a stack; 0: as many as fit
    linear: bool = False  # inside the layers, inputs are multiplied with it: a matrix, or a stack of them
    omega: float = 1.0  # AIM's; 1.0 without AIM
    layer: int | None = None  # None: outside the layers
    begin: int = 0  # byte offset of the data in its shard's file

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the data in the output."""
        return self.numel * self.dtype.itemsize

    def stop(self, start: int, most: int) -> int:
        """The row before which the slice that begins at row `start` ends; `most`: its rows, if that may be chosen."""
        rows = matrix_shape(self.shape)[0]
        if not self.tile:
            return min(start + most, rows)
        height = self.shape[-2] if len(self.shape) > 1 else rows
        return min(start + self.tile, (start // height + 1) * height)

    def sources(self, *, with_base: bool) -> tuple[Source, ...]:
        """All models' tensors that are read; the base's, if it is read, is the first."""
        return (self.base, *self.experts) if with_base and self.base else self.experts

    @property
    def given_dtype(self) -> Dtype:
        """The dtype of rows that stand where a model has none: the models' own, unless something is computed of them.

        float32 too where models have different dtypes.
        """
        givers = self.filling.givers if self.filling else ()
        dtypes = {source.info.dtype for source in (*self.sources(with_base=True), *givers)}
        return DTYPES["F32"] if len(dtypes) > 1 or (self.filling and self.filling.computed) else dtypes.pop()

    def read_as(self, source: Source) -> Dtype:
        """The dtype in which a model's rows are read: their own, unless rows of another dtype stand among them."""
        return source.info.dtype if self.filling is None or source.row_map is None else self.given_dtype

    @property
    def kind(self) -> str:
        """The module's name within its layer; see `kind_of`."""
        return kind_of(self.name, self.layer)

    @property
    def end(self) -> int:
        """Byte offset of the end of the data in its shard's file."""
        return self.begin + self.nbytes


@dataclass(frozen=True)
class Shard:
    """One output file: its header as bytes, and its tensors in file order with their offsets."""

    name: str
    header: bytes
    tasks: tuple[Task, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the file, header included."""
        return self.tasks[-1].end if self.tasks else len(self.header)


@dataclass(frozen=True)
class Plan:
    """All that a merge writes to one output folder, in order."""

    recipe: Recipe
    shards: tuple[Shard, ...]
    seed: int
    nonfinite: NonFinite = "stop"

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The tasks of all shards, in order."""
        return tuple(task for shard in self.shards for task in shard.tasks)

    def way(self, task: Task) -> Hashable:
        """All that the merge of one of the tensors follows from, beside its inputs: method and parameters."""
        return self.recipe.method.name, repr(sorted(task.parameters.items()))

    @property
    def output_bytes(self) -> int:
        """Bytes of all shards, headers included."""
        return sum(shard.nbytes for shard in self.shards)

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors, without headers."""
        return sum(task.nbytes for task in self.tasks)

    def size(self) -> dict[str, Any]:
        """The amount of work, as the journal records it."""
        return {
            "tensors": len(self.tasks),
            "bytes": self.output_bytes,
            "shards": [shard.name for shard in self.shards],
            "headers": [len(shard.header) for shard in self.shards],
        }

    def index(self) -> bytes:
        """The content of model.safetensors.index.json."""
        return index_of(self.shards)


def as_read(plans: Sequence[Plan]) -> list[Task]:
    """The tasks of plans that differ in method, parameters and relaxation only, as rows are read for all of them.

    A tensor is read in tiles if any of the methods needs that.
    """
    together = zip(*(plan.tasks for plan in plans), strict=True)
    return [next((task for task in alike if task.tile), alike[0]) for alike in together]


def index_of(shards: Sequence[Shard]) -> bytes:
    """The content of the index of a model's shards."""
    weight_map = {task.name: shard.name for shard in shards for task in shard.tasks}
    size = sum(task.nbytes for shard in shards for task in shard.tasks)
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode()
