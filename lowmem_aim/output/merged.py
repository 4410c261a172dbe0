"""Carried here from merge.py."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Merged:
    """What was written and what was read, as digests; all of it follows from the inputs."""

    shards: dict[str, str] = field(default_factory=dict)  # file name -> sha256
    models: list[tuple[str, str]] = field(default_factory=list)  # label, xxh3-128 over its tensors as read, by name
    replaced: list[tuple[str, str, int]] = field(default_factory=list)  # label, tensor, elements that were not finite
    kept: dict[str, tuple[float, float]] = field(default_factory=dict)  # tensor -> sums, see `relaxation.Kept`
