"""Carried here from checkpoint.py, memory.py."""

from __future__ import annotations

import math
import mmap

import torch
import xxhash
from torch import Tensor

from lowmem_aim.units import shown


def digest(data: Tensor) -> str:
    """xxh3-128 of a contiguous CPU tensor's bytes, in hex: an identity check, no protection against forgery."""
    return xxhash.xxh3_128_hexdigest(raw(data))


def raw(data: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    return data.detach().reshape(-1).view(torch.uint8).numpy().data


_APART_BYTES = 1 << 20  # smaller ones leave smaller holes


def empty_apart(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """torch.empty in pages of its own, which go back to the system with it.

    For weights that come and go between a forward's small tensors: the heap would have holes where they were.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < _APART_BYTES:
        return torch.empty(shape, dtype=dtype)
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    try:
        pages = mmap.mmap(-1, nbytes, **private)
    except OSError as error:
        raise MemoryError(f"no room for {shown(nbytes)}") from error
    return torch.frombuffer(pages, dtype=dtype).view(shape)
