"""The k largest magnitudes of a tensor, exactly k, without sorting and without the tensor in memory.

The bits of a non-negative float32 order as its values do, so one round counts the magnitudes by their upper 16 bits. A
second round collects the few that lie in the same bin as the k-th. They give the threshold, and the last place at which
a magnitude equal to it still counts: equal magnitudes (frequent in bfloat16 models) are kept from the lowest flat index
on until there are k. A bin too full to be collected is counted by the lower 15 bits instead, and a third round finds
that place.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lowmem_aim.methods import kernels
from lowmem_aim.methods.footprint import Footprint
from lowmem_aim.methods.method import Fold, Rows
from lowmem_aim.methods.selection import ALL, EVERYWHERE, NONE, Largest, magnitude_bits
from lowmem_aim.system.on_demand import numpy as np
from lowmem_aim.system.on_demand import torch

if TYPE_CHECKING:
    from torch import Tensor

LOW_BITS = 31 - kernels.UPPER_BITS
LOW_MASK = (1 << LOW_BITS) - 1
LOW_BYTES = 2  # of the int16 that holds the LOW_BITS lower bits
COLLECTED = 1 << 20  # most magnitudes of a bin that are collected
COLLECTED_IN_ALL = 1 << 22  # of all bins of a tensor


class Magnitudes:
    """Numbers to be counted: non-negative float32, perhaps several for each element, told apart by `which`."""

    def bits(self, rows: Rows, which: int) -> Tensor:  # (n,) int32, which order as the numbers do
        """The bits of a slice's numbers, flat."""
        raise NotImplementedError

    def count_upper(self, rows: Rows, which: int) -> Tensor:  # (2^UPPER_BITS,) int64
        """Count the numbers of a slice by their upper UPPER_BITS bits."""
        return torch.bincount(self.bits(rows, which) >> LOW_BITS, minlength=1 << kernels.UPPER_BITS).cpu()

    def collect(self, rows: Rows, which: int, number: int, most: int) -> tuple[Tensor, Tensor]:
        """Indices in the slice (int64) and bits (int32) of numbers whose upper bits are `number`, `most` at most."""
        bits = self.bits(rows, which)
        places = (bits >> LOW_BITS == number).nonzero().flatten()
        return places.cpu(), bits[places].cpu()


class Deltas(Magnitudes):
    """The magnitudes |Di|, where `which` is the expert i."""

    def bits(self, rows: Rows, which: int) -> Tensor:
        """The bits of |Di| in a slice, flat."""
        return magnitude_bits(rows.stored_experts[which].to(torch.float32) - rows.base).view(-1)

    def count_upper(self, rows: Rows, which: int) -> Tensor:
        """Count |Di| by the upper UPPER_BITS bits, in compiled code if there is any."""
        if kernels.usable(rows.stored_experts):
            return kernels.count_upper(rows.stored_base, rows.stored_experts[which])
        return super().count_upper(rows, which)

    def collect(self, rows: Rows, which: int, number: int, most: int) -> tuple[Tensor, Tensor]:
        """Indices and bits of |Di| whose upper bits are `number`, in compiled code if there is any."""
        if kernels.usable(rows.stored_experts):
            return kernels.collect(rows.stored_base, rows.stored_experts[which], number, most)
        return super().collect(rows, which, number, most)


DELTAS = Deltas()


def footprint_of_first(numel: int, which: int, asked: int) -> Footprint:
    """The memory that `first_by_size` takes for `which` kinds of magnitudes and so many selections of them."""
    # A table for each kind, or half as large ones for each selection; one more while tables are added or searched.
    tables = max(8 * which << kernels.UPPER_BITS, 8 * asked << LOW_BITS)
    searched = 3 * 8 << kernels.UPPER_BITS
    each = min(numel, COLLECTED)
    one = _place_dtype(numel).itemsize + LOW_BYTES
    collected = one * min(each * asked, COLLECTED_IN_ALL) + 8 * each  # a copy to sort, or a mask and places
    # The bits, twice as they are made and shifted, and the places of those that are equal, as int64.
    return Footprint(element=34, part=tables, tensor=tables + searched + collected)


