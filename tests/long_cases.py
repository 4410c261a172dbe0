"""Which cases of a parametrized test wait for `make test-long`."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def others_long(cases: Iterable[Any], quick: Collection[Any]) -> list[Any]:
    """The cases as parameters, in their order; those that are not among the quick ones are marked `long`.

    A tuple has a value for each parameter.
    """
    cases = list(cases)
    assert all(case in cases for case in quick), "a quick case that is none"
    values = [case if isinstance(case, tuple) else (case,) for case in cases]
    marks = [() if case in quick else pytest.mark.long for case in cases]
    return [pytest.param(*value, marks=mark) for value, mark in zip(values, marks, strict=True)]
