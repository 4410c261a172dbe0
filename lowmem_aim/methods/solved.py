"""Solved deltas: the delta X of a linear that is nearest to what every expert does with its inputs.

X minimises sum ci |(X - Di) Mi^(1/2)|^2 + r |X - A|^2, where Mi is the second moment of expert i's inputs, and A is
what the ridge r pulls to: 0 (the base), or the experts' mean. From any delta Y the minimum is one step away:

    X = Y + (sum ci (Di - Y) Mi + r (A - Y)) (sum ci Mi + r I)^-1

Starting with the mean, the step is zero where the experts agree, and its error is relative to what they disagree in.
Rows of X follow from the same rows of Di, once the matrices are there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

from lowmem_aim.errors import printable
from lowmem_aim.methods.footprint import FLOAT, Footprint
from lowmem_aim.methods.linears import ROWS, DeltaMoments, Gathered, Linears, deltas_of
from lowmem_aim.methods.method import Combine, OneOf, Rows, Script, Subject
from lowmem_aim.methods.moments import TILE, MatrixSpace, Moment, moment_bytes
from lowmem_aim.methods.systems import NotPositive, System, Term
from lowmem_aim.methods.task_vectors import span, takes_deltas
from lowmem_aim.system.on_demand import torch

if TYPE_CHECKING:
    from torch import Tensor

LEAST_RIDGE = 1e-7  # a tenth of the first that takes the place of none
# Tiles in work at a time: as they are read, what is made of them, and what is kept of that.
TILES_OF_ROWS, TILES_OF_FACTOR = 3, 6
RAISES = 3  # of the ridge, tenfold each, before the mean is taken instead
Rest = Annotated[str, OneOf(("average", "task_arithmetic"))]
# The moments of a matrix, one for each expert; None where no text has reached it.
Moments = Sequence[Moment | None]


@dataclass(frozen=True)
class Goal:
    """The system of one matrix, given each expert's moment."""

    shares: tuple[float, ...]  # of each expert in the mean: they add up to 1, or are all 0
    terms: tuple[Term | None, ...]  # ci Mi of each expert
    ridge: float  # in units of `unit`: r is ridge times unit
    unit: float  # the mean of the diagonal of sum ci Mi
    to_base: bool  # the ridge pulls to the base; else to the mean


class Solution:
    """The solution for one matrix, row by row; the mean where the system cannot be solved."""

    _system: System | None

    def __init__(self, goal: Goal, space: MatrixSpace, name: str) -> None:
        """Factorise the system, with a larger ridge if it is singular. `name`: of the tensor, for the notice."""
        self._goal, self._system = goal, None
        terms = [term for term in goal.terms if term is not None]
        ridges = [goal.ridge, *((goal.ridge or LEAST_RIDGE) * 10.0**power for power in range(1, RAISES + 1))]
        for ridge in ridges if terms else ():
            self._goal = replace(goal, ridge=ridge)
            self._system = _factorised(terms, ridge * goal.unit, space)
            if self._system is not None:
                break
        if terms and (self._system is None or self._goal.ridge > goal.ridge):
            done = "averaged" if self._system is None else f"solved with a ridge of {self._goal.ridge:g}"
            space.singular[name] = done
            space.tell(f"`{printable(name)}` is {done}: its system is singular")

    def of(self, deltas: Sequence[Tensor]) -> Tensor:
        """The solved delta for the same rows of each expert's delta, (rows, inputs) float32 on the device."""
        mean = torch.zeros_like(deltas[0])
        for share, delta in zip(self._goal.shares, deltas, strict=True):
            mean += delta * share
        if self._system is None:
            return mean
        pull = mean * (-self._goal.ridge * self._goal.unit) if self._goal.to_base else torch.zeros_like(mean)
        for term, delta in zip(self._goal.terms, deltas, strict=True):
            if term is not None:
                term.times(delta - mean, pull)
        return mean.add_(self._system.solve(pull))


