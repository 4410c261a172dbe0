"""arcee_fusion: the expert's elements where they matter most, and the base's elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lowmem_aim.methods.exact import wide
from lowmem_aim.methods.footprint import Footprint
from lowmem_aim.methods.gram import row_sums
from lowmem_aim.methods.method import Combine, Fold, Rows, Script, Subject, merge_method
from lowmem_aim.system.on_demand import numpy as np
from lowmem_aim.system.on_demand import torch

if TYPE_CHECKING:
    from torch import Tensor

SMALLEST = 1e-8  # added to each probability
DIGIT = 16  # bits of a float64 that one round counts
DIGITS = 64 // DIGIT


def _takes(tensor: Subject, parameters: Mapping[str, Any], loops: bool) -> Footprint:
    row = max(tensor.shape[-1] if tensor.shape else 1, 1)
    counted = 3 * 8 << DIGIT  # one table for each of three order statistics
    # Both rows in float64, their shares and logarithms, with some numbers for each row.
    return Footprint(
        element=44 + 64 // row, part=counted, tensor=8 * (tensor.numel // row) + counted + (3 * 8 << DIGIT)
    )


@merge_method("arcee_fusion", most=1, source="mergekit", takes=_takes, whole_rows=True, rounds=(5, 5))
def arcee_fusion(tensor: Subject) -> Script:
    """W1 where its importance is at least median + 1.5 (upper - lower quartile), else W0.

    The importance of an element is abs(D) times its row's divergence KL(softmax W1 || softmax W0), in float64; the
    quantiles are exact: elements of the sorted tensor, without interpolation.
    """
    row = tensor.shape[-1] if tensor.shape else 1
    divergences = yield _Divergences(row, tensor.numel // max(row, 1))

    def importance(rows: Rows) -> Tensor:  # (n,) float64
        first = rows.start // row
        delta = wide(rows.experts[0] - rows.base).abs_().view(-1, row)
        return delta.mul_(divergences[first : first + len(delta), None].to(delta.device)).view(-1)

    quartiles = [int(q * (tensor.numel - 1)) for q in (0.25, 0.5, 0.75)]
    lower, median, upper = yield from order_statistics(importance, quartiles)
    return _chosen(importance, median + 1.5 * (upper - lower))


def _chosen(importance: Callable[[Rows], Tensor], threshold: float) -> Combine:
    def combine(rows: Rows) -> Tensor:
        base = rows.base
        matters = (importance(rows) >= threshold).view(base.shape).to(base.device)
        return torch.where(matters, rows.experts[0], base)

    return combine


class _Divergences:
    """A fold of KL(softmax W1 || softmax W0) of each row, (rows,) float64."""

    def __init__(self, row: int, rows: int) -> None:
        self._row = row
        # Of all rows from the start: many small parts would leave holes in the heap.
        self._whole = torch.empty(rows, dtype=torch.float64)
        self._done = 0

    def part(self, rows: Rows) -> Tensor:
        # In float64: the divergence of nearly equal rows is noise in float32, and often negative.
        p, q = (_softmax(t.cpu().view(-1, self._row)) + SMALLEST for t in (rows.experts[0], rows.base))
        # numpy's functions give an element the same result wherever it stands in an array; torch's do not.
        return row_sums(torch.from_numpy(p * (np.log(p) - np.log(q))))

    def add(self, part: Tensor) -> None:
        first, self._done = self._done, self._done + len(part)
        self._whole[first : self._done] = part

    def finish(self) -> Tensor:
        return self._whole


def _softmax(rows: Tensor) -> Any:
    x = rows.to(torch.float64).numpy()
    powers = np.exp(x - x.max(axis=1, keepdims=True))
    return powers / row_sums(torch.from_numpy(powers.copy())).numpy()[:, None]


# --- order statistics -------------------------------------------------------------------------------------------------


def order_statistics(
    values: Callable[[Rows], Tensor],  # (n,) float64 of a slice
    places: Sequence[int],  # in all values sorted, from 0
) -> Generator[Fold, Any, list[float]]:
    """The values at these places of the sorted tensor, exactly: their bits are found from the top, a digit a round."""
    known = [0] * len(places)  # the digits found so far, as numbers
    left = list(places)  # the places among the values that begin with these digits
    for digit in range(DIGITS):
        counts = yield _DigitCounts(values, known, digit)
        for i, k in enumerate(known):
            below = counts[k].cumsum(0)
            here = int(torch.searchsorted(below, left[i], right=True))
            left[i] -= int(below[here - 1]) if here else 0
            known[i] = (k << DIGIT) + here
    return [_value(k) for k in known]


class _DigitCounts:
    """A fold that counts, for each prefix, the values that begin with it by their next digit."""

    def __init__(self, values: Callable[[Rows], Tensor], prefixes: Sequence[int], digit: int) -> None:
        self._values = values
        self._prefixes = sorted(set(prefixes))
        self._shift = 64 - DIGIT * (digit + 1)
        self._counts: dict[int, Tensor] = {}

    def part(self, rows: Rows) -> dict[int, Tensor]:
        ordered = _ordered(self._values(rows))
        found = {}
        for prefix in self._prefixes:
            inside = ordered
            if self._shift + DIGIT < 64:
                # The first digit of a prefix holds the sign bit, turned.
                begin = prefix - (1 << (64 - self._shift - DIGIT - 1))
                inside = ordered[ordered >> (self._shift + DIGIT) == begin]
            digits = inside >> self._shift
            digits = digits & ((1 << DIGIT) - 1) if self._shift + DIGIT < 64 else digits + (1 << (DIGIT - 1))
            found[prefix] = torch.bincount(digits, minlength=1 << DIGIT).cpu()
        return found

    def add(self, part: dict[int, Tensor]) -> None:
        for prefix, counts in part.items():
            self._counts[prefix] = self._counts[prefix] + counts if prefix in self._counts else counts

    def finish(self) -> dict[int, Tensor]:
        return self._counts


def _ordered(values: Tensor) -> Tensor:
    """Signed integers that order as the float64 values do; a negative zero counts as zero."""
    bits = (values + 0.0).view(torch.int64)
    return torch.where(bits < 0, bits ^ ((1 << 63) - 1), bits)


def _value(digits: int) -> float:
    """The float64 value of all digits of `_ordered`, with the sign turned."""
    ordered = torch.tensor(digits - (1 << 63), dtype=torch.int64)
    return float(torch.where(ordered < 0, ordered ^ ((1 << 63) - 1), ordered).view(torch.float64))
