"""The matching rows of one tensor in all models, slice by slice, as they are stored.

The first pass over a tensor also checks every model's rows for NaN and Inf, and digests their bytes. NaN and Inf of an
expert end the merge, or, if the user says so, take the base's value, so that the expert's delta is 0 there.
"""

from __future__ import annotations

import functools
import itertools
import math
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeVar

import xxhash

from lowmem_aim.errors import MemoryBudgetError, ModelError, printable
from lowmem_aim.events import Emit, Notice
from lowmem_aim.merging.given_rows import GivenRows, Piece, mean_row
from lowmem_aim.methods import kernels
from lowmem_aim.methods.method import Rows
from lowmem_aim.models.headers import matrix_shape
from lowmem_aim.planning.sources import Source
from lowmem_aim.planning.tasks import Task
from lowmem_aim.system.memory import is_allocation_failure
from lowmem_aim.system.on_demand import torch
from lowmem_aim.system.options import NonFinite
from lowmem_aim.system.tensors import raw
from lowmem_aim.units import counted, shown

if TYPE_CHECKING:
    from torch import Tensor

R = TypeVar("R")


class Stride:
    """The size of slices: `elements` of each model, in whole rows, unless `rows` sets the number of rows.

    The size is halved when an allocation fails, in whatever thread.
    """

    def __init__(self, elements: int, rows: int | None = None, emit: Emit = lambda event: None) -> None:
        self.elements = elements
        self._rows = rows
        self._emit = emit
        self._lock = threading.Lock()

    def rows(self, columns: int) -> int:
        """The number of rows in a slice of a tensor with so many columns, at least 1."""
        return self._rows or max(1, self.elements // max(columns, 1))

    def too_large(self, count: int, columns: int, name: str, *, fixed: bool = False) -> None:
        """Halve the stride, since an allocation for `count` rows of the tensor `name` has failed.

        Raises MemoryBudgetError for a single row, and for a tensor whose slices must have so many rows (`fixed`).
        """
        if count <= 1 or fixed:
            size = f"{counted(count, 'row')} of `{printable(name)}` ({counted(columns, 'column')})"
            raise MemoryBudgetError(
                f"{size} does not fit the memory that is left",
                hint="close other programs, give a larger `--ram` or `--vram`, or use `--device cpu`",
            )
        with self._lock:
            if self.rows(columns) < count:
                return  # another thread has halved it already
            self._rows, self.elements = None, max(1, count * columns // 2)
            size = shown(self.elements * torch.float32.itemsize)
        self._emit(Notice(f"memory ran short: continuing with slices of {size}", "warning"))

    def cuts(self, shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
        """Yield (start, stop), in rows, of each slice of a tensor."""
        rows, columns = matrix_shape(shape)
        start = 0
        while start < rows:
            stop = min(start + self.rows(columns), rows)
            yield start, stop
            start = stop


def in_halves(work: Callable[[Rows], R], rows: Rows, failed: Callable[[Rows], None]) -> list[R]:
    """Return [work(rows)], or, after a failed allocation, the results for both halves.

    `failed` is called with every slice that was too large, and raises if halving is of no use.
    """
    try:
        return [work(rows)]
    except Exception as error:
        if not is_allocation_failure(error):
            raise
    failed(rows)  # outside the handler: the exception's frames hold tensors
    return [result for half in rows.halves() for result in in_halves(work, half, failed)]


def finite(rows: Tensor) -> bool:
    """Whether all values are finite, as float32."""
    if kernels.usable([rows]) and rows.dtype in (torch.bfloat16, torch.float16, torch.float32):
        return kernels.finite(rows)
    # One reduction instead of an elementwise test: NaN and Inf always show in a sum; finite sums may overflow, so a
    # bad sum only asks for the slow look. Sums of float16 are taken in float32 for that reason.
    return math.isfinite(float(rows.sum(dtype=torch.float32))) or bool(rows.to(torch.float32).isfinite().all())


def _mended(rows: Rows) -> tuple[Rows, list[int]]:
    """Replace an expert's values that are not finite by the base's; return the rows, and a count for each expert."""
    base, mended, counts = rows.stored_base, [], []
    for expert in rows.stored_experts:
        if finite(expert):
            mended.append(expert)
            counts.append(0)
            continue
        good = expert.to(torch.float32).isfinite()
        if expert.dtype == base.dtype:
            mended.append(torch.where(good, expert, base))
        else:  # float32 is what the arithmetic sees of both: the delta is exactly 0
            mended.append(torch.where(good, expert.to(torch.float32), base.to(torch.float32)))
        counts.append(int(good.numel() - good.sum()))
    return Rows(base, tuple(mended), rows.start), counts


class TensorReader:
    """The rows of one source, and the digest of the rows given to `enter_digest`."""

    def __init__(self, source: Source) -> None:
        self.checkpoint, self.tensor = source.checkpoint, source.tensor
        self._info, self._row_map = source.info, source.row_map
        self._hash = xxhash.xxh3_128()

    @property
    def itemsize(self) -> int:
        """Bytes of an element as it is read."""
        return self._info.dtype.itemsize

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the model's own tensor."""
        return self._info.shape

    def pieces(self, start: int, stop: int) -> list[tuple[int, Tensor]]:
        """Rows start:stop of the output's numbering as (place, rows as stored), without those that this model lacks.

        Raises ModelError.
        """
        if self._row_map is None:
            return [(0, self.checkpoint.rows(self.tensor, start, stop))]
        stretches = runs(self._row_map[start:stop])
        return [
            (place, self.checkpoint.rows(self.tensor, int(run[0]), int(run[0]) + len(run)))
            for place, run in stretches
            if run[0] >= 0
        ]

    @property
    def mapped(self) -> bool:
        """Whether the model's rows are not simply the output's."""
        return self._row_map is not None

    def enter_digest(self, pieces: list[tuple[int, Tensor]]) -> None:
        """Add the bytes of these pieces to the digest."""
        for _, rows in pieces if self._row_map is None else ():
            self._hash.update(raw(rows))

    def assembled(self, pieces: list[tuple[int, Tensor]], count: int, fill: Tensor | None) -> Tensor:
        """Put pieces together as (count, columns); missing rows are those of `fill`, or zeros."""
        if self._row_map is None:
            return pieces[0][1]
        dtype = self._info.dtype.torch
        if fill is not None and fill.dtype != dtype:
            fill, dtype = fill.to(torch.float32), torch.float32
        rows = torch.zeros(count, self._info.matrix[1], dtype=dtype) if fill is None else fill.clone()
        for place, part in pieces:
            rows[place : place + len(part)] = part.to(dtype)
        return rows

    def digest(self) -> str:
        """xxh3-128 of the whole tensor, as 32 hex digits, once all its pieces are entered.

        Where rows are taken from here and there the tensor is read once more: its digest says the same for every plan.
        """
        return self.checkpoint.digest(self.tensor) if self.mapped else str(self._hash.hexdigest())


def runs(wanted: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield (place, run) for each stretch of consecutive rows, or of missing ones (-1).

    They are few, since vocabularies mostly agree.
    """
    before, after = wanted[:-1], wanted[1:]
    goes_on = torch.where(before == -1, after == -1, after == before + 1)
    breaks = (~goes_on).nonzero().flatten() + 1
    for first, last in itertools.pairwise([0, *breaks.tolist(), len(wanted)]):
        yield first, wanted[first:last]


class TensorInputs:
    """One tensor of the plan in all models that its merge reads.

    `replaced` is, for each expert, the number of elements that the first pass found not finite and gave the base's
    value.
    """

    def __init__(self, task: Task, with_base: bool, stride: Stride, nonfinite: NonFinite = "stop") -> None:
        self.task = task
        self._stride = stride
        self._mends = nonfinite == "base" and task.action == "merge"
        self.replaced = [0] * len(task.experts)
        self._experts = [TensorReader(expert) for expert in task.experts]
        self._base = TensorReader(task.base) if task.base and with_base else None
        self._givers = [TensorReader(source) for source in task.filling.givers] if task.filling else []
        self._given = GivenRows(task.given_dtype.torch, matrix_shape(task.shape)[1]) if task.filling else None
        self._means: dict[TensorReader, Tensor] = {}  # of models' rows, where those beyond the tokens are a mean

    @property
    def base(self) -> TensorReader | None:
        """The reader of the base; None if the base is not read."""
        return self._base

    @property
    def readers(self) -> list[TensorReader]:
        """The readers of all models, the base's first if the base is read."""
        return [*([self._base] if self._base else []), *self._experts]

    @property
    def sources(self) -> list[TensorReader]:
        """The readers of all that is read: beside `readers`, of the rows that stand where models have none."""
        return [*self.readers, *self._givers]

    def digests(self) -> dict[TensorReader, str]:
        """xxh3-128 of what each of the `sources` gave, once the first pass is over.

        Raises ModelError if a model's file has changed meanwhile.
        """
        for reader in self.sources:
            reader.checkpoint.check_unchanged()  # else a change between reading and computing would be kept
        return {reader: reader.digest() for reader in self.sources}

    def replaced_of(self, reader: TensorReader) -> int:
        """The number of elements, of one of the `readers`, that took the base's value."""
        return self.replaced[self._experts.index(reader)] if reader in self._experts else 0

    @property
    def nbytes(self) -> int:
        """Bytes of the rows of all models, as stored."""
        own = self._given.dtype.itemsize if self._given else 0
        return sum(max(reader.itemsize, own) for reader in self.readers) * math.prod(self.task.shape)

    def slices(self, first_pass: bool) -> Iterator[Rows]:
        """Yield all slices once. The first pass checks and digests them. Raises ModelError, MemoryBudgetError."""
        rows, columns = matrix_shape(self.task.shape)
        start = 0
        while start < rows:
            stop = self.task.stop(start, self._stride.rows(columns))
            try:
                pieces = self._pieces(start, stop)
                read = self._assembled(pieces, start, stop - start, columns)
                replaced = [0] * len(read.stored_experts)
                if self._mends and (first_pass or any(self.replaced)):
                    read, replaced = _mended(read)
            except Exception as error:
                if not is_allocation_failure(error):
                    raise
                read = None
            if read is None:
                self._stride.too_large(stop - start, columns, self.task.name, fixed=bool(self.task.tile))
                continue
            if first_pass:  # not before this: rows that fail to be allocated are read again, but digested once
                self._look_at(pieces)
                self.replaced = [before + now for before, now in zip(self.replaced, replaced, strict=True)]
            yield read
            del read, pieces  # before the next are read
            start = stop

    def rows(self, start: int, stop: int) -> Rows:
        """Rows start:stop, not entered in any digest. Raises ModelError for NaN and Inf, or replaces them."""
        columns = matrix_shape(self.task.shape)[1]
        pieces = self._pieces(start, stop)
        self._check(pieces)
        read = self._assembled(pieces, start, stop - start, columns)
        return _mended(read)[0] if self._mends else read

    def _pieces(self, start: int, stop: int) -> list[list[Piece]]:
        """Rows start:stop of each of the `sources`."""
        return [reader.pieces(start, stop) for reader in self.sources]

    def _assembled(self, pieces: list[list[Piece]], start: int, count: int, columns: int) -> Rows:
        given = self._given.assembled(pieces[len(self.readers) :], count) if self._given else None
        models = zip(self.readers, pieces, strict=False)  # then come the givers
        rows = [self._with_means(reader, reader.assembled(part, count, given), start) for reader, part in models]
        base = rows.pop(0) if self._base else torch.empty(0)
        return Rows(base, tuple(rows), start * columns)

    def _with_means(self, reader: TensorReader, rows: Tensor, start: int) -> Tensor:
        """Fill rows beyond the tokens with the mean of the model's rows before; `start` is the first one's place."""
        first = self.task.filling.mean_from if self.task.filling else start + len(rows)
        if start + len(rows) <= first:
            return rows
        if reader not in self._means:
            self._means[reader] = mean_row(functools.partial(self._rows_of, reader), first, rows.shape[1])
        rows[max(0, first - start) :] = self._means[reader]
        return rows

    def _rows_of(self, reader: TensorReader, start: int, stop: int) -> Tensor:
        """Rows start:stop of one model, with those that stand where it has none."""
        given = [giver.pieces(start, stop) for giver in self._givers]
        filled = self._given.assembled(given, stop - start) if self._given else None
        return reader.assembled(reader.pieces(start, stop), stop - start, filled)

    def _look_at(self, pieces: list[list[Piece]]) -> None:
        for reader, part in zip(self.sources, pieces, strict=True):
            reader.enter_digest(part)
        self._check(pieces)

    def _check(self, pieces: list[list[Piece]]) -> None:
        for reader, part in zip(self.sources, pieces, strict=True):
            if reader in self._strict and not all(finite(rows) for _, rows in part):
                self._refuse()

    @property
    def _strict(self) -> list[TensorReader]:
        """The readers whose NaN and Inf end the merge: the base's always do, since nothing can take their place."""
        if self.task.action == "copy":
            return []
        return self.sources if not self._mends else [*([self._base] if self._base else []), *self._givers]

    def _refuse(self) -> None:
        counts = {reader: count for reader in self._strict if (count := self._bad_values(reader))}
        problems = [
            f"`{printable(self.task.name)}` of `{printable(reader.checkpoint.label)}` holds {counted(count, 'value')} "
            "that cannot be merged (NaN, Inf, or beyond float32)"
            for reader, count in counts.items()
        ]
        hint = "a broken download or a diverged fine-tune: get this model again"
        if self._base not in counts:
            hint += "; `--nonfinite base` takes the base's value there, if the method builds on one"
        raise ModelError(problems, hint)

    def _bad_values(self, reader: TensorReader) -> int:
        slices = (reader.checkpoint.rows(reader.tensor, a, b) for a, b in self._stride.cuts(reader.shape))
        return sum(int((~rows.to(torch.float32).isfinite()).sum()) for rows in slices)
