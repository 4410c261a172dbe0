"""Digests and figures of what a merge has written and read, for the card and the provenance.

All of it follows from the inputs alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


class DeltaKept(NamedTuple):
    """Sums of |delta| of one tensor, before and after relaxation (see `relaxing.delta_sampler`)."""

    before: float
    after: float


class Effect(NamedTuple):
    """Sums of squares over outputs of one tensor, for one expert's own texts (see `merging.effects`)."""

    lost: float  # of what the merge lacks of the expert's effect
    whole: float  # of the expert's effect

    @property
    def kept(self) -> float | None:
        """The share of the effect that the merge keeps; None if there is no effect."""
        return 1.0 - self.lost / self.whole if self.whole else None


class Replaced(NamedTuple):
    """Elements of one tensor of a model that were NaN or Inf, and took the base's value."""

    label: str  # of the model
    tensor: str
    elements: int


@dataclass(frozen=True)
class Merged:
    """The digests and figures of one output."""

    shards: Mapping[str, str]  # file name -> sha256
    models: Sequence[tuple[str, str]] = ()  # label, xxh3-128 over its tensors as read, by name
    replaced: Sequence[Replaced] = ()
    kept: Mapping[str, DeltaKept] = field(default_factory=dict)  # tensor -> how much of its delta is left
    effects: Mapping[str, Sequence[Effect]] = field(default_factory=dict)  # tensor -> of each expert
    singular: Mapping[str, str] = field(default_factory=dict)  # tensor -> what was done where no system could be solved
