"""The share of the delta that AIM and ACM have left, layers by kinds of module: for the screen and the model card."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from lowmem_aim.errors import printable

BLOCKS = "▁▂▃▄▅▆▇█"
MOST_KINDS = 60  # that are shown: a model file may name thousands
_RULED = 10  # a layer in so many has its number written above it
# From the least that is left to the most: dark blue to yellow, even in lightness, so that it also reads in grey.
_RAMP = ((68, 57, 131), (59, 110, 143), (33, 149, 139), (78, 193, 107), (180, 222, 44), (253, 231, 37))


@dataclass
class DeltaSums:
    """Sums of a delta's absolute values, before and after it was relaxed."""

    before: float = 0.0
    after: float = 0.0

    def add(self, sums: tuple[float, float]) -> None:
        """Add the sums (before, after) of one tensor."""
        self.before, self.after = self.before + sums[0], self.after + sums[1]

    @property
    def share(self) -> float | None:
        """The share that is left; None if there was no delta."""
        return self.after / self.before if self.before else None


Modules = Mapping[tuple[str, str], DeltaSums]  # (layer or, outside of all, "", kind of module) -> of all its tensors


def by_module(tensors: Iterable[tuple[int | None, str, tuple[float, float]]]) -> dict[tuple[str, str], DeltaSums]:
    """The sums of each kind in each layer, from (layer, kind, sums) of each tensor, in any order."""
    parts: dict[tuple[str, str], list[DeltaSums]] = {}
    for layer, kind, sums in tensors:
        parts.setdefault(("" if layer is None else str(layer), kind), []).append(DeltaSums(*sums))
    return {module: joined(several) for module, several in parts.items()}


def joined(parts: Iterable[DeltaSums]) -> DeltaSums:
    """The sums of several parts together, exactly rounded, so that their order does not matter."""
    parts = list(parts)
    return DeltaSums(math.fsum(part.before for part in parts), math.fsum(part.after for part in parts))


def shares_by(kept: Modules, what: int) -> dict[str, float]:
    """The share left in each layer (0) or of each kind (1), in the order in which they come, without empty deltas."""
    found: dict[str, list[DeltaSums]] = {}
    for key, part in kept.items():
        found.setdefault(key[what], []).append(part)
    shares = {name: joined(parts).share for name, parts in found.items()}
    return {name: share for name, share in shares.items() if share is not None}


def inside(kept: Modules) -> Modules:
    """The modules that are in the layers."""
    return {key: part for key, part in kept.items() if key[0]}


def colour_of(place: float) -> str:
    """The colour of a place in [0, 1], as `#rrggbb`."""
    place = min(max(place, 0.0), 1.0) * (len(_RAMP) - 1)
    left = min(int(place), len(_RAMP) - 2)
    mixed = (round(a + (b - a) * (place - left)) for a, b in zip(_RAMP[left], _RAMP[left + 1], strict=True))
    return "#{:02x}{:02x}{:02x}".format(*mixed)


@dataclass(frozen=True)
class Scale:
    """The shares that the lowest and the highest block stand for: what is shown lies between, so differences show."""

    least: float = 0.0
    most: float = 1.0

    @classmethod
    def of(cls, shares: Iterable[float | None]) -> Scale:
        """The scale from the least to the most of some shares, in whole percents; from 0 to 1 if there are none."""
        known = [share for share in shares if share is not None]
        if not known:
            return cls()
        least, most = (math.floor(min(known) * 100 + 1e-9) / 100, math.ceil(max(known) * 100 - 1e-9) / 100)
        return cls(least, most) if most > least else cls(least - 0.01, most)

    def place(self, share: float) -> float:
        """The place of a share on the scale, in [0, 1]."""
        return min(max((share - self.least) / (self.most - self.least), 0.0), 1.0)

    def block(self, share: float | None) -> str:
        """A character whose height is the share's place; a dot for None."""
        return "·" if share is None else BLOCKS[min(int(self.place(share) * len(BLOCKS) + 1e-9), len(BLOCKS) - 1)]

    def colour(self, share: float) -> str:
        """The colour of the share's place."""
        return colour_of(self.place(share))

    def __str__(self) -> str:
        return f"{BLOCKS[0]} {self.least:.0%} to {BLOCKS[-1]} {self.most:.0%}"


def heat_rows(kept: Modules) -> Iterator[tuple[str, list[float | None]]]:
    """Yield (kind, share left in each layer, None where it was not relaxed); nothing for modules outside the layers."""
    layers = layers_of(kept)
    for kind in dict.fromkeys(kind for layer, kind in kept if layer):
        row = [kept[layer, kind].share if (layer, kind) in kept else None for layer in layers]
        if any(share is not None for share in row):
            yield kind, row


def scale_of(rows: Iterable[tuple[str, Sequence[float | None]]]) -> Scale:
    """The scale of a whole heat map."""
    return Scale.of(share for _, row in rows for share in row)


def layers_of(kept: Modules) -> Sequence[str]:
    """The numbers of the layers, ascending, as text."""
    return [str(number) for number in sorted({int(layer) for layer, _ in kept if layer})]


def label_of(kind: str) -> str:
    """A kind's name for pictures and maps, each of its characters one column wide in every font."""
    return printable(kind.encode("ascii", "backslashreplace").decode(), 40)


def block_map(kept: Modules) -> Iterator[str]:
    """Yield the heat map as lines of text: layers' numbers, each kind with its blocks and total share, the scale."""
    rows, over_all = list(heat_rows(kept)), shares_by(inside(kept), 1)
    shown = rows[:MOST_KINDS]
    width = max((len(label_of(kind)) for kind, _ in shown), default=0)
    ruler = _ruler(layers_of(kept))
    scale = scale_of(rows)
    yield f"{'':<{width}}  {ruler}  all"
    for kind, row in shown:
        blocks = "".join(map(scale.block, row))
        yield f"{label_of(kind):<{width}}  {blocks:<{len(ruler)}}  {over_all[kind]:.0%}"
    if len(rows) > len(shown):
        yield f"and {len(rows) - len(shown)} more kinds"
    yield f"scale: {scale}"


def _ruler(layers: Sequence[str]) -> str:
    text = ""
    for column in range(0, len(layers), _RULED):
        text = text.ljust(column) + layers[column]
    return text.ljust(len(layers))
