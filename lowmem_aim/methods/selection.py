"""Selections of a delta's elements: the sparsification of the task-vector family, one selection for each expert.

A selection is a pure function of the unscaled delta and of the place of its elements in the whole tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from lowmem_aim.methods.kernels import Selected
from lowmem_aim.methods.masks import SIGNED_TOP, SPAN, keep_mask, mask_keys, mask_limit
from lowmem_aim.system.on_demand import torch

if TYPE_CHECKING:
    from torch import Tensor

EVERYWHERE = 1 << 62  # above every flat index


class Selection(Protocol):
    """A rule for which elements of an expert's delta stay."""

    def mask(self, delta: Tensor, start: int) -> Tensor | None:
        """True where an element stays, of the delta's shape; None if all do. `start`: flat index of the first."""
        ...

    def kept(self, start: int, count: int) -> Selected | None:
        """The selection as numbers for the compiled loops, for `count` elements from `start`.

        None if the loops cannot apply it.
        """
        ...


@dataclass(frozen=True)
class Everything:
    """The selection of all elements."""

    def mask(self, delta: Tensor, start: int) -> None:
        """None: all elements stay."""

    def kept(self, start: int, count: int) -> Selected:
        """The numbers of `all`, none of which is used."""
        return "all", (0, 0, 0, 0)


@dataclass(frozen=True)
class Share:
    """A random share: each element stays with probability `density`, by the counter-based masks of `masks`."""

    density: float
    seed: int
    name: str  # of the tensor
    position: int  # of the expert

    def mask(self, delta: Tensor, start: int) -> Tensor | None:
        """True where an element is drawn, of the delta's shape; None if all elements stay."""
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
        """The numbers of `random`; None if the keys change within the range, which happens once in 2^32 elements."""
        limit = mask_limit(self.density)
        if limit >= SIGNED_TOP:
            return "all", (0, 0, 0, 0)
        if start // SPAN != (start + count - 1) // SPAN:  # the keys change in between
            return None
        return "random", (start % SPAN, *mask_keys(self.seed, self.name, self.position, start // SPAN), limit)


@dataclass(frozen=True)
class Largest:
    """The elements whose magnitude is above `bits`, and those equal to it up to flat index `last_equal`."""

    bits: int  # of a float32 magnitude; such bits order as the magnitudes do
    last_equal: int

    def mask(self, delta: Tensor, start: int) -> Tensor | None:
        """True where the magnitude is large enough, of the delta's shape; None for `ALL`."""
        if self == ALL:
            return None
        magnitude = magnitude_bits(delta)
        keep = magnitude > self.bits
        equals = min(self._equals(start), keep.numel())
        keep.view(-1)[:equals] |= magnitude.view(-1)[:equals] == self.bits
        return keep

    def _equals(self, start: int) -> int:
        """The number of elements from the start of a slice among which equal magnitudes still count."""
        return max(self.last_equal + 1 - start, 0)

    def kept(self, start: int, count: int) -> Selected:
        """The numbers of `largest`."""
        return "largest", (self.bits, self._equals(start), 0, 0)


ALL = Largest(0, EVERYWHERE)
NONE = Largest((1 << 31) - 1, -1)


@dataclass(frozen=True)
class Between:
    """The elements that `outer` keeps and `inner` does not: the magnitudes in the middle."""

    outer: Largest
    inner: Largest

    def mask(self, delta: Tensor, start: int) -> Tensor | None:
        """True where the magnitude lies in the middle, of the delta's shape."""
        outer, inner = self.outer.mask(delta, start), self.inner.mask(delta, start)
        if inner is None:
            return torch.zeros_like(delta, dtype=torch.bool)
        return ~inner if outer is None else outer & ~inner

    def kept(self, start: int, count: int) -> Selected:
        """The numbers of `between`."""
        _, (outer, outer_equals, _, _) = self.outer.kept(start, count)
        _, (inner, inner_equals, _, _) = self.inner.kept(start, count)
        return "between", (outer, outer_equals, inner, inner_equals)


def magnitude_bits(delta: Tensor) -> Tensor:
    """|delta| of a float32 delta as int32, which order as the magnitudes do."""
    return delta.abs().view(torch.int32)
