"""TIES: keep exactly the k largest elements of each delta, then elect signs."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import Any

from lowmem_aim.methods.counting import first_by_size, footprint_of_first
from lowmem_aim.methods.footprint import Footprint
from lowmem_aim.methods.method import Densities, Fold, Rescale, Script, Subject, Weights, merge_method
from lowmem_aim.methods.selection import Largest
from lowmem_aim.methods.task_vectors import combine_deltas, rescale_factors, takes_deltas


def _takes(tensor: Subject, parameters: Mapping[str, Any], loops: bool) -> Footprint:
    counted = sum(density < 1.0 for density in parameters["density"])
    deltas = takes_deltas(tensor, parameters, loops)
    return footprint_of_first(tensor.numel, counted, counted) | deltas if counted else deltas


@merge_method("ties", source="arXiv 2306.01708", compiled=True, takes=_takes, rounds=(0, 5))
def ties(
    tensor: Subject,
    *,
    weight: Weights,
    density: Densities = (1.0,),
    normalize: bool = True,
    rescale: Rescale = False,
    lambda_: float = 1.0,
    int8_mask: bool = False,  # mergekit's memory saver; has no effect on the result
) -> Script:
    """W0 + lambda times the weighted mean, over the experts that agree with the elected sign, of the top-k deltas."""
    selections = yield from largest(tensor, density)
    factor = yield from rescale_factors(selections, density, rescale)
    return combine_deltas(selections, weight, factor, normalize=normalize, lambda_=lambda_, elect=True)


def largest(tensor: Subject, density: Sequence[float]) -> Generator[Fold, Any, list[Largest]]:
    """The selections that keep exactly max(1, int(density_i n)) elements of each delta, or none at density 0.

    Up to four rounds, mostly two.
    """
    return (yield from first_by_size(tensor.numel, [(i, _kept(d, tensor.numel)) for i, d in enumerate(density)]))


def _kept(density: float, numel: int) -> int:
    # One element at least, as in mergekit since 0.1.5: a small tensor must not lose its whole delta.
    return max(1, int(density * numel)) if density else 0
