"""Random masks from a counter: each element's draw is a hash of (seed, tensor, model, flat index) and of nothing else.

A slice therefore draws what the whole tensor would, a resumed run what the first would, and a GPU what the CPU would:
all of it is integer arithmetic modulo 2^32. The hash is two rounds of a 32-bit finaliser (xor-shift and multiply;
constants of the `lowbias32` mixer found by C. Wellons' hash prospector) with a fresh key before each; one round alone
would make the masks of two models shuffles of each other.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from lowmem_aim.system.on_demand import torch

if TYPE_CHECKING:
    from torch import Tensor


NO_EXPERT = -1  # the position of draws that belong to no expert
SPAN = 1 << 32  # the counter's low word; its high word goes into the keys
SIGNED_TOP = SPAN >> 1  # draws are signed: [-2^31, 2^31)


def keep_mask(
    density: float, *, seed: int, name: str, position: int, start: int, count: int, device: torch.device
) -> Tensor:  # (count,) bool
    """True with probability `density` (to 2^-32) for the elements start ... start + count - 1 of tensor `name`.

    `position` is the number of the expert, from 0; the base has none.
    """
    limit = mask_limit(density)
    if limit >= SIGNED_TOP:
        return torch.ones(count, dtype=torch.bool, device=device)
    return draws_of(seed=seed, name=name, position=position, start=start, count=count, device=device) < limit


def draws_of(*, seed: int, name: str, position: int, start: int, count: int, device: torch.device) -> Tensor:
    """(count,) int32 uniform draws for the elements start ... start + count - 1; arguments as in `keep_mask`.

    `position` may also be NO_EXPERT.
    """
    parts = []
    while count > 0:  # a piece ends where the counter's low word wraps
        low = start % SPAN
        length = min(count, SPAN - low)
        parts.append(_draws(low, length, mask_keys(seed, name, position, start // SPAN), device))
        start, count = start + length, count - length
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def mask_limit(density: float) -> int:
    """The limit below which a draw lies with probability `density`, to 2^-32."""
    return round(density * SPAN) - SIGNED_TOP


def mask_limits(chances: Tensor) -> Tensor:  # int64
    """`mask_limit` of each float64 probability in `chances`, which is overwritten."""
    return chances.mul_(float(SPAN)).round_().to(torch.int64).sub_(SIGNED_TOP)


def mask_keys(seed: int, name: str, position: int, high: int) -> tuple[int, int]:
    """The two keys of a model's draws for one tensor; `high` is the counter's upper word."""
    message = f"lowmem-aim mask 1\0{seed}\0{position}\0{high}\0{name}"
    words = hashlib.blake2b(message.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(words[:4], "little", signed=True), int.from_bytes(words[4:], "little", signed=True)


def _draws(low: int, length: int, keys: tuple[int, int], device: torch.device) -> Tensor:  # (length,) int32
    """Uniform signed 32-bit numbers for the counters low ... low + length - 1."""
    x = torch.arange(length, dtype=torch.int32, device=device)
    x += _signed(low)
    x ^= keys[0]
    x = _mix(x)
    x += keys[1]
    return _mix(x)


def _mix(x: Tensor) -> Tensor:
    """Mix 32-bit integers by a bijection in which every input bit flips every output bit half the time. In place."""
    for shift, multiplier in ((16, 0x7FEB352D), (15, _signed(0x846CA68B)), (16, 1)):
        x ^= (x >> shift).bitwise_and_((1 << (32 - shift)) - 1)  # torch shifts the sign in; the mask takes it out
        if multiplier != 1:
            x *= multiplier
    return x


def _signed(word: int) -> int:
    """A 32-bit word as the int32 of the same bits."""
    return (word + (1 << 31)) % SPAN - (1 << 31)
