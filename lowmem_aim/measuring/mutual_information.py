"""Exact plug-in mutual information of two streams of numbers, each distinct bfloat16 value being a label.

A pair of labels is a code of 32 bits. For any number of pairs only the count of each distinct code is kept, sorted by
code, in parts by the lowest bits of the first label, so that one part at a time is in memory. Where two streams have
values near each other, as the outputs of two versions of a model do, there are far fewer codes than pairs.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowmem_aim.system.tensor_store import Stored, TensorStore

PARTS = 8
CHUNK = 1 << 19  # pairs that are sorted at a time
LABELS = 1 << 16


class PairCounts:
    """The count of each pair of labels."""

    def __init__(self, store: TensorStore | None = None) -> None:
        """Keep the counts in `store` if it is given, and in memory otherwise."""
        self._store = store
        self._parts: list[tuple[Any, Any] | None] = [None] * PARTS  # (codes, counts), as arrays or in the store

    def add(self, x: Tensor, y: Tensor) -> None:
        """Count the pairs of the elements of two tensors of one shape. Raises ValueError if one is not finite."""
        first, second = x.reshape(-1), y.reshape(-1)
        for start in range(0, len(first), CHUNK):
            labels = [_labels(values[start : start + CHUNK]) for values in (first, second)]
            codes = np.sort((labels[0] << np.uint32(16)) | labels[1])
            found, counts = _runs(codes, np.ones(len(codes), np.int64))
            part = (found >> np.uint32(16)) % np.uint32(PARTS)
            for number in range(PARTS):
                here = part == number
                self._join(number, found[here], counts[here])

    def _join(self, number: int, codes: Any, counts: Any) -> None:
        before = self._get(number)
        if before is not None:
            codes, counts = np.concatenate([before[0], codes]), np.concatenate([before[1], counts])
            order = np.argsort(codes, kind="stable")
            codes, counts = _runs(codes[order], counts[order])
        self._put(number, codes, counts)

    def _get(self, number: int) -> tuple[Any, Any] | None:
        part = self._parts[number]
        if part is None or self._store is None:
            return part
        codes, counts = (self._store.get(slot).cpu().numpy() for slot in part)
        return codes.view(np.uint32), counts

    def _put(self, number: int, codes: Any, counts: Any) -> None:
        if self._store is None:
            self._parts[number] = codes, counts
            return
        slots = self._parts[number] or (Stored(), Stored())
        arrays = torch.from_numpy(codes.view(np.int32)), torch.from_numpy(counts)
        self._parts[number] = tuple(self._store.put(a, slot) for a, slot in zip(arrays, slots, strict=True))  # type: ignore[assignment]

    def mutual_information(self) -> float:
        """Mutual information in nats; 0 if nothing was counted.

        log n + (sum of c log c over pairs - over first labels - over second labels) / n, for n pairs and counts c.
        """
        pairs: Counter[int] = Counter()
        sides = [np.zeros(LABELS, np.int64), np.zeros(LABELS, np.int64)]
        for number in range(PARTS):
            part = self._get(number)
            if part is None or not len(part[0]):
                continue
            codes, counts = part
            pairs.update(_multiplicities(counts))
            for side, labels in zip(sides, (codes >> np.uint32(16), codes & np.uint32(LABELS - 1)), strict=True):
                side += np.bincount(labels, weights=counts, minlength=LABELS).astype(np.int64)
        total = int(sides[0].sum())
        if not total:
            return 0.0
        first, second = (_entropy_sum(Counter(_multiplicities(side))) for side in sides)
        return max(0.0, math.log(total) + (_entropy_sum(pairs) - first - second) / total)


def _labels(values: Tensor) -> Any:  # (n,) uint32
    """The bits of the values as bfloat16, both zeros being one label. Raises ValueError if a value is not finite."""
    rounded = values.to(torch.bfloat16).cpu() + 0.0  # -0.0 becomes 0.0
    if not bool(rounded.isfinite().all()):
        raise ValueError("a value is NaN, or beyond bfloat16")
    return rounded.view(torch.int16).numpy().view(np.uint16).astype(np.uint32)


def _runs(codes: Any, counts: Any) -> tuple[Any, Any]:
    """Merge equal codes of a sorted array, adding up their counts."""
    if not len(codes):
        return codes, counts
    starts = np.flatnonzero(np.concatenate([[True], codes[1:] != codes[:-1]]))
    return codes[starts], np.add.reduceat(counts, starts)


def _multiplicities(counts: Any) -> dict[int, int]:
    """Count -> how many codes have that count, zeros left out."""
    values, times = np.unique(counts[counts > 0], return_counts=True)
    return dict(zip(values.tolist(), times.tolist(), strict=True))


def _entropy_sum(multiplicities: Counter[int]) -> float:
    """Sum of c log c over counts c, exactly rounded, so that the order of the terms does not show."""
    return math.fsum(times * count * math.log(count) for count, times in multiplicities.items())
