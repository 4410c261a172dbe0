"""TIES: keep exactly the k largest elements of each delta, then elect signs.

The k-th largest magnitude is found exactly by counting, without sorting and without the tensor in memory: the bits of
a non-negative float32 order as its values do, so one round counts the magnitudes by their upper 16 bits, a second
counts the lower 15 within the bin where the k-th lies. Equal magnitudes at the threshold (frequent in bfloat16 models)
are kept from the lowest flat index on until there are k; a third round finds where that ends, if it is needed at all.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowmem_aim.methods.method import Densities, Fold, Rescale, Rows, Script, Subject, Weights, merge_method
from lowmem_aim.methods.task_vectors import consensus, rescale_factors

LOW_BITS = 15  # of the 31 bits of a magnitude; the upper 16 are counted first
NOWHERE = -1
EVERYWHERE = 1 << 62


@merge_method("ties", source="arXiv 2306.01708")
def ties(
    tensor: Subject,
    *,
    weight: Weights,
    density: Densities = (1.0,),
    normalize: bool = True,
    rescale: Rescale = False,
    lambda_: float = 1.0,
    int8_mask: bool = False,  # mergekit's memory saver; has no effect on the result
) -> Script:
    """W0 + lambda times the weighted mean, over the experts that agree with the elected sign, of the top-k deltas."""
    cuts = yield from largest(tensor, density)

    def sparsify(deltas: Sequence[Tensor], rows: Rows) -> list[Tensor | None]:
        return [cut.mask(delta, rows.start) for cut, delta in zip(cuts, deltas, strict=True)]

    factor = yield from rescale_factors(sparsify, density, rescale)
    return consensus(sparsify, weight, factor, normalize=normalize, lambda_=lambda_, elect=True)


@dataclass(frozen=True)
class Cut:
    """Which magnitudes of a delta stay: those above `bits`, and those equal to it up to flat index `last_equal`."""

    bits: int  # of a float32 magnitude
    last_equal: int

    def mask(self, delta: Tensor, start: int) -> Tensor | None:  # (rows, columns) -> the same shape, bool
        if self == ALL:
            return None
        magnitude = magnitude_bits(delta)
        keep = magnitude > self.bits
        equals = min(max(self.last_equal + 1 - start, 0), keep.numel())  # how far equal ones still count in here
        keep.view(-1)[:equals] |= magnitude.view(-1)[:equals] == self.bits
        return keep


ALL = Cut(0, EVERYWHERE)
NONE = Cut((1 << 31) - 1, NOWHERE)


def magnitude_bits(delta: Tensor) -> Tensor:
    """|delta| as int32 that order as the magnitudes do."""
    return delta.abs().view(torch.int32)


def largest(tensor: Subject, density: Sequence[float]) -> Generator[Fold, Any, list[Cut]]:
    """The cuts that keep exactly int(density_i n) elements of each delta. Up to three rounds."""
    counts = [int(d * tensor.numel) for d in density]
    cuts: dict[int, Cut] = {}
    for i, k in enumerate(counts):
        if k == 0 or k >= tensor.numel:
            cuts[i] = NONE if k == 0 else ALL
    asked = {i: k for i, k in enumerate(counts) if i not in cuts}  # expert -> how many of its elements stay
    if asked:
        found = yield from _thresholds(asked)
        cuts |= yield from _equal_ones(found)
    return [cuts[i] for i in range(len(density))]


@dataclass(frozen=True)
class _Found:
    bits: int  # the threshold
    wanted: int  # how many of the elements equal to it stay
    equal: int  # how many there are


def _thresholds(asked: dict[int, int]) -> Generator[Fold, Any, dict[int, _Found]]:
    coarse = yield _Counts(dict.fromkeys(asked))
    bins = {i: _bin_of(coarse[i], k) for i, k in asked.items()}
    fine = yield _Counts({i: upper for i, (upper, _) in bins.items()})
    found = {}
    for i, (upper, left) in bins.items():
        lower, wanted = _bin_of(fine[i], left)
        found[i] = _Found((upper << LOW_BITS) + lower, wanted, int(fine[i][lower]))
    return found


def _bin_of(counts: Tensor, k: int) -> tuple[int, int]:
    """The bin that holds the k-th largest, and its rank within the bin (1 = the largest)."""
    at_least = counts.flip(0).cumsum(0)  # how many lie in the top 1, 2, ... bins
    place = int(torch.searchsorted(at_least, k))
    above = int(at_least[place - 1]) if place else 0
    return counts.numel() - 1 - place, k - above


class _Counts:
    """A fold: histograms of magnitudes, by expert; over the upper bits, or over the lower ones within one upper bin."""

    def __init__(self, upper: dict[int, int | None]) -> None:
        self._upper = upper
        self._counts: dict[int, Tensor] = {}

    def add(self, rows: Rows) -> None:
        for i, upper in self._upper.items():
            bits = magnitude_bits(rows.experts[i] - rows.base).view(-1)
            high = bits >> LOW_BITS
            if upper is None:
                counts = torch.bincount(high, minlength=1 << (31 - LOW_BITS))
            else:
                inside = bits[high == upper] & ((1 << LOW_BITS) - 1)
                counts = torch.bincount(inside, minlength=1 << LOW_BITS)
            self._counts[i] = self._counts[i] + counts if i in self._counts else counts

    def finish(self) -> dict[int, Tensor]:
        return {i: counts.cpu() for i, counts in self._counts.items()}


def _equal_ones(found: dict[int, _Found]) -> Generator[Fold, Any, dict[int, Cut]]:
    # A threshold of zero needs no search: whether a zero stays changes nothing.
    split = {i: f for i, f in found.items() if f.wanted < f.equal and f.bits > 0}
    cuts = {i: Cut(f.bits, EVERYWHERE) for i, f in found.items() if i not in split}
    if split:
        places = yield _NthEqual(split)
        cuts |= {i: Cut(split[i].bits, place) for i, place in places.items()}
    return cuts


class _NthEqual:
    """A fold: for each expert the flat index of the `wanted`-th element whose magnitude equals the threshold."""

    def __init__(self, found: dict[int, _Found]) -> None:
        self._left = {i: f.wanted for i, f in found.items()}
        self._bits = {i: f.bits for i, f in found.items()}
        self._places: dict[int, int] = {}

    def add(self, rows: Rows) -> None:
        for i in [i for i in self._left if i not in self._places]:
            equal = magnitude_bits(rows.experts[i] - rows.base).view(-1) == self._bits[i]
            count = int(equal.sum())
            if count >= self._left[i]:
                self._places[i] = rows.start + int(equal.nonzero()[self._left[i] - 1])
            self._left[i] -= count

    def finish(self) -> dict[int, int]:
        return self._places
