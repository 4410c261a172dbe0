"""DELLA: drop elements of each delta at random, the larger ones of a row less often, and rescale what stays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from lowmem_aim.methods import kernels
from lowmem_aim.methods.footprint import Footprint
from lowmem_aim.methods.masks import draws_of, mask_limits
from lowmem_aim.methods.method import Densities, PerExpert, Rescale, Script, Subject, Weights, merge_method
from lowmem_aim.methods.selection import Selection, Share, magnitude_bits
from lowmem_aim.methods.task_vectors import combine_deltas, rescale_factors
from lowmem_aim.system.on_demand import torch

if TYPE_CHECKING:
    from torch import Tensor

Epsilons = Annotated[tuple[float, ...], PerExpert(0.0, 1.0)]
SHORT = 128  # elements; shorter rows are sorted as fast by torch


def _check(tensor: Subject, parameters: Mapping[str, Any]) -> str:
    for density, epsilon in zip(parameters["density"], parameters["epsilon"], strict=True):
        if 0.0 < density < 1.0 and not (density - epsilon > 0.0 and density + epsilon < 1.0):
            return (
                f"`density` {density:g} with `epsilon` {epsilon:g}: density - epsilon and density + epsilon must lie "
                "between 0 and 1, or the density be 0 or 1"
            )
    return ""


def _takes(tensor: Subject, parameters: Mapping[str, Any], loops: bool) -> Footprint:
    # The deltas and their parts; bits, ranks, probabilities and draws of one expert; four numbers to sort a row.
    row = tensor.shape[-1] if tensor.shape else 1
    return Footprint(element=8 * tensor.experts + 48, slice=16 * row)


@merge_method("della", source="arXiv 2406.11617", takes=_takes, whole_rows=True, check=_check, rounds=(0, 1))
def della(
    tensor: Subject,
    *,
    weight: Weights,
    density: Densities = (1.0,),
    epsilon: Epsilons = (0.15,),
    normalize: bool = True,
    rescale: Rescale = True,
    lambda_: float = 1.0,
    int8_mask: bool = False,  # mergekit's memory saver; has no effect on the result
) -> Script:
    """della_linear with the elements summed over the experts that agree with the elected sign."""
    selections = _by_rank(tensor, density, epsilon)
    factor = yield from rescale_factors(selections, density, rescale)
    return combine_deltas(selections, weight, factor, normalize=normalize, lambda_=lambda_, elect=True)


@merge_method("della_linear", source="arXiv 2406.11617", takes=_takes, whole_rows=True, check=_check, rounds=(0, 1))
def della_linear(
    tensor: Subject,
    *,
    weight: Weights,
    density: Densities = (1.0,),
    epsilon: Epsilons = (0.15,),
    normalize: bool = False,
    rescale: Rescale = True,
    lambda_: float = 1.0,
    int8_mask: bool = False,  # mergekit's memory saver; has no effect on the result
) -> Script:
    """W0 + lambda sum wi Di, each element of Di kept with probability density - epsilon + 2 epsilon r/(n-1), r its rank
    by magnitude among the n of its row, from 0."""
    selections = _by_rank(tensor, density, epsilon)
    factor = yield from rescale_factors(selections, density, rescale)
    return combine_deltas(selections, weight, factor, normalize=normalize, lambda_=lambda_, elect=False)


def _by_rank(tensor: Subject, density: Sequence[float], epsilon: Sequence[float]) -> list[Selection]:
    row = tensor.shape[-1] if tensor.shape else 1
    return [
        Share(d, tensor.seed, tensor.name, position)
        if d in (0.0, 1.0)
        else ByRank(d, e, row, tensor.seed, tensor.name, position)
        for position, (d, e) in enumerate(zip(density, epsilon, strict=True))
    ]


@dataclass(frozen=True)
class ByRank:
    """A random share in which larger elements stay more often.

    The probability rises from density - epsilon to density + epsilon with the element's rank in its row. Slices must
    hold whole rows.
    """

    density: float
    epsilon: float
    row: int  # elements of a row
    seed: int
    name: str  # of the tensor
    position: int  # of the expert

    def mask(self, delta: Tensor, start: int) -> Tensor:
        """True where an element is drawn, of the delta's shape."""
        ranks = _ranks(magnitude_bits(delta).view(-1, self.row))
        if self.row > 1:
            chances = (
                ranks.to(torch.float64).mul_(2.0 * self.epsilon / (self.row - 1)).add_(self.density - self.epsilon)
            )
        else:
            chances = torch.full(ranks.shape, self.density, dtype=torch.float64, device=delta.device)
        draws = draws_of(
            seed=self.seed,
            name=self.name,
            position=self.position,
            start=start,
            count=delta.numel(),
            device=delta.device,
        )
        return (draws < mask_limits(chances.view(-1))).view(delta.shape)

    def kept(self, start: int, count: int) -> None:
        """None: the compiled loops do not rank."""


def _ranks(bits: Tensor) -> Tensor:  # (rows, row) integers
    """The place of each element in its row by magnitude, from 0; equal ones in the order in which they stand."""
    if kernels.usable([bits]) and bits.shape[1] >= SHORT:
        return kernels.row_ranks(bits)
    order = bits.argsort(dim=-1, stable=True)
    places = torch.arange(bits.shape[-1], device=bits.device).expand(bits.shape)
    return torch.empty_like(order).scatter_(-1, order, places)
