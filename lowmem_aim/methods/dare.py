"""DARE: drop elements of each delta at random and rescale what stays; dare_ties also elects signs."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lowmem_aim.methods.masks import keep_mask
from lowmem_aim.methods.method import Densities, Rescale, Rows, Script, Subject, Weights, merge_method
from lowmem_aim.methods.task_vectors import Sparsify, consensus, rescale_factors


@merge_method("dare_linear", source="arXiv 2311.03099")
def dare_linear(
    tensor: Subject,
    *,
    weight: Weights,
    density: Densities = (1.0,),
    normalize: bool = False,
    rescale: Rescale = True,
    lambda_: float = 1.0,
    int8_mask: bool = False,  # mergekit's memory saver; has no effect on the result
) -> Script:
    """W0 + lambda sum wi Di, each element of Di kept with probability density."""
    sparsify = at_random(tensor, density)
    factor = yield from rescale_factors(sparsify, density, rescale)
    return consensus(sparsify, weight, factor, normalize=normalize, lambda_=lambda_, elect=False)


@merge_method("dare_ties", source="arXiv 2311.03099 with the sign election of arXiv 2306.01708")
def dare_ties(
    tensor: Subject,
    *,
    weight: Weights,
    density: Densities = (1.0,),
    normalize: bool = False,
    rescale: Rescale = True,
    lambda_: float = 1.0,
    int8_mask: bool = False,  # mergekit's memory saver; has no effect on the result
) -> Script:
    """As dare_linear, with the elements summed over the experts that agree with the elected sign."""
    sparsify = at_random(tensor, density)
    factor = yield from rescale_factors(sparsify, density, rescale)
    return consensus(sparsify, weight, factor, normalize=normalize, lambda_=lambda_, elect=True)


def at_random(tensor: Subject, density: Sequence[float]) -> Sparsify:
    """Keep each element of expert i's delta with probability density_i, by the counter-based masks of `masks`."""

    def sparsify(deltas: Sequence[Tensor], rows: Rows) -> list[Tensor | None]:
        return [
            _mask(tensor, i, d, delta, rows.start) for i, (d, delta) in enumerate(zip(density, deltas, strict=True))
        ]

    return sparsify


def _mask(tensor: Subject, position: int, density: float, delta: Tensor, start: int) -> Tensor | None:
    if density >= 1.0:
        return None
    mask = keep_mask(
        density,
        seed=tensor.seed,
        name=tensor.name,
        position=position,
        start=start,
        count=delta.numel(),
        device=delta.device,
    )
    return mask.view(delta.shape)
