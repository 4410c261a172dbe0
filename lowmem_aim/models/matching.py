"""Tensor names that are known by another prefix: `model.layers.0.mlp.up_proj` where a file has `layers.0.mlp.up_proj`.

transformers moves modules from version to version, and checkpoints of a bare model lack its prefix; the end of a name
stays. A name belongs to the one tensor that shares the longest end with it, numbers of layers and experts included.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property

MOST_PARTS = 32  # of a name; modules are nested some ten deep
_SEVERAL = ""  # more than one tensor's name ends so


class Names:
    """The names of a checkpoint's tensors."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = frozenset(names)

    def find(self, wanted: str) -> str:
        """The tensor of that name, or the one that it must be; "" if there is none, or more than one."""
        return wanted if wanted in self._names else self.tail(wanted)

    def tail(self, wanted: str) -> str:
        """The one tensor whose name has the longest end in common with `wanted`, and the same numbers in it; or ""."""
        numbers = _numbers(wanted)
        for end in _ends(wanted):
            if _numbers(end) != numbers:
                return ""
            if (found := self._by_end.get(end)) is not None:
                return found if _numbers(found) == numbers else ""
        return ""

    @cached_property
    def _by_end(self) -> dict[str, str]:
        """End of a name -> the tensor with that end."""
        known: dict[str, str] = {}
        for name in self._names:
            for end in _ends(name):
                known[end] = _SEVERAL if end in known else name
        return known


def _ends(name: str) -> Iterator[str]:
    """Yield the name, then the name without its first component, and so on; at least `module.weight` is left."""
    parts = name.split(".")
    if len(parts) <= MOST_PARTS:  # else a name that is all dots would have millions of ends
        yield from (".".join(parts[place:]) for place in range(len(parts) - 1))


def _numbers(name: str) -> list[str]:
    return [part for part in name.split(".") if part.isdigit()]
