"""Controls, for judging AIM: other factors in the place of AIM's, that take back as much of a tensor's delta.

With a_j the share of channel j that AIM goes by (1 for the most active channel of a module), AIM's factor is
1 - a_j (1 - omega), and that of

    uniform     1 - mean(a) (1 - omega)        for every channel
    permuted    1 - a_p(j) (1 - omega)         p: a random order of the channels
    inverted    1 - c (1 - a_j)                c such that the mean factor is AIM's; at most 1

Means are over the channels of a module; each fused expert is one. The order is drawn from the control's seed and the
tensor's name alone. A module with statistics of zero is left alone, as AIM leaves it, and an omega of 1 changes
nothing. Where the least active channels of `inverted` cannot take back enough, even at c = 1, the mean is not reached:
see `falls_short`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lowmem_aim.methods.masks import NO_EXPERT, draws_of
from lowmem_aim.recipe.recipe import Aim
from lowmem_aim.recipe.words import PERMUTED
from lowmem_aim.relaxing.aim import by_module, shares_of
from lowmem_aim.system.on_demand import torch

if TYPE_CHECKING:
    from torch import Tensor


def controlled(
    means: Tensor,  # as for `aim.shrinkage`
    omega: float,
    aim: Aim,  # whose `control` is one of CONTROLS
    name: str,  # of the output's tensor
) -> Tensor:  # the same shape, float32 in [0, 1]
    """1 - the control's factor of each channel, in place of AIM's `shrinkage`."""
    shares = by_module(shares_of(means, aim.scaling))
    if aim.control == "inverted":
        shrink = (1.0 - shares) * _strengths(shares, omega).clamp(max=1.0)
    else:
        replaced = _permuted(shares, aim.control_seed, name) if aim.control == PERMUTED else _uniform(shares)
        shrink = replaced * (1.0 - omega)
    return shrink.to(torch.float32).reshape(means.shape)


def falls_short(means: Tensor, omega: float, aim: Aim) -> bool:
    """Whether the control takes back less than AIM in some module: `inverted` is not to freeze more than a channel."""
    if aim.control != "inverted":
        return False
    return bool((_strengths(by_module(shares_of(means, aim.scaling)), omega) > 1.0).any())


def _uniform(shares: Tensor) -> Tensor:
    return _means(shares).expand(shares.shape)


def _permuted(shares: Tensor, seed: int, name: str) -> Tensor:
    draws = draws_of(
        seed=seed, name=name, position=NO_EXPERT, start=0, count=shares.numel(), device=torch.device("cpu")
    )
    return shares.gather(1, draws.reshape(shares.shape).argsort(dim=1, stable=True))


def _strengths(shares: Tensor, omega: float) -> Tensor:  # (modules, 1)
    """c of the formula for each module, also beyond 1."""
    taken = _means(shares) * (1.0 - omega)
    return torch.where(taken == 0.0, 0.0, taken / _means(1.0 - shares))


def _means(rows: Tensor) -> Tensor:  # (modules, 1) float64
    """The mean of each row, of a sum that is exactly rounded: torch's depends on the number of threads."""
    return torch.tensor([[math.fsum(row.tolist()) / len(row)] for row in rows], dtype=torch.float64)
