"""How much of the delta AIM and ACM have left, layers by kinds of module: for the screen, and for the model card."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from lowmem_aim.progress import Kept

BLOCKS = "▁▂▃▄▅▆▇█"
# From nothing left to all of it: dark blue to yellow, even in lightness, so that it also reads in grey.
_RAMP = ((68, 57, 131), (59, 110, 143), (33, 149, 139), (78, 193, 107), (180, 222, 44), (253, 231, 37))


def colour_of(share: float) -> str:
    """The colour of a share in [0, 1], as `#rrggbb`."""
    place = min(max(share, 0.0), 1.0) * (len(_RAMP) - 1)
    left = min(int(place), len(_RAMP) - 2)
    mixed = (round(a + (b - a) * (place - left)) for a, b in zip(_RAMP[left], _RAMP[left + 1], strict=True))
    return "#{:02x}{:02x}{:02x}".format(*mixed)


def block_of(share: float | None) -> str:
    """A character whose height is the share; a dot where there is none."""
    return "·" if share is None else BLOCKS[min(int(share * len(BLOCKS)), len(BLOCKS) - 1)]


def heat_rows(kept: Mapping[tuple[str, str], Kept]) -> Iterator[tuple[str, list[float | None]]]:
    """(kind, share left in each layer, None where it was not relaxed); outside the layers nothing."""
    layers = layers_of(kept)
    for kind in dict.fromkeys(kind for layer, kind in kept if layer):
        row = [kept[layer, kind].share if (layer, kind) in kept else None for layer in layers]
        if any(share is not None for share in row):
            yield kind, row


def layers_of(kept: Mapping[tuple[str, str], Kept]) -> Sequence[str]:
    return [str(number) for number in sorted({int(layer) for layer, _ in kept if layer})]
