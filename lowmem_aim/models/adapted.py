"""A model with a LoRA adapter: a checkpoint whose tensors are those of its base with the adapter's change, row by row.

Nothing is merged on disk. A changed tensor reads as float32, W + s B A (see `methods.low_rank`); an output keeps the
dtype of W. The change of rows is the product of a left factor, of which only these rows are read, and a right factor,
which is held while its tensor is in work.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from lowmem_aim.methods.footprint import DOUBLE, FLOAT, Footprint
from lowmem_aim.methods.gram import row_dots
from lowmem_aim.methods.low_rank import add_column_squares, footprint_of_low_rank, with_low_rank
from lowmem_aim.models.adapter import Adapter
from lowmem_aim.models.adapter_config import ADAPTER_CONFIG
from lowmem_aim.models.changes import Change, Renamed, changes_of
from lowmem_aim.models.checkpoint import Checkpoint
from lowmem_aim.models.headers import TensorInfo
from lowmem_aim.models.in_steps import step_bytes, steps, whole_tensor, whole_tensor_bytes
from lowmem_aim.models.wrapping import WrappingCheckpoint
from lowmem_aim.system.dtypes import DTYPES
from lowmem_aim.system.files import input_errors
from lowmem_aim.system.on_demand import torch
from lowmem_aim.system.tensors import digest, empty_apart

if TYPE_CHECKING:
    from torch import Tensor

# Tensors whose right factors are held: one is in its last pass over the rows, and the next in its first.
IN_WORK = 2


class AdaptedCheckpoint(WrappingCheckpoint):
    """A checkpoint with an adapter: `model` is its base."""

    def __init__(self, base: Checkpoint, adapter: Adapter, renamed: Renamed) -> None:
        """Match the adapter with its base, see `changes_of`. Raises ModelError with everything that does not fit."""
        self._adapter, self._changes = adapter, changes_of(adapter, base, renamed)
        label, tensors = f"{base.label}+{adapter.label}", dict(_tensors(base, self._changes))
        super().__init__(base, tensors, base.config, label)
        with input_errors(adapter.file):
            self.stored.note([adapter.file])  # its own files are the adapter's
        self._lock = threading.RLock()
        self._right: dict[str, Tensor] = {}  # (rank, columns) float32, of the tensors read last
        self._by_column: dict[str, Tensor] = {}  # (1, columns) float64: factors of a DoRA, of tensors (in, out)

    @property
    def place(self) -> tuple[Path, ...]:
        """The folders of the base and of the adapter."""
        return (*self.model.place, self._adapter.folder)

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels of the base and of the adapter."""
        return (*self.model.labels, self._adapter.label)

    @property
    def files(self) -> list[Path]:
        """The files that hold tensors: the base's shards, and the adapter's file."""
        return [*self.model.files, self._adapter.file]

    @property
    def adapter(self) -> str:
        """The adapter in a few words: `LoRA of rank 16 on 112 tensors`."""
        ranks = sorted({change.rank for change in self._changes.values() if change.a})
        what = "DoRA" if self._adapter.config.dora else "LoRA"
        rank = f" of rank {'-'.join(map(str, sorted({ranks[0], ranks[-1]})))}" if ranks else ""
        copies = sum(not change.rank for change in self._changes.values())
        return f"{what}{rank} on {len(self._changes) - copies} tensors" + (f", {copies} replaced" if copies else "")

    # -- reading

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start:stop with the adapter's change, as `Checkpoint.rows`: float32 where the adapter changes them."""
        change = self._changes.get(name)
        if change is None:
            return self.model.rows(name, start, stop)
        stored = self._before(change, name, start, stop)
        return self._changed(name, change, stored, start) if change.rank else stored

    def tensor(self, name: str) -> Tensor:
        """A whole tensor in its own shape and dtype. Raises ModelError if a file has changed."""
        change = self._changes.get(name)
        if change is None:
            return self.model.tensor(name)
        if not change.rank:
            return Checkpoint.tensor(self, name)  # the adapter's copy
        return whole_tensor(self.tensors[name], lambda start, stop: self.rows(name, start, stop))

    def _before(self, change: Change, name: str, start: int, stop: int) -> Tensor:
        """The rows without the change: the base's, or those of the adapter's copy."""
        return self.stored.rows(change.stored, start, stop) if change.is_copy else self.model.rows(name, start, stop)

    def _changed(self, name: str, change: Change, stored: Tensor, start: int) -> Tensor:
        left, right = self._left(change, start, start + len(stored)), self._right_of(name, change)
        factors = None
        if change.magnitude is not None:
            if change.turned:
                factors = self._column_factors(name, change)
            else:
                factors = self._row_factors(change, with_low_rank(stored, left, right, change.scaling), start)
        return with_low_rank(stored, left, right, change.scaling, factors)

    def _left(self, change: Change, start: int, stop: int) -> Tensor:  # (stop - start, rank) float32
        """Rows of the left factor: of B, or of A turned."""
        assert change.b is not None  # of a change that has a rank
        if change.a is None or not change.turned:
            return self.stored.rows(change.b, start, stop).to(torch.float32)
        rank, width = change.a.matrix
        left = torch.empty(stop - start, rank)
        for k in range(rank):
            left[:, k] = self.stored.elements(change.a, k * width + start, k * width + stop)
        return left

    def _right_of(self, name: str, change: Change) -> Tensor:  # (rank, columns) float32
        """The right factor: A, or B turned; of a bias, which is added as it is, 1."""
        with self._lock:
            if name not in self._right:
                while len(self._right) >= IN_WORK:
                    del self._right[next(iter(self._right))]  # before the next is read
                self._right[name] = self._read_right(change)
            return self._right[name]

    def _read_right(self, change: Change) -> Tensor:
        part = change.b if change.turned else change.a
        if change.a is None or part is None:
            return torch.ones(1, 1)
        whole = self.stored.rows(part, 0, part.matrix[0])
        whole = whole.t() if change.turned else whole
        # Memory of its own, not a view of the file: that is mapped for other tensors meanwhile.
        return empty_apart((whole.shape[0], whole.shape[1]), torch.float32).copy_(whole)

    def _row_factors(self, change: Change, rows: Tensor, start: int) -> Tensor:  # (rows, 1) float64
        """A DoRA's magnitudes divided by the lengths of the changed rows."""
        assert change.magnitude is not None
        magnitudes = self.stored.elements(change.magnitude, start, start + len(rows)).to(torch.float64)
        return (magnitudes / row_dots(rows, rows).sqrt()).unsqueeze(1)

    def _column_factors(self, name: str, change: Change) -> Tensor:  # (1, columns) float64
        """A DoRA's magnitudes divided by the lengths of the changed columns, which takes a round over all rows."""
        with self._lock:
            if name not in self._by_column:
                assert change.magnitude is not None
                info, right = self.tensors[name], self._right_of(name, change)
                totals = torch.zeros(info.matrix[1], dtype=torch.float64)
                for start, stop in steps(info):
                    stored, left = self._before(change, name, start, stop), self._left(change, start, stop)
                    add_column_squares(with_low_rank(stored, left, right, change.scaling), totals)
                magnitudes = self.stored.elements(change.magnitude, 0, change.magnitude.numel).to(torch.float64)
                self._by_column[name] = (magnitudes / totals.sqrt()).unsqueeze(0)
            return self._by_column[name]

    def repeats(self, head: str, embedding: str) -> bool:
        """Whether a head repeats its embedding: where only the embedding is changed, the tied head changes with it."""
        return super().repeats(head, embedding) if head in self._changes else self.model.repeats(head, embedding)

    def expect(self, names: Iterable[str]) -> None:
        """Announce tensors that are read soon, those of the adapter too."""
        wanted = list(names)
        changes = [change for name in wanted if (change := self._changes.get(name))]
        self.stored.expect(part for change in changes for part in change.parts)
        self.model.expect(name for name in wanted if name not in self._changes or not self._changes[name].is_copy)

    # -- memory

    @property
    def footprint(self) -> Footprint:
        """Bytes that reading takes besides the rows that it gives: factors, and float32 rows on the way."""
        own, below = footprint_of_low_rank(), self.model.footprint
        ranks = [(change.rank, *self.tensors[name].matrix) for name, change in self._changes.items() if change.rank]
        left = max((-(-rank // max(columns, 1)) for rank, _, columns in ranks), default=0)
        right = sorted((rank * columns for rank, _, columns in ranks), reverse=True)[:IN_WORK] or [0]
        held = FLOAT * sum(right) + DOUBLE * right[0] * (self.read != "mmap")  # as stored, where that is no view
        # The rows before the change (float64 at most), the left factor as stored and as float32, and for a DoRA's norms
        # the rows once more.
        element = DOUBLE + (DOUBLE + FLOAT) * left + (FLOAT + 2 * DOUBLE) * self._adapter.config.dora + own.element
        return Footprint(
            below.element + element,
            own.slice,
            tensor=below.tensor + held + self._held_for_columns(element) + own.slice,
        )

    def _held_for_columns(self, element: int) -> int:
        """Bytes of the factors of columns, and of the round that makes them."""
        turned = [name for name, change in self._changes.items() if change.turned and change.magnitude]
        factors = sum(2 * DOUBLE * self.tensors[name].matrix[1] for name in turned)
        widest = max((self.tensors[name].matrix[1] for name in turned), default=0)
        return factors + step_bytes(widest, element) * bool(turned)

    def whole_bytes(self, name: str) -> int:
        """Bytes of RAM that reading a whole tensor takes, the result among them."""
        change, info = self._changes.get(name), self.tensors[name]
        if change is None:
            return self.model.whole_bytes(name)
        if not change.rank:
            return Checkpoint.whole_bytes(self, name)  # of the adapter's copy
        return whole_tensor_bytes(info, self.footprint.element)

    def warm_up(self) -> None:
        """Compile the loops that reading needs."""
        self.model.warm_up()
        one = torch.ones(1, 1)
        for dtype in {self._before_dtype(name, change) for name, change in self._changes.items() if change.rank}:
            with_low_rank(one.to(dtype), one, one, 1.0)
        if self._adapter.config.dora:
            row_dots(one, one)
            add_column_squares(one, torch.zeros(1, dtype=torch.float64))

    def _before_dtype(self, name: str, change: Change) -> torch.dtype:
        return (change.stored if change.is_copy else self.model.tensors[name]).dtype.torch

    # -- files

    def fingerprint(self) -> str:
        """A cheap identity of the files of base and adapter, as `Checkpoint.fingerprint`."""
        own = self._adapter.tensors.values()
        facts = [(info.name, info.dtype.name, info.shape, info.begin) for info in own]
        samples = [self._sample_of(info) for info in own]
        parts = (self.model.fingerprint(), self._adapter.config, self.stored.identity(self._adapter.file), facts)
        return xxhash.xxh3_128_hexdigest(repr((*parts, samples)).encode("utf-8", "surrogatepass"))

    def _sample_of(self, info: TensorInfo) -> str:
        middle = info.matrix[0] // 2
        return digest(self.stored.rows(info, middle, min(middle + 1, info.matrix[0])).contiguous())

    def stats(self) -> dict[str, os.stat_result]:
        """Size, times and inode as they are now of the base's shards and of the adapter's files. Raises ModelError."""
        own = [self._adapter.file, self._adapter.folder / ADAPTER_CONFIG]
        with input_errors(self._adapter.folder):
            return self.model.stats() | {f"+{file.name}": file.stat() for file in own}

    def check_unchanged(self) -> None:
        """Raise ModelError if a file of base or adapter has changed since it was opened."""
        super().check_unchanged()
        self.stored.check_unchanged()

    def close(self) -> None:
        """Close all files of base and adapter."""
        self._right.clear()
        super().close()
        self.stored.close()


def _tensors(base: Checkpoint, changes: Mapping[str, Change]) -> Iterator[tuple[str, TensorInfo]]:
    """Yield (name, tensor) as the changed model has them: in the base's order, then those that the base lacks."""
    for name in [*base.tensors, *(name for name in changes if name not in base.tensors)]:
        change, before = changes.get(name), base.tensors.get(name)
        kept_as = before.output_dtype if before is not None else None
        if change is None and before is not None:
            yield name, before
        elif change is not None and change.rank:
            yield name, replace(change.stored, name=name, dtype=DTYPES["F32"], kept_as=kept_as)
        elif change is not None:
            yield name, replace(change.stored, name=name, kept_as=kept_as)
