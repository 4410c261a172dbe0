"""Dot products between models or deltas: all that the geometric methods need of a tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lowmem_aim.methods import kernels
from lowmem_aim.methods.exact import ExactSums, dot, exact_sum
from lowmem_aim.methods.footprint import Footprint
from lowmem_aim.methods.method import Rows

if TYPE_CHECKING:
    from torch import Tensor

Gram = tuple[tuple[float, ...], ...]  # K x K dot products


def vectors(rows: Rows, deltas: bool) -> list[Tensor]:
    """A slice's experts, or their deltas, as float32."""
    if not deltas:
        return list(rows.experts)
    base = rows.base
    return [expert - base for expert in rows.experts]


def gram_sums(rows: Rows, deltas: bool) -> list[int]:
    """The dot products of a slice's experts or deltas, i <= j, by rows: exact, in the units of `exact.exact_sum`."""
    if kernels.usable(rows.stored_experts):
        return kernels.gram_sums(rows.stored_experts, rows.stored_base if deltas else None)
    found = vectors(rows, deltas)
    return [exact_sum(dot(a, b)) for i, a in enumerate(found) for b in found[i:]]


def footprint_of_gram(vectors: int, loops: bool) -> Footprint:
    """The memory that `gram_sums` of so many vectors takes: bins for each pair, or float64 terms."""
    pairs = vectors * (vectors + 1) // 2
    return Footprint(slice=kernels.BINS_BYTES * pairs) if loops else Footprint(element=4 * vectors + 24)


def gram_round(deltas: bool) -> ExactSums:
    """The measure round whose result `square` takes."""
    return ExactSums(lambda rows: gram_sums(rows, deltas))


def square(sums: Sequence[float], count: int) -> Gram:
    """The symmetric table of dot products, from the result of `gram_round` for `count` vectors."""
    found = iter(sums)
    half = {(i, j): next(found) for i in range(count) for j in range(i, count)}
    return tuple(tuple(half[min(i, j), max(i, j)] for j in range(count)) for i in range(count))


def cosine(gram: Gram, i: int, j: int) -> float:
    """The cosine between two vectors of the table, in [-1, 1]; 0 if a norm is 0."""
    norms = math.sqrt(gram[i][i]) * math.sqrt(gram[j][j])
    return max(-1.0, min(1.0, gram[i][j] / norms)) if norms else 0.0


def unit_gram(gram: Gram) -> Gram:
    """The cosines between those vectors whose norm is not 0."""
    long = [i for i in range(len(gram)) if gram[i][i] > 0.0]
    return tuple(tuple(1.0 if i == j else cosine(gram, i, j) for j in long) for i in long)


def length(gram: Gram, c: Sequence[float]) -> float:
    """The length of sum ci ui, where ui are the vectors of the table."""
    products = (a * b * gram[i][j] for i, a in enumerate(c) for j, b in enumerate(c))
    return math.sqrt(max(math.fsum(products), 0.0))


def row_dots(a: Tensor, b: Tensor) -> Tensor:  # (rows,) float64
    """The dot product of each row of two (rows, columns) float32 tensors."""
    if kernels.usable([a]) and a.numel():
        return kernels.row_dots(a, b)
    return row_sums(dot(a, b))


def row_sums(terms: Tensor) -> Tensor:  # (rows,)
    """The sum of each row of (rows, columns) terms, which are overwritten.

    Halves are added to halves, elementwise: the order of the additions follows from the number of columns alone, which
    torch's own sums do not promise.
    """
    while (columns := terms.shape[1]) > 1:
        half = (columns + 1) // 2
        terms[:, : columns - half] += terms[:, half:]
        terms = terms[:, :half]
    # A copy: a view would keep all the terms in memory.
    return terms[:, 0].clone() if terms.shape[1] else terms.new_zeros(len(terms))
