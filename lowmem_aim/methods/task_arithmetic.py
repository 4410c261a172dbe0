"""Task arithmetic: the weighted sum of the deltas; and the same with weights that are solved from texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from lowmem_aim.methods.footprint import FLOAT, Footprint
from lowmem_aim.methods.linears import ROWS
from lowmem_aim.methods.method import PerExpert, Script, Subject, merge_method
from lowmem_aim.methods.moments import TILE
from lowmem_aim.methods.output_space import solved_coefficients
from lowmem_aim.methods.selection import Everything
from lowmem_aim.methods.task_vectors import combine_deltas, takes_deltas

SOLVED = "solved"
NumbersOrSolved = Annotated[tuple[float | str, ...], PerExpert(words=(SOLVED,))]


def _takes(tensor: Subject, parameters: Mapping[str, Any], loops: bool) -> Footprint:
    plain = takes_deltas(tensor, parameters, loops)
    if not tensor.linear or SOLVED not in parameters["weight"]:
        return plain
    deltas = FLOAT * (tensor.experts + 3)
    tiles = 2 * FLOAT * TILE * min(TILE, max(tensor.shape[-2:]))
    part = 0 if tensor.input_dim == -1 else deltas * ROWS * tensor.shape[-1]
    matrices = 0 if tensor.input_dim == -1 else FLOAT * tensor.experts * tensor.numel
    return plain | Footprint(element=deltas, slice=tiles, part=part, tensor=tiles, matrices=matrices)


def _check(tensor: Subject, parameters: Mapping[str, Any]) -> str:
    solved = [weight == SOLVED for weight in parameters["weight"]]
    if any(solved) and not all(solved):
        return "`weight` must be `solved` for all models of a tensor, or for none"
    if any(solved) and parameters["normalize"]:
        return "`normalize` has no meaning for weights that are `solved`"
    return ""


@merge_method(
    "task_arithmetic",
    source="arXiv 2212.04089; solved weights 2605.29101",
    compiled=True,
    takes=_takes,
    rounds=(0, 1),
    check=_check,
)
def task_arithmetic(
    tensor: Subject, *, weight: NumbersOrSolved, normalize: bool = False, lambda_: float = 1.0
) -> Script:
    """W0 + lambda sum wi Di. Weights that are `solved` are, for each linear, those that come nearest to what every
    expert gives on its own texts; elsewhere 1/K.
    """
    if SOLVED in weight:
        weight = yield from solved_coefficients(tensor)
    everything, unscaled = (Everything(),) * tensor.experts, (1.0,) * tensor.experts
    numbers = [float(w) for w in weight]
    return combine_deltas(everything, numbers, unscaled, normalize=normalize, lambda_=lambda_, elect=False)
