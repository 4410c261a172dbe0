"""Sums are exact whatever the order, slicing, range and size."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowmem_aim.methods.exact import CHUNK, ExactSums, exact_sum, to_float
from lowmem_aim.methods.method import Rows

FINITE = st.floats(allow_nan=False, allow_infinity=False)


@settings(deadline=None, max_examples=200)
@given(st.lists(FINITE, max_size=40))
def test_any_float64_terms_sum_exactly(terms: list[float]) -> None:
    total = exact_sum(torch.tensor(terms, dtype=torch.float64))
    assert Fraction(total, 1 << 1074) == sum(map(Fraction, terms))


def test_a_long_sum_with_a_wide_range_is_exact_across_chunks() -> None:
    generator = torch.Generator().manual_seed(0)
    small = torch.randn(CHUNK + 12345, generator=generator, dtype=torch.float64)
    terms = small * torch.exp2(torch.randint(-60, 60, small.shape, generator=generator).double())
    assert to_float(exact_sum(terms.clone())) == math.fsum(terms.tolist())
    assert exact_sum(terms.clone()) == exact_sum(terms.flip(0).clone())


def test_terms_that_float_sums_lose_are_kept() -> None:
    assert to_float(exact_sum(torch.tensor([1e300, 1.0, -1e300], dtype=torch.float64))) == 1.0


def test_a_term_that_is_not_finite_is_refused() -> None:
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="finite"):
            exact_sum(torch.tensor([1.0, bad], dtype=torch.float64))


def test_the_fold_adds_up_slices() -> None:
    fold = ExactSums(lambda rows: [exact_sum(rows.base.double()), exact_sum(rows.experts[0].double())])
    for start in range(3):
        fold.add(fold.part(Rows(torch.full((2, 2), 0.1), (torch.ones(2, 2),), start)))
    tenth = float(torch.tensor(0.1))
    assert fold.finish() == [float(12 * Fraction(tenth)), 12.0]
