"""Tensors as bytes: their digest, a view of their bytes, and memory for large ones outside the heap."""

from __future__ import annotations

import math
import mmap
from collections.abc import Mapping
from typing import TYPE_CHECKING

import xxhash

from lowmem_aim.system.on_demand import torch
from lowmem_aim.units import shown

if TYPE_CHECKING:
    from torch import Tensor

_APART_BYTES = 1 << 20  # smaller tensors leave only small holes in the heap


def digest(data: Tensor) -> str:
    """xxh3-128 of a contiguous CPU tensor's bytes, as 32 hex digits.

    An identity check, no protection against forgery.
    """
    return xxhash.xxh3_128_hexdigest(raw(data))


def digest_of_digests(tensors: Mapping[str, str]) -> str:
    """xxh3-128 over the digests of a model's tensors, given by name, as 32 hex digits."""
    text = "".join(f"{name}\0{value}\n" for name, value in sorted(tensors.items()))
    return xxhash.xxh3_128_hexdigest(text.encode("utf-8", "surrogatepass"))


def raw(data: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    return data.detach().reshape(-1).view(torch.uint8).numpy().data


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype as recipes and configs write it: `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def dtype_named(name: str) -> torch.dtype:
    """The dtype of that name; AttributeError for a name that torch does not know."""
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def empty_apart(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialised CPU tensor in pages of its own, which go back to the system with it. Raises MemoryError.

    Weights come and go between a forward's small tensors: on the heap they would leave holes. Tensors of less than
    1 MiB are taken from the heap all the same.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < _APART_BYTES:
        return torch.empty(shape, dtype=dtype)
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    try:
        pages = mmap.mmap(-1, nbytes, **private)
    except OSError as error:
        raise MemoryError(f"no memory for {shown(nbytes)}") from error
    return torch.frombuffer(pages, dtype=dtype).view(shape)
