"""TIES: keep exactly the k largest elements of each delta, then elect signs.

The k-th largest magnitude is found exactly by counting, without sorting and without the tensor in memory: the bits of
a non-negative float32 order as its values do, so one round counts the magnitudes by their upper 16 bits. A second
collects the few that lie in the same bin as the k-th, which give the threshold, and where those equal to it end that
still count: equal magnitudes (frequent in bfloat16 models) are kept from the lowest flat index on until there are k.
A bin too full to be collected is counted by the lower 15 bits instead, and a third round looks for that end.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
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
    return (yield from first_by_size(tensor, [(i, int(d * tensor.numel)) for i, d in enumerate(density)]))


def first_by_size(
    tensor: Subject,
    asked: Sequence[tuple[int, int]],  # (expert, k), an expert perhaps several times
) -> Generator[Fold, Any, list[Largest]]:
    """For each, the selection of the expert's k largest elements, equal ones from the lowest flat index on."""
    known = {i: ALL if k else NONE for i, (_, k) in enumerate(asked) if k == 0 or k >= tensor.numel}
    left = {i: ask for i, ask in enumerate(asked) if i not in known}
    if left:
        coarse = yield _UpperCounts(sorted({expert for expert, _ in left.values()}))
        bins = {i: _bin_of(coarse[expert], k, expert) for i, (expert, k) in left.items()}
        few = {i: b for i, b in bins.items() if b.size <= COLLECTED}
        many = {i: b for i, b in bins.items() if b.size > COLLECTED}
        if few:
            known |= yield _Collected(few)
        if many:
            known |= yield from _counted(many)
    return [known[i] for i in range(len(asked))]


@dataclass(frozen=True)
class _Bin:
    """A bin of a histogram of magnitudes, in which the k-th largest lies."""

    number: int
    wanted: int  # how many of it stay: its largest
    size: int
    expert: int


def _bin_of(counts: Tensor, k: int, expert: int) -> _Bin:
    at_least = counts.flip(0).cumsum(0)  # how many lie in the top 1, 2, ... bins
    place = int(torch.searchsorted(at_least, k))
    above = int(at_least[place - 1]) if place else 0
    number = counts.numel() - 1 - place
    return _Bin(number, k - above, int(counts[number]), expert)


def _deltas(rows: Rows, experts: Mapping[int, int]) -> Iterator[tuple[int, Tensor]]:
    """For each key -> expert: (the key, the delta's magnitudes as flat int32 bits), one after the other."""
    base = rows.base
    for key, expert in experts.items():
        yield key, magnitude_bits(rows.stored_experts[expert].to(torch.float32) - base).view(-1)


def _experts(bins: Mapping[int, _Bin]) -> dict[int, int]:
    return {key: b.expert for key, b in bins.items()}


class _UpperCounts:
    """A fold: histograms of the magnitudes' upper bits, by expert."""

    def __init__(self, experts: Sequence[int]) -> None:
        self._experts = experts
        self._counts: dict[int, Tensor] = {}

    def part(self, rows: Rows) -> dict[int, Tensor]:
        if kernels.usable(rows.stored_experts):
            return {i: kernels.count_upper(rows.stored_base, rows.stored_experts[i]) for i in self._experts}
        length = 1 << kernels.UPPER_BITS
        deltas = _deltas(rows, {i: i for i in self._experts})
        return {i: torch.bincount(bits >> LOW_BITS, minlength=length).cpu() for i, bits in deltas}

    def add(self, part: dict[int, Tensor]) -> None:
        _add_counts(self._counts, part)

    def finish(self) -> dict[int, Tensor]:
        return self._counts


def _add_counts(totals: dict[int, Tensor], part: dict[int, Tensor]) -> None:
    for i, counts in part.items():
        totals[i] = totals[i] + counts if i in totals else counts


