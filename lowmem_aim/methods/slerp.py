"""slerp: interpolation along the great circle between the base and one expert, each tensor taken as one vector."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from lowmem_aim.methods.exact import ExactSums
from lowmem_aim.methods.footprint import Footprint
from lowmem_aim.methods.gram import footprint_of_gram, gram_sums
from lowmem_aim.methods.linear import takes_weighted_sum, weighted_sum
from lowmem_aim.methods.method import Rows, Script, Subject, Within, merge_method

if TYPE_CHECKING:
    from torch import Tensor

PARALLEL = 0.9995  # |cos| above this: the angle is too small to divide by its sine


def _takes(tensor: Subject, parameters: Mapping[str, Any], loops: bool) -> Footprint:
    return footprint_of_gram(2, loops) | takes_weighted_sum(tensor, parameters, loops)


@merge_method("slerp", most=1, source="Shoemake, SIGGRAPH 1985", compiled=True, takes=_takes, rounds=(1, 1))
def slerp(tensor: Subject, *, t: Annotated[float, Within()]) -> Script:
    """sin((1-t)a)/sin a W0 + sin(t a)/sin a W1, a the angle between the tensors; linear where they are parallel."""
    aa, ab, bb = yield ExactSums(_gram)
    shares = great_circle(t, aa, bb, ab)

    def combine(rows: Rows) -> Tensor:
        return weighted_sum((rows.stored_base, rows.stored_experts[0]), shares)

    return combine


def _gram(rows: Rows) -> list[int]:
    return gram_sums(Rows(rows.stored_base[:0], (rows.stored_base, *rows.stored_experts), rows.start), deltas=False)


def great_circle(t: float, aa: float, bb: float, ab: float) -> tuple[float, float]:
    """The factors of a and b, from their squared norms aa, bb and dot product ab. A zero norm gives lerp."""
    norms = math.sqrt(aa) * math.sqrt(bb)
    if norms == 0.0:
        return 1.0 - t, t
    cosine = max(-1.0, min(1.0, ab / norms))
    if abs(cosine) > PARALLEL:
        return 1.0 - t, t
    angle = math.acos(cosine)
    return math.sin((1.0 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
