"""Random masks depend on (seed, tensor, model, element) alone, and are random."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowmem_aim.methods.masks import keep_mask


def mask(density: float, start: int = 0, count: int = 1 << 18, **key: object) -> Tensor:
    full = {"seed": 0, "name": "a.weight", "position": 0} | key
    return keep_mask(density, start=start, count=count, device=torch.device("cpu"), **full)  # type: ignore[arg-type]


@pytest.mark.parametrize("density", [0.01, 0.3, 0.5, 0.9])
def test_the_kept_share_is_the_density(density: float) -> None:
    share = float(mask(density).float().mean())
    assert abs(share - density) < 4 * (density * (1 - density) / (1 << 18)) ** 0.5


@pytest.mark.parametrize("other", [{"seed": 1}, {"name": "b.weight"}, {"position": 1}, {"start": 1 << 32}])
def test_masks_of_other_keys_are_independent(other: dict[str, object]) -> None:
    both = (mask(0.5) & mask(0.5, **other)).float().mean()  # type: ignore[arg-type]
    assert abs(float(both) - 0.25) < 4 * (0.25 * 0.75 / (1 << 18)) ** 0.5


@pytest.mark.parametrize("lag", [1, 2, 64, 4096])
def test_neighbours_are_independent(lag: int) -> None:
    drawn = mask(0.5).float() - 0.5
    correlation = float((drawn[:-lag] * drawn[lag:]).mean() / 0.25)
    assert abs(correlation) < 4 / (1 << 9)


def test_pieces_draw_what_the_whole_draws_also_across_the_low_words_end() -> None:
    start = (1 << 32) - 50
    whole = mask(0.3, start, 100)
    assert torch.equal(whole, torch.cat([mask(0.3, start + i, 10) for i in range(0, 100, 10)]))
    assert 0 < int(whole[50:].sum()) < 50


def test_the_ends_of_density() -> None:
    assert mask(1.0).all()
    assert not mask(0.0).any()


def test_the_draws_are_pinned() -> None:
    """These bits are part of what a merge promises: whoever changes them changes every user's digests."""
    assert mask(0.5, count=16).int().tolist() == PINNED


PINNED = [0, 1, 1, 1, 1, 1, 0, 0, 1, 0, 1, 1, 0, 0, 0, 0]