def first_by_size(
    numel: int,
    asked: Sequence[tuple[int, int]],  # (which, k), the same magnitudes perhaps several times
    magnitudes: Magnitudes = DELTAS,
) -> Generator[Fold, Any, list[Largest]]:
    """The selection of the k largest for each (which, k) asked; equal magnitudes from the lowest flat index on.

    Up to four rounds, mostly two.
    """
    known = {i: ALL if k else NONE for i, (_, k) in enumerate(asked) if k == 0 or k >= numel}
    left = {i: ask for i, ask in enumerate(asked) if i not in known}
    if left:
        coarse = yield _UpperCounts(sorted({which for which, _ in left.values()}), magnitudes)
        bins = {i: _bin_of(coarse[which], k, which) for i, (which, k) in left.items()}
        few = _collectable(bins)
        many = {i: b for i, b in bins.items() if i not in few}
        if few:
            known |= yield _Collected(few, magnitudes, _place_dtype(numel))
        if many:
            known |= yield from _counted(many, magnitudes)
    return [known[i] for i in range(len(asked))]


@dataclass(frozen=True)
class _Bin:
    """A bin of a histogram of magnitudes, in which the k-th largest lies."""

    number: int
    wanted: int  # how many of its largest stay
    size: int
    which: int  # of the magnitudes


def _place_dtype(numel: int) -> torch.dtype:
    return torch.int32 if numel < 1 << 31 else torch.int64


def _collectable(bins: Mapping[int, _Bin]) -> dict[int, _Bin]:
    """The bins that are collected: the smallest, as far as memory is set aside for them."""
    few, left = {}, COLLECTED_IN_ALL
    for i, found in sorted(bins.items(), key=lambda item: item[1].size):
        if found.size <= min(COLLECTED, left):
            few[i] = found
            left -= found.size
    return few


def _bin_of(counts: Tensor, k: int, which: int) -> _Bin:
    at_least = counts.flip(0).cumsum(0)  # how many lie in the top 1, 2, ... bins
    place = int(torch.searchsorted(at_least, k))
    above = int(at_least[place - 1]) if place else 0
    number = counts.numel() - 1 - place
    return _Bin(number, k - above, int(counts[number]), which)


class _UpperCounts:
    """A fold of histograms of the upper bits, by `which`."""

    def __init__(self, wanted: Sequence[int], magnitudes: Magnitudes) -> None:
        self._wanted = wanted
        self._magnitudes = magnitudes
        self._counts: dict[int, Tensor] = {}

    def part(self, rows: Rows) -> dict[int, Tensor]:
        return {which: self._magnitudes.count_upper(rows, which) for which in self._wanted}

    def add(self, part: dict[int, Tensor]) -> None:
        _add_counts(self._counts, part)

    def finish(self) -> dict[int, Tensor]:
        return self._counts


def _add_counts(totals: dict[int, Tensor], part: dict[int, Tensor]) -> None:
    for i, counts in part.items():
        totals[i] = totals[i] + counts if i in totals else counts


