"""The common tail of the task-vector family, and task arithmetic, which is nothing but that tail.

Deltas (task vectors) Di = Wi - W0, sparsified -> Vi = wi Di -> if signs are elected, per element only the Vi of the
elected sign stay -> sum -> if `normalize`, divided by the weights that took part -> times lambda -> + W0.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch
from torch import Tensor

from lowmem_aim.methods.exact import ExactSums, wide
from lowmem_aim.methods.linear import ZERO_WEIGHT
from lowmem_aim.methods.method import Combine, Fold, Rescale, Rows, Script, Subject, Weights, merge_method

# deltas, rows -> for each expert the elements of its delta that stay, (rows, columns) bool; None where all stay
Sparsify = Callable[[Sequence[Tensor], Rows], Sequence[Tensor | None]]


@merge_method("task_arithmetic", source="arXiv 2212.04089")
def task_arithmetic(tensor: Subject, *, weight: Weights, normalize: bool = False, lambda_: float = 1.0) -> Script:
    """W0 + lambda sum wi Di."""
    return consensus(keep_all, weight, (1.0,) * tensor.experts, normalize=normalize, lambda_=lambda_, elect=False)
    yield  # no rounds


def task_vectors(rows: Rows) -> list[Tensor]:
    """Fresh deltas Wi - W0, K x (rows, columns) float32."""
    return [expert - rows.base for expert in rows.experts]


def keep_all(deltas: Sequence[Tensor], rows: Rows) -> Sequence[Tensor | None]:
    return [None] * len(deltas)


def rescale_factors(
    sparsify: Sparsify, density: Sequence[float], rescale: Rescale
) -> Generator[Fold, Any, tuple[float, ...]]:
    """What each sparsified delta is multiplied by: |D|_1 / |kept|_1 (one round), 1 / density, or 1."""
    if rescale is False or all(d >= 1.0 for d in density):
        return (1.0,) * len(density)
    if rescale == "density":
        return tuple(1.0 / d if d > 0.0 else 1.0 for d in density)

    def magnitudes(rows: Rows) -> list[Tensor]:
        deltas = task_vectors(rows)
        kept = [_masked(delta, mask) for delta, mask in zip(deltas, sparsify(deltas, rows), strict=True)]
        return [wide(terms.abs()) for terms in (*deltas, *kept)]

    sums = yield ExactSums(magnitudes)
    pairs = zip(sums[: len(density)], sums[len(density) :], strict=True)
    return tuple(whole / kept if kept > 0.0 else 1.0 for whole, kept in pairs)


def consensus(
    sparsify: Sparsify,
    weight: Sequence[float],
    factor: Sequence[float],  # from `rescale_factors`; not part of the divisor
    *,
    normalize: bool,
    lambda_: float,
    elect: bool,
) -> Combine:
    """The combine of the whole family."""

    def combine(rows: Rows) -> Tensor:
        deltas = task_vectors(rows)
        masks = sparsify(deltas, rows)
        parts = [
            _masked(delta, mask).mul_(w * f) for delta, mask, w, f in zip(deltas, masks, weight, factor, strict=True)
        ]
        merged, divisor = _elected(parts, weight) if elect else (_sum(parts), sum(weight))
        if normalize:
            merged = (
                merged / _safe(divisor) if isinstance(divisor, Tensor) else merged.mul_(1.0 / _safe_scalar(divisor))
            )
        return merged.mul_(lambda_).add_(rows.base)

    return combine


def _masked(delta: Tensor, mask: Tensor | None) -> Tensor:
    return delta if mask is None else delta * mask


def _sum(parts: Sequence[Tensor]) -> Tensor:
    """V1 + V2 + ..., in model order; fresh."""
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total


def _elected(parts: Sequence[Tensor], weight: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Per element: the sum of the Vi whose sign is that of sum Vi (+ where it is 0), and the sum of their weights."""
    positive = _sum(parts) >= 0.0
    total = torch.zeros_like(parts[0])
    divisor = torch.zeros_like(parts[0])
    for part, w in zip(parts, weight, strict=True):
        agrees = torch.where(positive, part > 0.0, part < 0.0)  # a zero agrees with neither
        total += part * agrees
        divisor += agrees * w
    return total, divisor


def _safe(divisor: Tensor) -> Tensor:
    return divisor.masked_fill_(divisor.abs() < ZERO_WEIGHT, 1.0)


def _safe_scalar(divisor: float) -> float:
    return divisor if abs(divisor) >= ZERO_WEIGHT else 1.0
