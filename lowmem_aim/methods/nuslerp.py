"""nuslerp: slerp between two models or their deltas, by their weights; for each tensor, row or column."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lowmem_aim.methods.columns import Columns, Panel, column_dots, footprint_of_columns
from lowmem_aim.methods.footprint import Footprint
from lowmem_aim.methods.gram import gram_round, row_dots, vectors
from lowmem_aim.methods.linear import ZERO_WEIGHT
from lowmem_aim.methods.method import Combine, Rows, Script, Subject, Weights, merge_method
from lowmem_aim.methods.task_vectors import span, takes_span
from lowmem_aim.system.on_demand import torch

if TYPE_CHECKING:
    from torch import Tensor

# A sine below this is too small to divide by. mergekit has 1e-8; but an angle near 0 or pi that comes from a cosine in
# float64 is no more accurate than 2e-8, and opposite vectors of other lengths would give numbers of any size.
FLAT = 1e-7
MOST_COLUMNS = 1 << 24  # their sums take 72 bytes each


def _check(tensor: Subject, parameters: Mapping[str, Any]) -> str:
    columns = math.prod(tensor.shape[1:])
    if parameters["nuslerp_flatten"] or not parameters["nuslerp_row_wise"] or columns <= MOST_COLUMNS:
        return ""
    return (
        f"`nuslerp_row_wise` would need the sums of {columns} columns of `{tensor.name}`, more than fit little memory"
    )


SHARES_BYTES = 400  # of one pair in `_all_shares`: its five numbers as Python has them, in lists and tuples


def _takes(tensor: Subject, parameters: Mapping[str, Any], loops: bool) -> Footprint:
    if parameters["nuslerp_flatten"] or len(tensor.shape) < 2:
        return takes_span(tensor, parameters, loops)
    by_row = Footprint(element=34 + (0 if parameters["nuslerp_row_wise"] else SHARES_BYTES // max(tensor.shape[-1], 1)))
    if not parameters["nuslerp_row_wise"]:
        return by_row
    columns = math.prod(tensor.shape[1:])
    sums = footprint_of_columns(columns, 1, loops)
    return by_row | sums | Footprint(slice=16 * columns, tensor=sums.tensor + SHARES_BYTES * columns)


@merge_method(
    "nuslerp", base="optional", fewest=2, most=2, source="mergekit", check=_check, takes=_takes, rounds=(0, 2)
)
def nuslerp(
    tensor: Subject, *, weight: Weights, nuslerp_flatten: bool = True, nuslerp_row_wise: bool = False
) -> Script:
    """sin((1-t)a)/sin a x1 + sin(t a)/sin a x2, t = w2/(w1+w2), a the angle between x1 and x2: the models, or their
    deltas where there is a base, which is then added.

    x are whole tensors; without `nuslerp_flatten` vectors along the last dimension; with `nuslerp_row_wise` as well,
    along the first. Linear where the sine of a is below 1e-7.
    """
    total = sum(weight)
    t = weight[1] / total if abs(total) >= ZERO_WEIGHT else 0.5
    if nuslerp_flatten or len(tensor.shape) < 2:
        aa, ab, bb = yield gram_round(deltas=tensor.based)
        return span(_shares(t, aa, bb, ab), tensor.based)
    if not nuslerp_row_wise:
        return lambda rows: _by_row(rows, t, tensor.based)

    def panels(rows: Rows) -> Iterator[Panel]:
        x = vectors(rows, tensor.based)
        return (Panel(place, part[0], (part[1],)) for place, part in _across(tensor, rows, x))

    sums = yield from column_dots(panels, math.prod(tensor.shape[1:]), tensor.shape[0], 1, deltas=False)
    return _by_column(tensor, t, sums)


def _shares(t: float, aa: float, bb: float, ab: float) -> tuple[float, float]:
    """The factors of a and b, from their squared norms aa, bb and dot product ab. A zero norm gives cosine 0."""
    norms = math.sqrt(aa) * math.sqrt(bb)
    angle = math.acos(max(-1.0, min(1.0, ab / norms))) if norms else math.pi / 2
    if math.sin(angle) < FLAT:
        return 1.0 - t, t
    return math.sin((1.0 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def _all_shares(t: float, aa: Tensor, bb: Tensor, ab: Tensor) -> Tensor:  # (2, n) float32
    """`_shares` of many pairs, one pair at a time: the sines of a vector would depend on their place in it."""
    triples = zip(aa.tolist(), bb.tolist(), ab.tolist(), strict=True)
    return torch.tensor([_shares(t, *triple) for triple in triples], dtype=torch.float32).reshape(-1, 2).T


def _by_row(rows: Rows, t: float, based: bool) -> Tensor:
    a, b = vectors(rows, based)
    shares = _all_shares(t, row_dots(a, a), row_dots(b, b), row_dots(a, b)).to(a.device)
    return _joined(rows, a, b, shares[0][:, None], shares[1][:, None], based)


def _joined(rows: Rows, a: Tensor, b: Tensor, of_a: Tensor, of_b: Tensor, based: bool) -> Tensor:
    merged = a * of_a + b * of_b
    return merged.add_(rows.base) if based else merged


# --- along the first dimension ----------------------------------------------------------------------------------------


def _across(tensor: Subject, rows: Rows, x: Sequence[Tensor]) -> Iterator[tuple[int, list[Tensor]]]:
    """The parts of a slice seen as (first dimension, all the others): (its first column, its rows of each x)."""
    width = tensor.shape[-1]
    inner = math.prod(tensor.shape[1:-1])  # rows that make up one row of that view
    if inner == 1:
        yield 0, list(x)
        return
    first, done = rows.start // width, 0
    while done < rows.count:
        place = (first + done) % inner
        stop = min(rows.count, done + inner - place)
        yield place * width, [part[done:stop].reshape(1, -1) for part in x]
        done = stop


def _by_column(tensor: Subject, t: float, sums: Columns) -> Combine:
    shares = _all_shares(t, sums.aa, sums.dd[0], sums.ad[0])

    def combine(rows: Rows) -> Tensor:
        a, b = vectors(rows, tensor.based)
        parts = []
        for place, (left, right) in _across(tensor, rows, [a, b]):
            own = shares[:, place : place + left.shape[1]].to(a.device)
            parts.append((left * own[0] + right * own[1]).reshape(-1, a.shape[1]))
        merged = torch.cat(parts)
        return merged.add_(rows.base) if tensor.based else merged

    return combine
