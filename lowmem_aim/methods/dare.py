"""DARE: drop elements of each delta at random and rescale what stays; dare_ties also elects signs."""

from __future__ import annotations

from collections.abc import Sequence

from lowmem_aim.methods.method import Densities, Rescale, Script, Subject, Weights, merge_method
from lowmem_aim.methods.selection import Selection, Share
from lowmem_aim.methods.task_vectors import combine_deltas, rescale_factors, takes_deltas


@merge_method("dare_linear", source="arXiv 2311.03099", compiled=True, takes=takes_deltas, rounds=(0, 1))
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
    selections = at_random(tensor, density)
    factor = yield from rescale_factors(selections, density, rescale)
    return combine_deltas(selections, weight, factor, normalize=normalize, lambda_=lambda_, elect=False)


@merge_method(
    "dare_ties",
    source="arXiv 2311.03099 with the sign election of arXiv 2306.01708",
    compiled=True,
    takes=takes_deltas,
    rounds=(0, 1),
)
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
    """dare_linear with the elements summed over the experts that agree with the elected sign."""
    selections = at_random(tensor, density)
    factor = yield from rescale_factors(selections, density, rescale)
    return combine_deltas(selections, weight, factor, normalize=normalize, lambda_=lambda_, elect=True)


def at_random(tensor: Subject, density: Sequence[float]) -> list[Selection]:
    """The selections that keep each element of expert i's delta with probability density_i."""
    return [Share(d, tensor.seed, tensor.name, position) for position, d in enumerate(density)]
