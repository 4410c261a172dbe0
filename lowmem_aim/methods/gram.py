"""Dot products between models or deltas: what the geometric methods know of a tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lowmem_aim.methods.exact import dot, exact_sum, wide

Gram = tuple[tuple[float, ...], ...]  # K x K dot products


def gram_sums(vectors: Sequence[Tensor]) -> list[int]:
    """Exact sums, as `exact.ExactSums` takes them: the dot product of each pair of float32 slices, i <= j, by rows."""
    return [exact_sum(dot(a, b)) for i, a in enumerate(vectors) for b in vectors[i:]]


def square(sums: Sequence[float], count: int) -> Gram:
    """The symmetric table of what `gram_sums` of `count` vectors came to."""
    found = iter(sums)
    half = {(i, j): next(found) for i in range(count) for j in range(i, count)}
    return tuple(tuple(half[min(i, j), max(i, j)] for j in range(count)) for i in range(count))


def cosine(gram: Gram, i: int, j: int) -> float:
    """In [-1, 1]; 0 where a norm is 0."""
    norms = math.sqrt(gram[i][i]) * math.sqrt(gram[j][j])
    return max(-1.0, min(1.0, gram[i][j] / norms)) if norms else 0.0


def row_dots(a: Tensor, b: Tensor) -> Tensor:  # (rows,) float64
    """The dot product of each row of two (rows, columns) float32 tensors.

    Halves are added to halves, elementwise: the order of the additions follows from the number of columns alone, which
    torch's own sums do not promise.
    """
    terms = dot(a, b) if a is not b else wide(a).square_()
    while (columns := terms.shape[1]) > 1:
        half = (columns + 1) // 2
        terms[:, : columns - half] += terms[:, half:]
        terms = terms[:, :half]
    return terms[:, 0] if terms.shape[1] else terms.new_zeros(len(terms), dtype=torch.float64)
