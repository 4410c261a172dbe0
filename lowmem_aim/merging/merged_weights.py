"""The weights of a merged model that is not on disk, each computed when it is asked for, as the output will have it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lowmem_aim.merging.given import BlockMoments, Given
from lowmem_aim.merging.slices import Stride, TensorInputs, runs
from lowmem_aim.merging.targets import rounded
from lowmem_aim.methods.method import Combine, Rounds, Rows
from lowmem_aim.methods.moments import MatrixSpace
from lowmem_aim.models.headers import matrix_shape
from lowmem_aim.models.inputs import Inputs
from lowmem_aim.planning.sources import Source
from lowmem_aim.planning.tasks import Plan, Task
from lowmem_aim.relaxing.relaxation import Relaxation
from lowmem_aim.system.devices import threads_an_operation
from lowmem_aim.system.on_demand import torch
from lowmem_aim.system.tensor_store import Stored, TensorStore
from lowmem_aim.system.tensors import empty_apart

if TYPE_CHECKING:
    from torch import Tensor

ELEMENTS = 1 << 17  # of each model, in work at a time


class MergedWeights:
    """The merged model's weights, computed on demand, with a checkpoint's interface (`blocks.offload.Source`).

    Where the output has other tokens than the base, rows of embeddings and heads are those of the base's tokens, in the
    base's order: both models read the same token ids. A row that the output lacks is the base's.

    A context manager: what is kept is dropped at its end. A weight that is asked for again, because its block does not
    fit the budget and is loaded module by module, is kept until the next block in a file without a name in `folder`:
    merging it again for every text would take too long. So are rows that were merged elsewhere.
    """

    def __init__(
        self,
        plan: Plan,
        inputs: Inputs,
        relaxation: Relaxation,
        folder: Path,
        device: torch.device,
        *,
        as_merged: bool = False,
    ) -> None:
        """`device` is where weights are solved; all others are merged on the CPU.

        `as_merged`: by operations of one thread, as the merge solves them, which gives the same bytes.
        """
        self._plan, self._inputs, self._relaxation, self._folder = plan, inputs, relaxation, folder
        self._device, self._as_merged = device, as_merged
        self._tasks = {task.name: task for task in plan.tasks}
        self._stride = Stride(ELEMENTS)
        self._made: dict[str, Callable[[Rows], Tensor]] = {}  # tensor -> what makes finished rows of it
        self._opened: dict[str, TensorInputs] = {}
        self._asked: set[str] = set()  # tensors of this block that were asked for
        self._kept: dict[str, Stored] = {}
        self._taken: dict[str, list[Stored]] = {}  # rows, one after another
        self._store = self._new_store(torch.device("cpu"))
        self._given = Given(MatrixSpace(self._new_store(device), device, torch.get_num_threads()))

    def tensor(self, name: str) -> Tensor:
        """A whole tensor in the output's dtype. Raises ModelError, DiskError."""
        if name in self._kept:
            return self._store.get(self._kept[name])
        task = self._tasks[name]
        if name in self._taken:
            return torch.cat([self._store.get(part) for part in self._taken[name]]).view(task.shape)
        if task.base and _places(task) is not None:
            return self.rows(name, 0, task.base.info.matrix[0]).view(task.base.info.shape)
        rows, columns = matrix_shape(task.shape)
        whole = empty_apart((rows, columns), task.dtype.torch)
        with threads_an_operation(1) if task.tile and self._as_merged else contextlib.nullcontext():
            self._fill(task, whole, 0)
        if name in self._asked:
            self._kept[name] = self._store.put(whole.view(task.shape))
        self._asked.add(name)
        return whole.view(task.shape)

    def take(self, name: str, rows: Tensor) -> None:
        """Keep the next rows of a tensor, merged elsewhere, until the next block. Raises DiskError."""
        self._taken.setdefault(name, []).append(self._store.put(rows))

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start:stop of a tensor seen as (rows, columns), in the output's dtype. Raises ModelError."""
        task = self._tasks[name]
        if task.action == "copy":
            return _rows_of(task.experts[0], start, stop)
        if (places := _places(task)) is not None:
            return self._of_tokens(task, places[start:stop], start)
        if task.tile:
            return self.tensor(name).view(matrix_shape(task.shape))[start:stop]
        part = torch.empty(stop - start, matrix_shape(task.shape)[1], dtype=task.dtype.torch)
        self._fill(task, part, start)
        return part

    def _of_tokens(self, task: Task, places: Tensor, start: int) -> Tensor:
        """The output's rows at `places`; where that is -1 the base's own row, of those from `start` on."""
        assert task.base is not None
        part = torch.empty(len(places), matrix_shape(task.shape)[1], dtype=task.dtype.torch)
        for place, run in runs(places):
            stop = place + len(run)
            if run[0] >= 0:
                self._fill(task, part[place:stop], int(run[0]))
            else:
                part[place:stop] = _rows_of(task.base, start + place, start + stop)
        return part

    def _fill(self, task: Task, part: Tensor, start: int) -> None:
        """Fill `part` with the tensor's merged rows from `start` on, some of them at a time."""
        if task.action == "copy":
            part.copy_(_rows_of(task.experts[0], start, start + len(part)))
            return
        finished, read = self._finished(task), self._read(task)
        for first, last in self._cuts(task, start, start + len(part)):
            part[first - start : last - start] = finished(read.rows(first, last))

    def _cuts(self, task: Task, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield (start, stop) of each slice of the rows; where slices have a fixed size, `start` is the tensor's."""
        columns = matrix_shape(task.shape)[1]
        while start < end:
            stop = min(task.stop(start, self._stride.rows(columns)), end)
            yield start, stop
            start = stop

    def _read(self, task: Task) -> TensorInputs:
        if task.name not in self._opened:
            self._opened[task.name] = TensorInputs(task, True, self._stride, self._plan.nonfinite)
        return self._opened[task.name]

    def _finished(self, task: Task) -> Callable[[Rows], Tensor]:
        if task.name not in self._made:
            combine, relax = self._measured(task), self._relaxation.of(task)

            def finished(rows: Rows) -> Tensor:
                rows = self._placed(task, rows)
                merged = combine(rows)
                return rounded(merged if relax is None else relax(merged, rows), task)

            self._made[task.name] = finished
        return self._made[task.name]

    def _measured(self, task: Task) -> Combine:
        """Run the method's rounds over the tensor, whose block is measured first, and return the method's combine."""
        block = self._given.block_of(task)
        if self._given.moments is not None and block is not None:
            self._given.moments.come_to(block)
        subject = self._given.subject(task, self._plan)
        rounds = Rounds(self._plan.recipe.method.start(subject, task.parameters))
        read = self._read(task)
        cuts = list(self._cuts(task, 0, matrix_shape(task.shape)[0]))
        for fold in rounds:
            for start, stop in cuts:
                fold.add(fold.part(self._placed(task, read.rows(start, stop))))
        return rounds.combine

    def _placed(self, task: Task, rows: Rows) -> Rows:
        """The rows where they are computed with: on the device if it has the matrices that they are solved by."""
        if not task.tile or self._device.type == "cpu":
            return rows
        base, *experts = (stored.to(self._device) for stored in (rows.stored_base, *rows.stored_experts))
        return Rows(base, tuple(experts), rows.start)

    def measured_by(self, moments: BlockMoments) -> None:
        """Solve weights from these moments, which are brought to the block of each weight that is asked for."""
        self._given = replace(self._given, moments=moments)

    def forget(self) -> None:
        """Drop what is kept of the weights so far: the next block has other ones."""
        self._made.clear()
        self._opened.clear()
        self._asked.clear()
        if self._kept or self._taken:
            self._kept.clear()
            self._taken.clear()
            self._store.__exit__(None, None, None)
            self._store = self._new_store(torch.device("cpu"))

    def _new_store(self, device: torch.device) -> TensorStore:
        return TensorStore(device, device_bytes=0, ram_bytes=0, folder=self._folder)

    def expect(self, names: Iterable[str]) -> None:
        """Announce the tensors that these weights are made of, so that the disk can fetch them meanwhile."""
        for name in names:
            for source in self._tasks[name].sources(with_base=True):
                source.checkpoint.expect([source.tensor])

    def check_unchanged(self) -> None:
        """Raise ModelError if a file of a model has changed since it was opened."""
        for checkpoint in dict.fromkeys(self._inputs.checkpoints):
            checkpoint.check_unchanged()

    def __enter__(self) -> MergedWeights:
        return self

    def __exit__(self, *_: object) -> None:
        self._made.clear()
        self._store.__exit__(None, None, None)
        self._given.space.store.__exit__(None, None, None)


def _places(task: Task) -> Tensor | None:
    """The output's row of each row of the base, -1 where it has none; None where the rows are the same."""
    if task.base is None or task.base.row_map is None:
        return None
    places = torch.full((task.base.info.matrix[0],), -1, dtype=torch.int64)
    known = (task.base.row_map >= 0).nonzero().flatten()
    places[task.base.row_map[known]] = known
    return places


def _rows_of(source: Source, start: int, stop: int) -> Tensor:
    return source.checkpoint.rows(source.tensor, start, stop)
