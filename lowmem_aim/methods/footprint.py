"""The memory that a method takes beside the rows it is given: methods declare it, merges divide a budget by it.

A declaration stands beside its method and follows from shapes alone, so that it is known before any work. It is an
upper bound: a test runs every method and compares.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

FLOAT = 4  # bytes of the float32 that methods compute in
DOUBLE = 8


@dataclass(frozen=True)
class Footprint:
    """Bytes that merging one tensor takes, besides the rows of the models as they are stored."""

    element: int = 0  # temporaries for each element of a slice in work, the merged float32 among them
    slice: int = 0  # temporaries for each slice in work, however few rows it has
    part: int = 0  # what a round measures of a slice, from then on until it is added to the others
    tensor: int = 0  # what is held from slice to slice, and what the end of a round takes
    matrices: int = 0  # large ones, held from slice to slice: they may lie in a file

    def __or__(self, other: Footprint) -> Footprint:
        """The footprint of two steps that follow each other."""
        return Footprint(
            max(self.element, other.element),
            max(self.slice, other.slice),
            max(self.part, other.part),
            max(self.tensor, other.tensor),
            max(self.matrices, other.matrices),
        )

    def __add__(self, other: Footprint) -> Footprint:
        """The footprint of two methods that take turns at each slice: both hold what they hold."""
        return Footprint(
            max(self.element, other.element),
            max(self.slice, other.slice),
            self.part + other.part,
            self.tensor + other.tensor,
            self.matrices + other.matrices,
        )


def by_default(shape: Sequence[int], experts: int, rounds: int) -> Footprint:
    """The footprint of a method that declares none, of another package perhaps.

    It is given a dozen float32 temporaries for each model; and if it makes rounds, float64 numbers for each row and
    each column of each model, and 16 MB a model for tables.
    """
    models = experts + 1
    element = 12 * FLOAT * models + 32
    if not rounds:
        return Footprint(element)
    columns = shape[-1] if shape else 1
    rows = -(-_product(shape) // max(columns, 1))
    lines = 2 * DOUBLE * models * (rows + columns)
    return Footprint(element, part=DOUBLE * models * columns + (1 << 20), tensor=lines + models * (16 << 20))


def _product(shape: Sequence[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product