def _factorised(terms: Sequence[Term], ridge: float, space: MatrixSpace) -> System | None:
    """The system of these terms; None if it is singular."""
    try:
        return System(terms, ridge, space)
    except NotPositive:
        return None


def solved(
    tensor: Subject, goal: Callable[[Moments], Goal], moments: Sequence[Moments] | None, lambda_: float
) -> Script:
    """W0 + lambda X of every linear in the tensor. `moments`: of each linear; None: those of the deltas' own rows."""
    assert tensor.space is not None
    linears, space = Linears.of(tensor), tensor.space
    if linears.transposed:
        gathered = yield Gathered(linears, tensor.experts, space)
        found = [gathered.moments(number) for number in range(linears.count)] if moments is None else moments
        answers = gathered.solved([Solution(goal(one), space, tensor.name).of for one in found])
    else:
        found = (yield DeltaMoments(linears, tensor.experts, space)) if moments is None else moments
        solutions = [Solution(goal(one), space, tensor.name) for one in found]

        def answers(rows: Rows, number: int, first: int) -> Tensor:
            return solutions[number].of(deltas_of(rows))

    space.settle()

    def combine(rows: Rows) -> Tensor:
        delta: Tensor = answers(rows, *linears.place(rows))
        return delta.mul_(lambda_).add_(rows.base)

    return combine


def rest_of(weight: Sequence[float], rest: str, lambda_: float) -> Combine:
    """The combine of what is no linear: the weighted mean of the experts, or task arithmetic."""
    shares = shares_of(weight) if rest == "average" else tuple(w * lambda_ for w in weight)
    return span(shares, based=True)


def shares_of(weight: Sequence[float]) -> tuple[float, ...]:
    """The weights divided by their sum; all 0 if that is 0."""
    total = sum(weight)
    return tuple(w / total if total else 0.0 for w in weight)


# --- memory -----------------------------------------------------------------------------------------------------------


def takes_solved(tensor: Subject, parameters: Mapping[str, Any], loops: bool) -> Footprint:
    """The memory of `solved` with moments of its own: deltas and their like for each element, tiles, and matrices."""
    return _takes(tensor, parameters, loops, moments=tensor.experts)


def takes_solved_by_texts(tensor: Subject, parameters: Mapping[str, Any], loops: bool) -> Footprint:
    """The memory of `solved` with moments that are there."""
    return _takes(tensor, parameters, loops, moments=0)


def _takes(tensor: Subject, parameters: Mapping[str, Any], loops: bool, moments: int) -> Footprint:
    if not tensor.linear:
        return takes_deltas(tensor, parameters, loops)
    linears, experts = Linears.of(tensor), tensor.experts
    # All deltas, and while the mean is improved: the mean, the step, a difference, and two multiples of that.
    element = (experts + 5) * FLOAT
    tile = FLOAT * TILE * min(TILE, linears.inputs)
    by_outputs = element * min(ROWS, linears.columns) * linears.inputs if linears.transposed else 0
    added = 3 * FLOAT * min(ROWS, linears.height) * linears.columns if moments else 0  # a base, an expert, its delta
    kept = (experts + 1) * FLOAT * linears.height * linears.columns if linears.transposed else 0
    return Footprint(
        element=element,
        slice=TILES_OF_ROWS * tile,
        tensor=max(TILES_OF_FACTOR * tile, TILES_OF_ROWS * tile + max(by_outputs, added)),
        matrices=linears.count * ((moments + 1) * moment_bytes(linears.inputs) + kept),
    )


def operations(tensor: Subject, *, tokens: int) -> float:
    """Floating-point operations of solving a tensor; `tokens`: of all texts, or 0 where moments are of the deltas."""
    if not tensor.linear:
        return 0.0
    linears, experts = Linears.of(tensor), tensor.experts
    inputs, outputs = float(linears.inputs), tensor.numel / max(linears.count * linears.inputs, 1)
    moments = tokens / linears.count if tokens else experts * outputs  # half of each is computed; tokens are routed
    solving = inputs / 3 + 2 * (experts + 1) * outputs
    return linears.count * (moments + solving) * inputs**2
