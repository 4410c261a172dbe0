"""The shares of the experts' effects that a merge keeps, in all and by layer: for screen, card and lowmem_aim.json.

A share is of one tensor; those of several tensors are the mean of theirs, whose order does not matter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

DIGITS = 4  # the estimate is no more exact


@dataclass
class EffectShares:
    """The shares that tensors keep of each expert's effect, by the number of the expert and the layer ("": outside)."""

    found: dict[int, dict[str, list[float]]] = field(default_factory=dict)

    def add(self, layer: int | None, shares: Sequence[float | None]) -> None:
        """Add the shares of one tensor, of each expert; None: the expert has no effect there."""
        for expert, share in enumerate(shares):
            layers = self.found.setdefault(expert, {})
            if share is not None:
                layers.setdefault("" if layer is None else str(layer), []).append(share)

    def in_all(self, expert: int) -> float | None:
        """The share over all tensors; None if the expert has no effect in any."""
        return _mean([share for shares in self.found.get(expert, {}).values() for share in shares])

    def by_layer(self, expert: int) -> dict[str, float]:
        """The share of each layer, in their order."""
        layers = {layer: _mean(shares) for layer, shares in self.found.get(expert, {}).items() if layer}
        return {layer: share for layer in sorted(layers, key=int) if (share := layers[layer]) is not None}

    def facts(self, labels: Sequence[str]) -> list[dict[str, Any]]:
        """The shares of all experts, as lowmem_aim.json has them; `labels`: of the experts, in the recipe's order."""
        return [
            {
                "model": label,
                "kept": round(share, DIGITS),
                "layers": {layer: round(own, DIGITS) for layer, own in self.by_layer(expert).items()},
            }
            for expert, label in enumerate(labels)
            if (share := self.in_all(expert)) is not None
        ]


def _mean(shares: Sequence[float]) -> float | None:
    return math.fsum(shares) / len(shares) if shares else None
