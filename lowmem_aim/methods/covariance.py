"""Merging by the covariance of the deltas: solved, and no text is needed."""

from __future__ import annotations

from typing import Annotated

from lowmem_aim.methods.linears import ROWS
from lowmem_aim.methods.method import PerExpert, Script, Subject, Within, merge_method
from lowmem_aim.methods.solved import Goal, Moments, Rest, rest_of, shares_of, solved, takes_solved
from lowmem_aim.methods.systems import Term

PositiveWeights = Annotated[tuple[float, ...], PerExpert(0.0)]


@merge_method(
    "covariance",
    source="arXiv 2503.08099 (its objective), 2604.01329",
    takes=takes_solved,
    rounds=(0, 1),
    rows_of_linears=ROWS,
)
def covariance(
    tensor: Subject,
    *,
    weight: PositiveWeights = (1.0,),
    lambda_: float = 1.0,
    ridge: Annotated[float, Within(0.0)] = 1e-2,
    rest: Rest = "average",
) -> Script:
    """W0 + lambda (sum ai Di Ci) (sum ai Ci + ridge mu I)^-1 for each linear inside the layers, where Ci = Di^T Di,
    ai = wi / |Di|^2, and mu is the mean of the diagonal of sum ai Ci. Everything else by `rest`: the weighted mean of
    the experts, or W0 + lambda sum wi Di.

    An expert's delta is itself the sum of what its training has fed it: inputs that it was trained on span its rows.
    """
    if not tensor.linear:
        return rest_of(weight, rest, lambda_)

    def goal(moments: Moments) -> Goal:
        squares = [float(moment.diagonal().double().sum()) if moment else 0.0 for moment in moments]
        weights = [w if square else 0.0 for w, square in zip(weight, squares, strict=True)]
        terms = [
            Term(moment, w / square) if moment and w else None
            for moment, w, square in zip(moments, weights, squares, strict=True)
        ]
        mu = sum(weights) / max(tensor.shape[tensor.input_dim], 1)
        return Goal(shares_of(weights), tuple(terms), ridge, mu, to_base=True)

    return (yield from solved(tensor, goal, None, lambda_))
