"""Model Stock: the mean of the experts, drawn nearer to the base the more their deltas differ in direction."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import TYPE_CHECKING, Any

from lowmem_aim.methods.footprint import Footprint
from lowmem_aim.methods.gram import cosine, gram_round, row_dots, square, vectors
from lowmem_aim.methods.method import Rows, Script, Subject, merge_method
from lowmem_aim.methods.task_vectors import span, takes_span
from lowmem_aim.system.on_demand import torch

if TYPE_CHECKING:
    from torch import Tensor

OPPOSED = 1e-6  # 1 + (K-1) c below this: the deltas cancel each other, and t is 0


def _takes(tensor: Subject, parameters: Mapping[str, Any], loops: bool) -> Footprint:
    if not parameters["filter_wise"] or len(tensor.shape) < 2:
        return takes_span(tensor, parameters, loops)
    by_row = 8 * (tensor.experts + 8) // max(tensor.shape[-1], 1)
    return Footprint(element=max(8 * tensor.experts + 12, 28) + by_row)


@merge_method("model_stock", fewest=2, source="arXiv 2403.19522", takes=_takes, rounds=(0, 1))
def model_stock(tensor: Subject, *, filter_wise: bool = False) -> Script:
    """t mean(Wi) + (1-t) W0, t = K c / (1 + (K-1) c), c the mean cosine between two deltas; or t for each row."""
    if filter_wise and len(tensor.shape) > 1:
        return _by_row
    count = tensor.experts
    gram = square((yield gram_round(deltas=True)), count)
    pairs = [cosine(gram, i, j) for i, j in combinations(range(count), 2)]
    c = sum(pairs) / len(pairs)
    below = 1.0 + (count - 1) * c
    t = count * c / below if below > OPPOSED else 0.0
    return span((t / count,) * count, based=True)


def _by_row(rows: Rows) -> Tensor:
    deltas = vectors(rows, deltas=True)
    count = len(deltas)
    norms = [row_dots(delta, delta).sqrt() for delta in deltas]
    total = torch.zeros_like(norms[0])
    for i, j in combinations(range(count), 2):
        product = norms[i] * norms[j]
        nothing = product == 0.0
        cosines = row_dots(deltas[i], deltas[j]) / torch.where(nothing, 1.0, product)
        total += torch.where(nothing, 0.0, cosines.clamp(-1.0, 1.0))
    c = total / (count * (count - 1) // 2)
    below = c * (count - 1) + 1.0
    t = torch.where(below > OPPOSED, c * count / torch.where(below > OPPOSED, below, 1.0), 0.0)
    t = t.to(device=deltas[0].device, dtype=torch.float32)[:, None]
    mean = deltas[0]
    for delta in deltas[1:]:
        mean += delta
    return (mean / count).mul_(t).add_(rows.base)
