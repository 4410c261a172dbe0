"""The plan of a merge, from its recipe and headers: what to do, in which order, and where every byte goes.

Pure: no file is read. Shards are laid out as `safetensors.save_file` does: by falling alignment of the dtype, then by
name. Tasks come in that order, so that a shard is written front to back.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from lowmem_aim.errors import RecipeError, UsageError
from lowmem_aim.methods.linears import ROWS
from lowmem_aim.methods.method import Subject
from lowmem_aim.models.inputs import Inputs
from lowmem_aim.models.roles import is_linear
from lowmem_aim.planning.sources import Match, matches
from lowmem_aim.planning.tasks import Plan, Shard, Task
from lowmem_aim.recipe.recipe import Recipe
from lowmem_aim.system.dtypes import BY_NAME, DTYPES
from lowmem_aim.system.options import NonFinite
from lowmem_aim.units import shown

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# The order in which the safetensors library writes dtypes, the last first.
_DTYPE_ORDER = ("BOOL", "U8", "I8", "I16", "F16", "BF16", "I32", "F32", "F64", "I64")
SMALLEST_SHARD = 1_000


def make_plan(
    recipe: Recipe,
    inputs: Inputs,
    *,
    seed: int,
    shard_bytes: int,
    shard_parameters: int | None = None,
    nonfinite: NonFinite = "stop",
) -> Plan:
    """Lay out the output. `shard_bytes` is the most bytes of tensors in a shard, unless a single tensor has more.

    `shard_parameters`, if it is given, is the most parameters in a shard, in place of `shard_bytes`.

    Raises RecipeError if a parameter has no value for some tensor or the method refuses one, UsageError for flags that
    do not fit the recipe.
    """
    if nonfinite == "base" and not recipe.builds_on_base:
        raise UsageError(
            f"`--nonfinite base` needs a method that builds on a base, which `{recipe.method.name}` does not",
            hint="replace the model that holds NaN or Inf, or leave the flag out",
        )
    if shard_parameters is None and shard_bytes < SMALLEST_SHARD:
        raise UsageError(f"a shard size of {shown(shard_bytes)} is too small", hint="give it a unit, such as 5GB")
    if shard_parameters is not None and shard_parameters < SMALLEST_SHARD:
        raise UsageError(
            f"a shard size of {shard_parameters} parameters is too small", hint="write it in full, or as 2B"
        )
    tasks = [_task(match, recipe) for match in matches(recipe, inputs)]
    if recipe.solve:  # the experts run block by block; what lies outside the layers first: it waits for nothing
        tasks.sort(key=_block)
    _check(tasks, recipe, seed)
    if shard_parameters is None:
        groups = _grouped(tasks, shard_bytes, lambda task: task.nbytes)
    else:
        groups = _grouped(tasks, shard_parameters, lambda task: math.prod(task.shape))
    order = _block if recipe.solve else None
    shards = tuple(shard_of(_name(number, len(groups)), group, order) for number, group in enumerate(groups, start=1))
    return Plan(recipe, shards, seed, nonfinite)


def _task(match: Match, recipe: Recipe) -> Task:
    info = match.model.info
    if match.buffer or not info.dtype.is_floating_point or info.numel == 0:
        return Task(match.name, info.shape, info.dtype, "copy", {}, (match.model,), layer=match.layer)
    dtype = BY_NAME[recipe.dtype] if recipe.dtype else info.output_dtype
    if match.lacking or match.part is None:
        experts, filling = (match.model,), match.filling
        return Task(match.name, match.shape, dtype, "copy", {}, experts, filling=filling, layer=match.layer)
    linear = match.layer is not None and is_linear(match.name, match.shape)
    return Task(
        match.name,
        match.shape,
        dtype,
        "merge",
        recipe.resolve(match.name, match.t, match.part, match.own_names),
        match.experts,
        match.base,
        match.filling,
        vocabulary=match.vocabulary,
        inputs_first=match.inputs_first,
        tile=_tile(recipe, match, linear=linear),
        linear=linear,
        omega=recipe.aim.omega_at(match.name, match.t) if recipe.aim else 1.0,
        layer=match.layer,
    )


def _tile(recipe: Recipe, match: Match, *, linear: bool) -> int:
    """Rows that slices of a tensor must have; 0: any number."""
    if len(match.shape) < 2:
        return math.prod(match.shape) if recipe.method.whole_rows else 0
    return (recipe.method.rows_of_linears or ROWS * bool(recipe.texts)) if linear else 0


def subject_of(task: Task, recipe: Recipe, seed: int, shape: tuple[int, ...] | None = None) -> Subject:
    """The facts about a tensor that its method is given; `shape` in place of its own."""
    shape = task.shape if shape is None else shape
    return Subject(
        task.name,
        shape,
        math.prod(shape),
        len(task.experts),
        seed,
        based=recipe.builds_on_base,
        input_dim=-2 if task.inputs_first else -1,
        linear=task.linear,
    )


def _check(tasks: Sequence[Task], recipe: Recipe, seed: int) -> None:
    """Raise RecipeError with what the method refuses, each problem once: most parameters are equal for all tensors."""
    problems = [
        recipe.method.check(subject_of(task, recipe, seed), task.parameters) for task in tasks if task.action == "merge"
    ]
    if found := [problem for problem in dict.fromkeys(problems) if problem]:
        hint = f"`lowmem-aim methods {recipe.method.name}` lists its parameters and their ranges"
        raise RecipeError([f"{recipe.where}: {problem}" for problem in found], hint)


# --- shards ---------------------------------------------------------------------------------------------------------


def _grouped(tasks: Sequence[Task], most: int, size: Callable[[Task], int]) -> list[list[Task]]:
    """Tasks grouped into shards of at most this size, in the reference's order; a larger tensor has one to itself."""
    groups: list[list[Task]] = [[]]
    filled = 0
    for task in tasks:
        if groups[-1] and filled + size(task) > most:
            groups.append([])
            filled = 0
        groups[-1].append(task)
        filled += size(task)
    return groups


def _name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number:05}-of-{count:05}.safetensors"


def _block(task: Task) -> int:
    """The place of a tensor's layer in the model; -1 outside the layers."""
    return -1 if task.layer is None else task.layer


def shard_of(name: str, tasks: Sequence[Task], order: Callable[[Task], int] | None = None) -> Shard:
    """The file of that name with the tensors of these tasks, its header and every offset laid out.

    With an `order`, that comes before dtypes and names.
    """
    ordered = sorted(tasks, key=lambda t: (-_DTYPE_ORDER.index(_DTYPE_NAMES[t.dtype]), t.name))
    if order is not None:
        ordered.sort(key=order)
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for task in ordered:
        offsets = [offset, offset + task.nbytes]
        table[task.name] = {"dtype": _DTYPE_NAMES[task.dtype], "shape": list(task.shape), "data_offsets": offsets}
        offset = offsets[1]
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the data starts at a multiple of 8 bytes
    header = len(text).to_bytes(8, "little") + text
    placed = [replace(t, begin=len(header) + table[t.name]["data_offsets"][0]) for t in ordered]
    return Shard(name, header, tuple(placed))
