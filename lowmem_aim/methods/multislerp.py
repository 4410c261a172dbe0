"""multislerp: the weighted mean direction of any number of models, at their weighted mean length."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from lowmem_aim.methods.gram import Gram, gram_round, length, square, unit_gram
from lowmem_aim.methods.linear import ZERO_WEIGHT
from lowmem_aim.methods.method import Script, Subject, Weights, Within, merge_method
from lowmem_aim.methods.task_vectors import span, takes_span

CANCELLED = 1e-7  # a length below this is 0 but for rounding


def _check(tensor: Subject, parameters: Mapping[str, Any]) -> str:
    return "all weights are zero" if not tensor.based and not any(parameters["weight"]) else ""


@merge_method(
    "multislerp", base="optional", source="mergekit", compiled=True, rounds=(1, 1), check=_check, takes=takes_span
)
def multislerp(
    tensor: Subject,
    *,
    weight: Weights,
    normalize_weights: bool = True,
    eps: Annotated[float, Within(0.0)] = 1e-8,
) -> Script:
    """m sum wi |xi|, m the weighted mean of the directions xi/|xi| at length 1; xi the models, or their deltas where
    there is a base, which is then added.

    mergekit writes m cos|tau| + tau sin|tau|/|tau| for m, with the step tau = sum wi (ui - (ui.m) m) in the tangent
    space at m. As m lies along sum wi ui, that step is zero. xi of norm 0 do not count; if the others cancel each other
    (to `eps`), the result is the first of them.
    """
    gram = square((yield gram_round(deltas=tensor.based)), tensor.experts)
    return span(mean_shares(gram, weight, normalize_weights, eps), tensor.based)


def mean_shares(gram: Gram, weight: Sequence[float], normalize: bool, eps: float) -> tuple[float, ...]:
    """The factor of each xi."""
    shares = [0.0] * len(gram)
    long = [i for i in range(len(gram)) if gram[i][i] > 0.0]
    if not long:
        return tuple(shares)
    weights = [weight[i] for i in long]
    if not any(weights):
        return tuple(shares)
    total = math.fsum(weights)
    if normalize and abs(total) >= ZERO_WEIGHT:
        weights = [w / total for w in weights]
    norms = [math.sqrt(gram[i][i]) for i in long]
    size = length(unit_gram(gram), weights)
    if size <= max(eps, CANCELLED):
        shares[long[0]] = 1.0
        return tuple(shares)
    scale = math.fsum(w * n for w, n in zip(weights, norms, strict=True))
    for i, w, norm in zip(long, weights, norms, strict=True):
        shares[i] = w / size * scale / norm
    return tuple(shares)
