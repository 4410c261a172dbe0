"""TIES: keep exactly the k largest elements of each delta, then elect signs.

The k-th largest magnitude is found exactly by counting, without sorting and without the tensor in memory: the bits of
a non-negative float32 order as its values do, so one round counts the magnitudes by their upper 16 bits. A second
collects the few that lie in the same bin as the k-th, which give the threshold, and where those equal to it end that
still count: equal magnitudes (frequent in bfloat16 models) are kept from the lowest flat index on until there are k.
A bin too full to be collected is counted by the lower 15 bits instead, and a third round looks for that end.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowmem_aim import kernels
from lowmem_aim.methods.method import Densities, Fold, Rescale, Rows, Script, Subject, Weights, merge_method
from lowmem_aim.methods.selection import ALL, EVERYWHERE, NONE, Largest, magnitude_bits
from lowmem_aim.methods.task_vectors import consensus, rescale_factors

LOW_BITS = 31 - kernels.UPPER_BITS
COLLECTED = 1 << 20  # so many magnitudes of a bin, 12 MB, are collected at most


@merge_method("ties", source="arXiv 2306.01708", compiled=True)
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
    selections = yield from largest(tensor, density)
    factor = yield from rescale_factors(selections, density, rescale)
    return consensus(selections, weight, factor, normalize=normalize, lambda_=lambda_, elect=True)


def largest(tensor: Subject, density: Sequence[float]) -> Generator[Fold, Any, list[Largest]]:
    """The selections that keep exactly int(density_i n) elements of each delta. Up to four rounds, mostly two."""
    counts = [int(d * tensor.numel) for d in density]
    known = {i: ALL if k else NONE for i, k in enumerate(counts) if k == 0 or k >= tensor.numel}
    asked = {i: k for i, k in enumerate(counts) if i not in known}  # expert -> how many of its elements stay
    if asked:
        coarse = yield _UpperCounts(list(asked))
        bins = {i: _bin_of(coarse[i], k) for i, k in asked.items()}
        few = {i: b for i, b in bins.items() if b.size <= COLLECTED}
        many = {i: b for i, b in bins.items() if b.size > COLLECTED}
        if few:
            known |= yield _Collected(few)
        if many:
            known |= yield from _counted(many)
    return [known[i] for i in range(len(density))]


@dataclass(frozen=True)
class _Bin:
    """A bin of a histogram of magnitudes, in which the k-th largest lies."""

    number: int
    wanted: int  # how many of it stay: its largest
    size: int


def _bin_of(counts: Tensor, k: int) -> _Bin:
    at_least = counts.flip(0).cumsum(0)  # how many lie in the top 1, 2, ... bins
    place = int(torch.searchsorted(at_least, k))
    above = int(at_least[place - 1]) if place else 0
    number = counts.numel() - 1 - place
    return _Bin(number, k - above, int(counts[number]))


def _deltas(rows: Rows, experts: Sequence[int]) -> list[tuple[int, Tensor]]:
    """(expert, its delta's magnitudes as flat int32 bits)."""
    base = rows.base
    return [(i, magnitude_bits(rows.stored_experts[i].to(torch.float32) - base).view(-1)) for i in experts]


class _UpperCounts:
    """A fold: histograms of the magnitudes' upper bits, by expert."""

    def __init__(self, experts: Sequence[int]) -> None:
        self._experts = experts
        self._counts: dict[int, Tensor] = {}

    def part(self, rows: Rows) -> dict[int, Tensor]:
        if kernels.usable(rows.stored_experts):
            return {i: kernels.count_upper(rows.stored_base, rows.stored_experts[i]) for i in self._experts}
        length = 1 << kernels.UPPER_BITS
        deltas = _deltas(rows, self._experts)
        return {i: torch.bincount(bits >> LOW_BITS, minlength=length).cpu() for i, bits in deltas}

    def add(self, part: dict[int, Tensor]) -> None:
        _add_counts(self._counts, part)

    def finish(self) -> dict[int, Tensor]:
        return self._counts


def _add_counts(totals: dict[int, Tensor], part: dict[int, Tensor]) -> None:
    for i, counts in part.items():
        totals[i] = totals[i] + counts if i in totals else counts


class _Collected:
    """A fold: the selections, from all magnitudes of one bin per expert, with their places."""

    def __init__(self, bins: dict[int, _Bin]) -> None:
        self._bins = bins
        self._places: dict[int, list[Tensor]] = {i: [] for i in bins}
        self._bits: dict[int, list[Tensor]] = {i: [] for i in bins}

    def part(self, rows: Rows) -> dict[int, tuple[Tensor, Tensor]]:
        if kernels.usable(rows.stored_experts):
            found = {
                i: kernels.collect(rows.stored_base, rows.stored_experts[i], b.number, b.size)
                for i, b in self._bins.items()
            }
        else:
            found = {}
            for i, bits in _deltas(rows, list(self._bins)):
                places = (bits >> LOW_BITS == self._bins[i].number).nonzero().flatten()
                found[i] = places.cpu(), bits[places].cpu()
        return {i: (places + rows.start, bits) for i, (places, bits) in found.items()}

    def add(self, part: dict[int, tuple[Tensor, Tensor]]) -> None:
        for i, (places, bits) in part.items():
            self._places[i].append(places)
            self._bits[i].append(bits)

    def finish(self) -> dict[int, Largest]:
        return {i: self._selection(i, b.wanted) for i, b in self._bins.items()}

    def _selection(self, expert: int, wanted: int) -> Largest:
        bits = torch.cat(self._bits[expert])
        threshold = int(bits.kthvalue(len(bits) - wanted + 1).values)
        still = wanted - int((bits > threshold).sum())
        equal = torch.cat(self._places[expert])[bits == threshold]
        return Largest(threshold, int(equal[still - 1]) if still < len(equal) else EVERYWHERE)


# --- the way of a full bin --------------------------------------------------------------------------------------------


def _counted(upper: dict[int, _Bin]) -> Generator[Fold, Any, dict[int, Largest]]:
    fine = yield _LowerCounts({i: b.number for i, b in upper.items()})
    lower = {i: _bin_of(fine[i], b.wanted) for i, b in upper.items()}
    bits = {i: (upper[i].number << LOW_BITS) + b.number for i, b in lower.items()}
    # A threshold of zero needs no search: whether a zero stays changes nothing.
    split = [i for i, b in lower.items() if b.wanted < b.size and bits[i] > 0]
    ends = dict.fromkeys(bits, EVERYWHERE)
    if split:
        ends |= yield _NthEqual({i: (bits[i], lower[i].wanted) for i in split})
    return {i: Largest(bits[i], ends[i]) for i in bits}


class _LowerCounts:
    """A fold: histograms of the lower bits of those magnitudes whose upper bits are given, by expert."""

    def __init__(self, upper: dict[int, int]) -> None:
        self._upper = upper
        self._counts: dict[int, Tensor] = {}

    def part(self, rows: Rows) -> dict[int, Tensor]:
        counts = {}
        for i, bits in _deltas(rows, list(self._upper)):
            inside = bits[bits >> LOW_BITS == self._upper[i]] & ((1 << LOW_BITS) - 1)
            counts[i] = torch.bincount(inside, minlength=1 << LOW_BITS).cpu()
        return counts

    def add(self, part: dict[int, Tensor]) -> None:
        _add_counts(self._counts, part)

    def finish(self) -> dict[int, Tensor]:
        return self._counts


class _NthEqual:
    """A fold: for each expert the flat index of the n-th element whose magnitude has the given bits."""

    def __init__(self, sought: dict[int, tuple[int, int]]) -> None:
        self._bits = {i: bits for i, (bits, _) in sought.items()}
        self._left = {i: n for i, (_, n) in sought.items()}
        self._places: dict[int, int] = {}

    def part(self, rows: Rows) -> dict[int, Tensor]:
        deltas = _deltas(rows, list(self._bits))
        return {i: (bits == self._bits[i]).nonzero().flatten().cpu() + rows.start for i, bits in deltas}

    def add(self, part: dict[int, Tensor]) -> None:
        for i, places in part.items():
            if 0 < self._left[i] <= len(places):
                self._places[i] = int(places[self._left[i] - 1])
            self._left[i] -= len(places)

    def finish(self) -> dict[int, int]:
        return self._places
