"""Keys and values of the tokens that come before a forward's own: transformers' caches, filled while one block runs.

In a recorded call, `PAST` stands where the block is given its cache; whoever runs the block puts a real one there.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from lowmem_aim.blocks.calls import Call

PAST = "the keys and values of the tokens before"


def can_continue(model: nn.Module) -> bool:
    """Whether all that the model passes from token to token are keys and values; states of a recurrence are more."""
    try:
        layers = no_past(model).layers
    except Exception:  # a config that no cache can be made of
        return False
    return bool(layers) and all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def no_past(model: nn.Module) -> DynamicCache:
    """A cache in which nothing is yet."""
    return DynamicCache(config=model.config)


def as_if_after(model: nn.Module, tokens: int) -> DynamicCache:
    """A cache that says it holds so many tokens: positions and masks follow from that. It has no real keys."""
    cache = no_past(model)
    nothing = torch.zeros(1, 1, tokens, 1)
    for index in range(len(cache.layers) if tokens else 0):
        cache.update(nothing, nothing, index)
    return cache


def copies(cache: Cache, rows: int) -> Cache:
    """Copy the cache of one sequence for `rows` that continue it; the original stays as it is."""
    own = copy.copy(cache)
    own.layers = [copy.copy(layer) for layer in cache.layers]  # each is given new tensors, and writes to none
    own.batch_repeat_interleave(rows)
    return own


def without_past(value: Any) -> Any:
    """Return an argument of a block, or `PAST` for its cache."""
    return PAST if isinstance(value, Cache) else value


def with_past(call: Call, cache: Cache | None) -> Call:
    """Copy a recorded call, with `cache` where it was given one."""
    return call.mapped(lambda value: cache if type(value) is str and value == PAST else value)
