"""A rehearsal: the merge of a few random numbers, so that all code it needs is compiled and loaded.

That takes memory, some 20 MB, or 60 where the compiled loops are not yet in numba's cache. It must be in use before
what is left of a budget is divided.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Hashable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from lowmem_aim.merging.given import Given
from lowmem_aim.merging.slices import finite
from lowmem_aim.merging.targets import rounded
from lowmem_aim.methods.method import Rounds, Rows, Subject
from lowmem_aim.methods.moments import MatrixSpace
from lowmem_aim.models.headers import matrix_shape
from lowmem_aim.planning.tasks import Plan, Task, as_read
from lowmem_aim.relaxing.aim import relax
from lowmem_aim.system.dtypes import Dtype
from lowmem_aim.system.memory import Budget, trim
from lowmem_aim.system.on_demand import torch
from lowmem_aim.system.tensor_store import TensorStore

if TYPE_CHECKING:
    from torch import Tensor

COLUMNS, ROWS = 256, 4  # of the random tensors, at most


def rehearse(plans: Sequence[Plan], budget: Budget) -> int:
    """Merge random tensors as the plans merge those that differ in kind; return the most RAM that was in use, in bytes.

    Nothing is held to the budget yet. The compiled loops depend on dtypes, on the number of experts, and on the method.
    Where a device with memory of its own computes, only the check of what is read is rehearsed.
    """
    trim()
    for checkpoint in {source.checkpoint for task in as_read(plans) for source in task.sources(with_base=True)}:
        checkpoint.warm_up()
    most = budget.ram_used()
    for plan, task in _kinds(plans):
        # A method may refuse numbers that no model has: the merge itself will tell of what is wrong.
        with contextlib.suppress(Exception):
            _merge(task, plan, computed=budget.vram is None)
        most = max(most, budget.ram_used())
    gc.collect(1)  # what was made just now; going through all that the libraries have made takes a tenth of a second
    trim()
    return most


def _kinds(plans: Sequence[Plan]) -> Iterator[tuple[Plan, Task]]:
    """The first of all tasks that take the same way through the code, with their plans."""
    seen = set()
    for plan in plans:
        way = plan.recipe.method.name, plan.recipe.relaxed
        for task in plan.tasks:
            if task.action == "merge" and (kind := (way, _kind(task))) not in seen:
                seen.add(kind)
                yield plan, task


def _kind(task: Task) -> Hashable:
    dtypes = [task.read_as(source) for source in task.sources(with_base=True)]
    parameters = [(name, _class_of(value)) for name, value in sorted(task.parameters.items())]
    return tuple(dtypes), task.dtype, len(task.shape), task.inputs_first, tuple(parameters)


def _class_of(value: Any) -> Hashable:
    """The class of a parameter: numbers from 1 on, and from 0 down, may take another way than those between."""
    if isinstance(value, tuple):
        return tuple(_class_of(one) for one in value)
    return value if isinstance(value, bool | str) else (value <= 0, value >= 1)


def _merge(task: Task, plan: Plan, *, computed: bool) -> None:
    shape = _small(task.shape)
    random = torch.Generator().manual_seed(0)
    base, *experts = (_random(task.read_as(source), shape, random) for source in task.sources(with_base=True))
    if not all(map(finite, (base, *experts))) or not computed:
        return
    rows = Rows(base, tuple(experts), 0)
    place = torch.device("cpu")
    with TensorStore(place, device_bytes=0, ram_bytes=0, folder=None) as store:
        subject = Given(MatrixSpace(store, place)).subject(task, plan, shape)
        _run_through(plan, task, subject, rows)


def _run_through(plan: Plan, task: Task, subject: Subject, rows: Rows) -> None:
    rounds = Rounds(plan.recipe.method.start(subject, task.parameters))
    for fold in rounds:
        fold.add(fold.part(rows))
    _finish(rounds.combine(rows), rows, task, relaxed=plan.recipe.relaxed)


def _small(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(min(size, COLUMNS if place == len(shape) - 1 else ROWS) for place, size in enumerate(shape))


def _random(dtype: Dtype, shape: tuple[int, ...], random: torch.Generator) -> Tensor:
    return torch.randn(matrix_shape(shape), generator=random).to(dtype.torch)


def _finish(merged: Tensor, rows: Rows, task: Task, *, relaxed: bool) -> None:
    if relaxed:
        merged = relax(merged, rows.stored_base, torch.zeros(1, merged.shape[1]))
    rounded(merged, task)
