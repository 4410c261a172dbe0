"""Model Breadcrumbs: drop the largest elements of each delta, taken for outliers, and the smallest."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import Annotated, Any

from lowmem_aim.methods.counting import first_by_size, footprint_of_first
from lowmem_aim.methods.footprint import Footprint
from lowmem_aim.methods.method import Densities, Fold, PerExpert, Rescale, Script, Subject, Weights, merge_method
from lowmem_aim.methods.selection import Between
from lowmem_aim.methods.task_vectors import combine_deltas, rescale_factors, takes_deltas

Gammas = Annotated[tuple[float, ...], PerExpert(0.0, 1.0)]


def _takes(tensor: Subject, parameters: Mapping[str, Any], loops: bool) -> Footprint:
    # Two thresholds for each expert; the masks of both.
    in_torch = Footprint(element=2) if not loops else Footprint()
    deltas = takes_deltas(tensor, parameters, loops)
    return footprint_of_first(tensor.numel, tensor.experts, 2 * tensor.experts) | deltas | in_torch


@merge_method("breadcrumbs", source="arXiv 2312.06795", compiled=True, takes=_takes, rounds=(0, 5))
def breadcrumbs(
    tensor: Subject,
    *,
    weight: Weights,
    density: Densities = (1.0,),
    gamma: Gammas = (0.01,),
    normalize: bool = False,
    rescale: Rescale = False,
    lambda_: float = 1.0,
    int8_mask: bool = False,  # mergekit's memory saver; has no effect on the result
) -> Script:
    """W0 + lambda sum wi Di; the int(gamma n) largest of Di are dropped, the next int(density n) stay."""
    selections = yield from _middle(tensor, density, gamma)
    factor = yield from rescale_factors(selections, density, rescale)
    return combine_deltas(selections, weight, factor, normalize=normalize, lambda_=lambda_, elect=False)


@merge_method(
    "breadcrumbs_ties",
    source="arXiv 2312.06795 with the sign election of arXiv 2306.01708",
    compiled=True,
    takes=_takes,
    rounds=(0, 5),
)
def breadcrumbs_ties(
    tensor: Subject,
    *,
    weight: Weights,
    density: Densities = (1.0,),
    gamma: Gammas = (0.01,),
    normalize: bool = False,
    rescale: Rescale = False,
    lambda_: float = 1.0,
    int8_mask: bool = False,  # mergekit's memory saver; has no effect on the result
) -> Script:
    """breadcrumbs with the elements summed over the experts that agree with the elected sign."""
    selections = yield from _middle(tensor, density, gamma)
    factor = yield from rescale_factors(selections, density, rescale)
    return combine_deltas(selections, weight, factor, normalize=normalize, lambda_=lambda_, elect=True)


def _middle(tensor: Subject, density: Sequence[float], gamma: Sequence[float]) -> Generator[Fold, Any, list[Between]]:
    """The selections of the middle magnitudes. Up to four rounds, mostly two."""
    n = tensor.numel
    stay = [int(d * n) for d in density]
    # Fewer are dropped if density and gamma together exceed 1.
    dropped = [min(int(g * n), n - k) for g, k in zip(gamma, stay, strict=True)]
    outer = [(i, top + k) for i, (top, k) in enumerate(zip(dropped, stay, strict=True))]
    found = yield from first_by_size(n, [*outer, *enumerate(dropped)])
    return [Between(*pair) for pair in zip(found[: len(outer)], found[len(outer) :], strict=True)]
