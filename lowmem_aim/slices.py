"""The matching rows of one tensor in all models, slice by slice, as a method sees them: float32, on the device.

The first pass over a tensor also checks every model's rows for NaN and Inf, and takes the digest of its bytes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
import xxhash
from torch import Tensor

from lowmem_aim.checkpoint import Checkpoint, raw
from lowmem_aim.errors import ModelError, printable
from lowmem_aim.headers import matrix_shape
from lowmem_aim.inputs import Inputs
from lowmem_aim.methods import Rows
from lowmem_aim.plan import Task

# A slice of three experts and a base is then 4 MB of float32: it stays in a processor's cache from read to write.
SLICE_ELEMENTS = 1 << 18


def cuts(shape: tuple[int, ...], slice_rows: int | None) -> Iterator[tuple[int, int]]:
    """(start, stop) of the slices of a tensor; `slice_rows` rows each, or as many as SLICE_ELEMENTS allow."""
    rows, columns = matrix_shape(shape)
    step = slice_rows or max(1, SLICE_ELEMENTS // max(columns, 1))
    return ((start, min(start + step, rows)) for start in range(0, rows, step))


def finite(rows: Tensor) -> bool:
    # One reduction instead of an elementwise test: NaN and Inf always show in a sum; finite sums may overflow, so a
    # bad sum only asks for the slow look. Sums of float16 are taken in float32 for that reason.
    return math.isfinite(float(rows.sum(dtype=torch.float32))) or bool(rows.isfinite().all())


class Source:
    """One model's rows of one tensor, and the digest of those read through `stored` first to last."""

    def __init__(self, checkpoint: Checkpoint, name: str, row_map: Tensor | None = None) -> None:
        self.checkpoint = checkpoint
        self.name = name
        self._row_map = row_map
        self._hash = xxhash.xxh3_128()
        self._hashing = True

    def stored(self, start: int, stop: int) -> Tensor:
        """Rows start:stop as they are stored; the first time around they enter the digest."""
        rows = self.checkpoint.rows(self.name, start, stop)
        if self._hashing:
            self._hash.update(raw(rows))
        return rows

    def rows(self, start: int, stop: int, fill: Tensor | None, device: torch.device) -> Tensor:
        """Rows start:stop of the reference's numbering, float32; those that this model lacks are `fill`'s, or zeros."""
        if self._row_map is None:
            return self.stored(start, stop).to(device).to(torch.float32)
        wanted = self._row_map[start:stop]
        columns = self.checkpoint.tensors[self.name].matrix[1]
        rows = torch.zeros(stop - start, columns, device=device) if fill is None else fill.clone()
        for first, run in _runs(wanted):
            if run[0] >= 0:
                part = self.stored(int(run[0]), int(run[0]) + len(run))
                rows[first : first + len(run)] = part.to(device).to(torch.float32)
        return rows

    def first_pass_done(self) -> None:
        self._hashing = False

    def digest(self) -> str:
        return self._hash.hexdigest()


def _runs(wanted: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(place, run) for each stretch of consecutive rows, or of missing ones (-1): few, as vocabularies mostly agree."""
    before, after = wanted[:-1], wanted[1:]
    goes_on = torch.where(before == -1, after == -1, after == before + 1)
    breaks = (~goes_on).nonzero().flatten() + 1
    for first, last in itertools.pairwise([0, *breaks.tolist(), len(wanted)]):
        yield first, wanted[first:last]


class Slices:
    """Called, it gives one pass over all slices of one tensor in all models."""

    def __init__(
        self,
        task: Task,
        inputs: Inputs,
        with_base: bool,
        slice_rows: int | None,
        device: torch.device,
    ) -> None:
        self._task = task
        self._slice_rows = slice_rows
        self._device = device
        self._checked = False
        self._experts = [Source(expert, task.name, inputs.row_map(expert, task.name)) for expert in inputs.experts]
        # Rows that a mapped vocabulary lacks come from the base, whether the method reads it or not.
        mapped = any(inputs.row_map(expert, task.name) is not None for expert in inputs.experts)
        base = inputs.base or inputs.reference
        self._base = Source(base, task.name, inputs.row_map(base, task.name)) if with_base or mapped else None

    @property
    def sources(self) -> list[Source]:
        return [*([self._base] if self._base else []), *self._experts]

    def __call__(self) -> Iterator[Rows]:
        columns = matrix_shape(self._task.shape)[1]
        nothing = torch.empty(0, device=self._device)
        for start, stop in cuts(self._task.shape, self._slice_rows):
            base = self._base.rows(start, stop, None, self._device) if self._base else None
            experts = tuple(source.rows(start, stop, base, self._device) for source in self._experts)
            if not self._checked:
                self._check((base, *experts) if base is not None else experts)
            yield Rows(nothing if base is None else base, experts, start * columns)
        self._checked = True
        for source in self.sources:
            source.first_pass_done()

    def _check(self, rows: tuple[Tensor, ...]) -> None:
        if all(finite(part) for part in rows):
            return
        problems = []
        for source in self.sources:
            count = self._count(source)
            if count:
                where = f"`{printable(self._task.name)}` of `{printable(source.checkpoint.label)}`"
                problems.append(f"{where} holds {count} value(s) that are NaN or Inf, or beyond float32")
        raise ModelError(problems, hint="a broken download or a diverged fine-tune: get this model again")

    def _count(self, source: Source) -> int:
        info = source.checkpoint.tensors[source.name]
        parts = cuts(info.shape, self._slice_rows)
        return sum(
            int((~source.checkpoint.rows(source.name, a, b).to(torch.float32).isfinite()).sum()) for a, b in parts
        )