class _Collected:
    """A fold: the selections, each from all magnitudes of one bin of an expert, with their places."""

    def __init__(self, bins: dict[int, _Bin]) -> None:
        self._bins = bins
        self._places: dict[int, list[Tensor]] = {i: [] for i in bins}
        self._bits: dict[int, list[Tensor]] = {i: [] for i in bins}

    def part(self, rows: Rows) -> dict[int, tuple[Tensor, Tensor]]:
        if kernels.usable(rows.stored_experts):
            found = {
                i: kernels.collect(rows.stored_base, rows.stored_experts[b.expert], b.number, b.size)
                for i, b in self._bins.items()
            }
        else:
            found = {}
            for i, bits in _deltas(rows, _experts(self._bins)):
                places = (bits >> LOW_BITS == self._bins[i].number).nonzero().flatten()
                found[i] = places.cpu(), bits[places].cpu()
        return {i: (places + rows.start, bits) for i, (places, bits) in found.items()}

    def add(self, part: dict[int, tuple[Tensor, Tensor]]) -> None:
        for i, (places, bits) in part.items():
            self._places[i].append(places)
            self._bits[i].append(bits)

    def finish(self) -> dict[int, Largest]:
        return {i: self._selection(i, b.wanted) for i, b in self._bins.items()}

    def _selection(self, key: int, wanted: int) -> Largest:
        bits = torch.cat(self._bits[key])
        threshold = int(bits.kthvalue(len(bits) - wanted + 1).values)
        still = wanted - int((bits > threshold).sum())
        equal = torch.cat(self._places[key])[bits == threshold]
        return Largest(threshold, int(equal[still - 1]) if still < len(equal) else EVERYWHERE)


# --- the way of a full bin --------------------------------------------------------------------------------------------


def _counted(upper: dict[int, _Bin]) -> Generator[Fold, Any, dict[int, Largest]]:
    fine = yield _LowerCounts(upper)
    lower = {i: _bin_of(fine[i], b.wanted, b.expert) for i, b in upper.items()}
    bits = {i: (upper[i].number << LOW_BITS) + b.number for i, b in lower.items()}
    # A threshold of zero needs no search: whether a zero stays changes nothing.
    split = [i for i, b in lower.items() if b.wanted < b.size and bits[i] > 0]
    ends = dict.fromkeys(bits, EVERYWHERE)
    if split:
        ends |= yield _NthEqual({i: lower[i] for i in split}, bits)
    return {i: Largest(bits[i], ends[i]) for i in bits}


class _LowerCounts:
    """A fold: histograms of the lower bits of those magnitudes that lie in the given bins."""

    def __init__(self, upper: dict[int, _Bin]) -> None:
        self._upper = upper
        self._counts: dict[int, Tensor] = {}

    def part(self, rows: Rows) -> dict[int, Tensor]:
        counts = {}
        for i, bits in _deltas(rows, _experts(self._upper)):
            inside = bits[bits >> LOW_BITS == self._upper[i].number] & ((1 << LOW_BITS) - 1)
            counts[i] = torch.bincount(inside, minlength=1 << LOW_BITS).cpu()
        return counts

    def add(self, part: dict[int, Tensor]) -> None:
        _add_counts(self._counts, part)

    def finish(self) -> dict[int, Tensor]:
        return self._counts


class _NthEqual:
    """A fold: the flat index of the last element that a bin of equal magnitudes, of these bits, is asked for."""

    def __init__(self, sought: dict[int, _Bin], bits: Mapping[int, int]) -> None:
        self._experts = _experts(sought)
        self._bits = bits
        self._left = {i: b.wanted for i, b in sought.items()}
        self._places: dict[int, int] = {}

    def part(self, rows: Rows) -> dict[int, Tensor]:
        deltas = _deltas(rows, self._experts)
        return {i: (bits == self._bits[i]).nonzero().flatten().cpu() + rows.start for i, bits in deltas}

    def add(self, part: dict[int, Tensor]) -> None:
        for i, places in part.items():
            if 0 < self._left[i] <= len(places):
                self._places[i] = int(places[self._left[i] - 1])
            self._left[i] -= len(places)

    def finish(self) -> dict[int, int]:
        return self._places