class _Collected:
    """A fold that makes each selection from all that lies in its bin, with the places."""

    def __init__(self, bins: dict[int, _Bin], magnitudes: Magnitudes, place_dtype: torch.dtype) -> None:
        self._bins = bins
        self._magnitudes = magnitudes
        # One array for each bin, whose size is known: many small ones would leave holes in the heap.
        self._places = {i: torch.empty(b.size, dtype=place_dtype) for i, b in bins.items()}
        self._bits = {i: torch.empty(b.size, dtype=torch.int16) for i, b in bins.items()}
        self._found = dict.fromkeys(bins, 0)

    def part(self, rows: Rows) -> dict[int, tuple[Tensor, Tensor]]:
        collect = self._magnitudes.collect
        found = {i: collect(rows, b.which, b.number, b.size) for i, b in self._bins.items()}
        return {i: (places.add_(rows.start), bits) for i, (places, bits) in found.items()}

    def add(self, part: dict[int, tuple[Tensor, Tensor]]) -> None:
        for i, (places, bits) in part.items():
            first, self._found[i] = self._found[i], self._found[i] + len(bits)
            self._places[i][first : self._found[i]] = places
            self._bits[i][first : self._found[i]] = bits.bitwise_and_(LOW_MASK)  # the upper ones are the bin's number

    def finish(self) -> dict[int, Largest]:
        return {i: self._selection(i, b) for i, b in self._bins.items()}

    def _selection(self, key: int, found: _Bin) -> Largest:
        bits, places = self._bits.pop(key), self._places.pop(key)
        place = len(bits) - found.wanted
        threshold = int(np.partition(bits.numpy(), place)[place])  # torch's own makes int64 indices too
        still = found.wanted - int((bits > threshold).sum())
        equal = places[bits == threshold]
        last = int(equal[still - 1]) if still < len(equal) else EVERYWHERE
        return Largest((found.number << LOW_BITS) + threshold, last)


# --- bins too full to be collected ------------------------------------------------------------------------------------


def _counted(upper: dict[int, _Bin], magnitudes: Magnitudes) -> Generator[Fold, Any, dict[int, Largest]]:
    fine = yield _LowerCounts(upper, magnitudes)
    lower = {i: _bin_of(fine[i], b.wanted, b.which) for i, b in upper.items()}
    bits = {i: (upper[i].number << LOW_BITS) + b.number for i, b in lower.items()}
    # A threshold of zero needs no search: whether a zero stays changes nothing.
    split = [i for i, b in lower.items() if b.wanted < b.size and bits[i] > 0]
    ends = dict.fromkeys(bits, EVERYWHERE)
    if split:
        ends |= yield _NthEqual({i: lower[i] for i in split}, bits, magnitudes)
    return {i: Largest(bits[i], ends[i]) for i in bits}


class _LowerCounts:
    """A fold of histograms of the lower bits of those magnitudes that lie in the given bins."""

    def __init__(self, upper: dict[int, _Bin], magnitudes: Magnitudes) -> None:
        self._upper = upper
        self._magnitudes = magnitudes
        self._counts: dict[int, Tensor] = {}

    def part(self, rows: Rows) -> dict[int, Tensor]:
        counts = {}
        for i, b in self._upper.items():
            bits = self._magnitudes.bits(rows, b.which)
            inside = bits[bits >> LOW_BITS == b.number] & LOW_MASK
            counts[i] = torch.bincount(inside, minlength=1 << LOW_BITS).cpu()
        return counts

    def add(self, part: dict[int, Tensor]) -> None:
        _add_counts(self._counts, part)

    def finish(self) -> dict[int, Tensor]:
        return self._counts


class _NthEqual:
    """A fold that finds the flat index of the last element kept among equal magnitudes of these bits."""

    def __init__(self, sought: dict[int, _Bin], bits: Mapping[int, int], magnitudes: Magnitudes) -> None:
        self._sought = sought
        self._bits = bits
        self._magnitudes = magnitudes
        self._left = {i: b.wanted for i, b in sought.items()}
        self._places: dict[int, int] = {}

    def part(self, rows: Rows) -> dict[int, Tensor]:
        found = {i: self._magnitudes.bits(rows, b.which) == self._bits[i] for i, b in self._sought.items()}
        return {i: equal.nonzero().flatten().cpu() + rows.start for i, equal in found.items()}

    def add(self, part: dict[int, Tensor]) -> None:
        for i, places in part.items():
            if 0 < self._left[i] <= len(places):
                self._places[i] = int(places[self._left[i] - 1])
            self._left[i] -= len(places)

    def finish(self) -> dict[int, int]:
        return self._places
