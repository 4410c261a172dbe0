"""Regression on every expert's own inputs: the merged linear gives each text nearly what that text's expert gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from lowmem_aim.methods.covariance import PositiveWeights
from lowmem_aim.methods.linears import ROWS
from lowmem_aim.methods.method import Script, Subject, Within, merge_method
from lowmem_aim.methods.solved import Goal, Moments, Rest, rest_of, shares_of, solved, takes_solved_by_texts
from lowmem_aim.methods.systems import Term

Fraction = Annotated[float, Within(0.0, 1.0)]
Ridge = Annotated[float, Within(0.0)]


@merge_method(
    "regmean",
    source="arXiv 2212.09849",
    takes=takes_solved_by_texts,
    rounds=(0, 1),
    rows_of_linears=ROWS,
    texts="experts",
)
def regmean(
    tensor: Subject,
    *,
    weight: PositiveWeights = (1.0,),
    lambda_: float = 1.0,
    ridge: Ridge = 1e-4,
    shrink: Fraction = 0.9,
    rest: Rest = "average",
) -> Script:
    """W0 + lambda (sum wi Di Hi) (sum wi Hi)^-1 for each linear inside the layers, where Hi = Gi + ridge I, and
    Gi is the second moment of the inputs that expert i gives the linear on its own texts, divided by the mean of its
    diagonal, its off-diagonals times `shrink`. Everything else by `rest`: the weighted mean of the experts, or
    W0 + lambda sum wi Di.

    The ridge draws what no text decides to the mean of the experts: experts that are equal stay as they are, and a
    linear that no text has reached is the mean.
    """
    if not tensor.linear:
        return rest_of(weight, rest, lambda_)
    if tensor.moments is None:
        raise ValueError("regmean takes the moments of texts")
    return (yield from solved(tensor, _goal(weight, ridge, shrink), tensor.moments, lambda_))


@merge_method(
    "regmean_plus",
    source="arXiv 2508.03121",
    takes=takes_solved_by_texts,
    rounds=(0, 1),
    rows_of_linears=ROWS,
    texts="merged",
)
def regmean_plus(
    tensor: Subject,
    *,
    weight: PositiveWeights = (1.0,),
    lambda_: float = 1.0,
    ridge: Ridge = 1e-4,
    shrink: Fraction = 0.9,
    rest: Rest = "average",
) -> Script:
    """The formula of `regmean`, where the experts' blocks are given what the merged blocks before make of the texts."""
    return (yield from regmean(tensor, weight=weight, lambda_=lambda_, ridge=ridge, shrink=shrink, rest=rest))


def _goal(weight: tuple[float, ...], ridge: float, shrink: float) -> Callable[[Moments], Goal]:
    def goal(moments: Moments) -> Goal:
        terms: list[Term | None] = []
        for moment, w in zip(moments, weight, strict=True):
            diagonal = None if moment is None else moment.diagonal()
            mean = 0.0 if diagonal is None else float(diagonal.double().mean())
            if moment is None or diagonal is None or not mean or not w:
                terms.append(None)
            else:
                terms.append(Term(moment, w * shrink / mean, diagonal * (w * (1.0 - shrink) / mean)))
        return Goal(shares_of(weight), tuple(terms), ridge, sum(weight), to_base=False)

    return goal
