"""Which cases of a parametrized test wait for `make test-long`."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def others_long(cases: Iterable[Any], quick: Collection[Any]) -> list[Any]:
    """The cases as parameters, in their order; those that are not among the quick ones are marked `long`."""
    cases = list(cases)
    assert all(case in cases for case in quick), "a quick case that is none"
    return [case if case in quick else pytest.param(case, marks=pytest.mark.long) for case in cases]
