"""Which elements of a delta stay: the sparsification of the task-vector family, one selection an expert.

A selection is a pure function of the unscaled delta and of where its elements lie in the whole tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lowmem_aim.methods.kernels import Selected
from lowmem_aim.methods.masks import SIGNED_TOP, SPAN, keep_mask, mask_keys, mask_limit

EVERYWHERE = 1 << 62


class Selection(Protocol):
    def mask(self, delta: Tensor, start: int) -> Tensor | None:
        """True where an element stays, of the delta's shape; None if all do. `start`: flat index of the first."""
        ...

    def kept(self, start: int, count: int) -> Selected | None:
        """The same for the compiled loops, for `count` elements from `start`; None where they cannot do it."""
        ...


@dataclass(frozen=True)
class Everything:
    def mask(self, delta: Tensor, start: int) -> None:
        return None

    def kept(self, start: int, count: int) -> Selected:
        return "all", (0, 0, 0, 0)


@dataclass(frozen=True)
class Share:
    """Each element with probability `density`, by the counter-based masks of `masks`."""

    density: float
    seed: int
    name: str  # of the tensor
    position: int  # of the expert

    def mask(self, delta: Tensor, start: int) -> Tensor | None:
        if self.density >= 1.0:
            return None
        return keep_mask(
            self.density,
            seed=self.seed,
            name=self.name,
            position=self.position,
            start=start,
            count=delta.numel(),
            device=delta.device,
        ).view(delta.shape)

    def kept(self, start: int, count: int) -> Selected | None:
        limit = mask_limit(self.density)
        if limit >= SIGNED_TOP:
            return "all", (0, 0, 0, 0)
        if start // SPAN != (start + count - 1) // SPAN:  # the keys change inside: once in 2^32 elements
            return None
        return "random", (start % SPAN, *mask_keys(self.seed, self.name, self.position, start // SPAN), limit)


@dataclass(frozen=True)
class Largest:
    """The magnitudes above `bits`, and those equal to it up to flat index `last_equal`."""

    bits: int  # of a float32 magnitude: they order as the magnitudes do
    last_equal: int

    def mask(self, delta: Tensor, start: int) -> Tensor | None:
        if self == ALL:
            return None
        magnitude = magnitude_bits(delta)
        keep = magnitude > self.bits
        equals = min(self._equals(start), keep.numel())
        keep.view(-1)[:equals] |= magnitude.view(-1)[:equals] == self.bits
        return keep

    def _equals(self, start: int) -> int:
        """How far into a slice equal ones still count."""
        return max(self.last_equal + 1 - start, 0)

    def kept(self, start: int, count: int) -> Selected:
        return "largest", (self.bits, self._equals(start), 0, 0)


ALL = Largest(0, EVERYWHERE)
NONE = Largest((1 << 31) - 1, -1)


@dataclass(frozen=True)
class Between:
    """What `outer` keeps but for what `inner` keeps: the magnitudes of the middle."""

    outer: Largest
    inner: Largest

    def mask(self, delta: Tensor, start: int) -> Tensor | None:
        outer, inner = self.outer.mask(delta, start), self.inner.mask(delta, start)
        if inner is None:
            return torch.zeros_like(delta, dtype=torch.bool)
        return ~inner if outer is None else outer & ~inner

    def kept(self, start: int, count: int) -> Selected:
        _, (outer, outer_equals, _, _) = self.outer.kept(start, count)
        _, (inner, inner_equals, _, _) = self.inner.kept(start, count)
        return "between", (outer, outer_equals, inner, inner_equals)


def magnitude_bits(delta: Tensor) -> Tensor:
    """|delta| as int32 that order as the magnitudes do."""
    return delta.abs().view(torch.int32)
