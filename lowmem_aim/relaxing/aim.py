"""AIM, Activation-Informed Merging (arXiv 2502.02421, NeurIPS 2025): the delta shrinks by input channel.

The more active an input channel of the base model is, the less of the merged delta the channel takes:

    W = W0 + (Wm - W0) * (1 - s_j),    s_j = f(a_j / max_k a_k) * (1 - omega)

a_j is the mean |x_j| over the calibration tokens, the maximum is over the module's channels. f is the identity unless
another scaling is asked for (the paper allows for one that is not linear): the square root relaxes all but the least
active channels, the square only few, and `rank` spreads them evenly, whatever their activations' distribution.

An omega of 1 changes nothing, an omega of 0 freezes the most active channel at the base; both hold to the bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowmem_aim.methods import kernels
from lowmem_aim.system.on_demand import torch

if TYPE_CHECKING:
    from torch import Tensor

FEW_COLUMNS = 256  # over rows of fewer columns, a compiled loop has nothing to be fast with


def shrinkage(
    means: Tensor,  # (1, in), (in, 1), (n,), (experts, 1, in) or (experts, in, 1) float32, see `activations`
    omega: float,
    scaling: str = "identity",  # one of SCALINGS
) -> Tensor:  # the same shape, float32 in [0, 1 - omega]
    """s of the formula for each channel; 0 in a module whose statistics are all zero. Each fused expert is a module."""
    return (shares_of(means, scaling) * (1.0 - omega)).to(torch.float32)


def shares_of(means: Tensor, scaling: str) -> Tensor:  # the same shape, float64 in [0, 1]
    """f(a_j / max_k a_k) of each channel: 1 for the most active of a module; 0 where all statistics are zero."""
    means = means.to(torch.float64)  # so that s is rounded once, at the end
    inner = tuple(range(1, means.ndim)) if means.ndim == 3 else tuple(range(means.ndim))
    top = means.amax(dim=inner, keepdim=True)
    return torch.where(top == 0.0, 0.0, _SCALINGS[scaling](means / top.masked_fill(top == 0.0, 1.0)))


def by_module(channels: Tensor) -> Tensor:  # (modules, channels of one)
    """A number of each channel, shaped as `means` of `shrinkage`, with a row for each module."""
    return channels.reshape(channels.shape[0] if channels.ndim == 3 else 1, -1)


def _rank(shares: Tensor) -> Tensor:
    """The place of each channel within its module, from 0 to 1; equal values keep the order in which they stand."""
    modules = by_module(shares)
    order = modules.argsort(dim=-1, stable=True)
    last = modules.shape[-1] - 1
    places = torch.linspace(0, last, last + 1, dtype=torch.float64) / last if last else torch.ones(1)
    return torch.empty_like(modules).scatter_(-1, order, places.to(modules).expand(modules.shape)).reshape(shares.shape)


_SCALINGS = {"identity": lambda x: x, "sqrt": lambda x: x.sqrt(), "square": lambda x: x.square(), "rank": _rank}


def shrinkage_rows(
    shrink: Tensor,  # of a whole weight, broadcastable against `shape`
    shape: tuple[int, ...],
    start: int,
    stop: int,
) -> Tensor:  # (1 or stop - start, 1 or columns)
    """The part of `shrink` that applies to rows start:stop of the weight seen as rows (`headers.matrix_shape`)."""
    if len(shape) < 2:
        return shrink.reshape(-1, 1)[start:stop]
    by_row = shrink.reshape(-1, shrink.shape[-1])
    if by_row.shape[0] == 1:
        return by_row
    if shrink.ndim > len(shape):  # experts one after another in a matrix: (experts * rows, columns)
        shape = (shrink.shape[0], shape[0] // shrink.shape[0], *shape[1:])
    # Which row of `shrink` each row of the weight takes: leading dimensions of length 1 are broadcast.
    row = torch.arange(by_row.shape[0]).reshape(shrink.shape[:-1]).expand(shape[:-1]).reshape(-1)
    return by_row[row[start:stop].to(by_row.device)]


def relax(
    merged: Tensor,  # (rows, columns) float32; overwritten
    base: Tensor,  # (rows, columns), in any float dtype
    shrink: Tensor,  # broadcastable against them, float32 in [0, 1]
) -> Tensor:  # (rows, columns) float32
    """W0 + (Wm - W0)(1 - s), computed from the nearer end, so that s = 0 gives Wm and s = 1 gives W0 exactly."""
    if kernels.usable([merged]) and merged.is_contiguous():
        by_column = shrink.shape == (1, merged.shape[1]) and merged.shape[1] >= FEW_COLUMNS
        return kernels.relax(merged, base, shrink if by_column else shrink.expand(merged.shape).contiguous())
    base = base.to(torch.float32)
    from_base = shrink > 0.5
    delta = merged - base
    delta *= torch.where(from_base, 1.0 - shrink, -shrink)
    return delta.add_(torch.where(from_base, base, merged))
