"""The Karcher mean: the point of the sphere whose squared angles to all models' directions have the smallest sum."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

from lowmem_aim.methods.gram import Gram, gram_round, length, square, unit_gram
from lowmem_aim.methods.method import Script, Subject, Within, merge_method
from lowmem_aim.methods.task_vectors import span, takes_span

CANCELLED = 1e-7  # a length below this is 0 but for rounding


@merge_method(
    "karcher",
    base="averaged",
    source="Karcher, Comm. Pure Appl. Math. 30, 1977",
    compiled=True,
    takes=takes_span,
    rounds=(1, 1),
)
def karcher(
    tensor: Subject,
    *,
    max_iter: Annotated[float, Within(0.0)] = 10,
    tol: Annotated[float, Within(0.0)] = 1e-5,
) -> Script:
    """The Riemannian mean of the unit vectors Wi/|Wi|, a base among them, times the mean of |Wi|.

    Every iterate is a sum of the models, so all of it happens in K dimensions. Models of norm 0 do not count; if the
    others cancel each other, the result is the first of them.
    """
    gram = square((yield gram_round(deltas=False)), tensor.experts)
    return span(mean_shares(gram, int(max_iter), tol), based=False)


def mean_shares(gram: Gram, max_iter: int, tol: float) -> tuple[float, ...]:
    """The factor of each model."""
    shares = [0.0] * len(gram)
    long = [i for i in range(len(gram)) if gram[i][i] > 0.0]
    if not long:
        return tuple(shares)
    cosines, norms = unit_gram(gram), [math.sqrt(gram[i][i]) for i in long]
    mean = _unit(cosines, [1.0] * len(long), max(tol, CANCELLED))
    if mean is None:
        shares[long[0]] = 1.0
        return tuple(shares)
    for _ in range(max_iter):
        step = _tangent(cosines, mean, tol)
        size = length(cosines, step)
        if size <= tol:
            break
        moved = [math.cos(size) * m + math.sin(size) / size * s for m, s in zip(mean, step, strict=True)]
        mean = _unit(cosines, moved, 0.0) or mean
    scale = math.fsum(norms) / len(norms)
    for i, m, norm in zip(long, mean, norms, strict=True):
        shares[i] = m * scale / norm
    return tuple(shares)


def _unit(cosines: Gram, c: Sequence[float], smallest: float) -> list[float] | None:
    """c scaled to length 1; None if its length is not above `smallest`."""
    size = length(cosines, c)
    return [x / size for x in c] if size > smallest else None


def _tangent(cosines: Gram, mean: Sequence[float], tol: float) -> list[float]:
    """The mean of the directions' logarithms at `mean`: the direction and the length of the next step."""
    step = [0.0] * len(mean)
    for i, row in enumerate(cosines):
        across = max(-1.0, min(1.0, math.fsum(c * m for c, m in zip(row, mean, strict=True))))
        angle = math.acos(across)
        if angle <= tol or math.sin(angle) <= tol:
            continue
        factor = angle / math.sin(angle) / len(mean)
        step[i] += factor
        step = [s - factor * across * m for s, m in zip(step, mean, strict=True)]
    return step
