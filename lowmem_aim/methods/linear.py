"""Weighted means of whole weights (linear), and one model's weights unchanged (passthrough)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lowmem_aim.methods import kernels
from lowmem_aim.methods.footprint import Footprint
from lowmem_aim.methods.method import Rows, Scales, Script, Subject, Weights, merge_method
from lowmem_aim.system.on_demand import torch

if TYPE_CHECKING:
    from torch import Tensor

ZERO_WEIGHT = 1e-8  # a sum of weights below this counts as 0


def weighted_sum(stored: tuple[Tensor, ...], weights: tuple[float, ...]) -> Tensor:
    """sum wi Ti in float32, added in model order; a new tensor."""
    if kernels.usable(stored):
        return kernels.weighted_sum(stored, weights)
    total = stored[0].to(torch.float32) * weights[0]
    for tensor, weight in zip(stored[1:], weights[1:], strict=True):
        total += tensor.to(torch.float32) * weight
    return total


def _check(tensor: Subject, parameters: Mapping[str, Any]) -> str:
    zero = parameters["normalize"] and abs(sum(parameters["weight"])) < ZERO_WEIGHT
    return "the weights sum to zero, and `normalize` would divide by that" if zero else ""


def takes_weighted_sum(tensor: Subject, parameters: Mapping[str, Any], loops: bool) -> Footprint:
    """The sum, and in torch a term of it and a float32 copy."""
    return Footprint(element=4 if loops else 12)


@merge_method(
    "linear",
    base="listed",
    source="model soups, arXiv 2203.05482",
    compiled=True,
    check=_check,
    takes=takes_weighted_sum,
)
def linear(tensor: Subject, *, weight: Weights, normalize: bool = True) -> Script:
    """sum wi Wi, divided by sum wi."""
    shares = tuple(w / sum(weight) for w in weight) if normalize else weight

    def combine(rows: Rows) -> Tensor:
        return weighted_sum(rows.stored_experts, shares)

    return combine
    yield  # no rounds


@merge_method("passthrough", base="listed", most=1, source="mergekit", compiled=True, takes=takes_weighted_sum)
def passthrough(tensor: Subject, *, scale: Scales = (1.0,)) -> Script:
    """W * scale."""

    def combine(rows: Rows) -> Tensor:
        return weighted_sum(rows.stored_experts, scale)

    return combine
    yield  # no rounds
