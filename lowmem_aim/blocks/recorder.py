"""Carried here from calibrate.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowmem_aim.blocks.forwards import Broken, RecordingForward
from lowmem_aim.blocks.runner import BlockRunner, Call
from lowmem_aim.system.memory import is_allocation_failure
from lowmem_aim.system.tensor_store import Stored

# Long enough to fill attention with something, short enough to cost nothing.
CANARY_TOKENS = 32


def recorded_calls(
    runner: BlockRunner, tokens: Tensor, shared: dict[tuple[Any, ...], Stored], counted: bool
) -> tuple[list[Call], Stored]:
    """What each block is called with in one text's forward, and its first hidden state. Raises Broken."""
    tape = RecordingForward(runner, shared, [])
    try:
        with runner.watch.counting(counted):
            runner.forward(tokens, tape)
    except (TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
        if is_allocation_failure(error):
            raise
        raise Broken(f"this model's blocks cannot be left out ({type(error).__name__})") from error
    if tape.state is None or len(tape.calls) != len(runner.blocks):
        raise Broken("this model does not call its blocks once each, in order")
    return tape.calls, runner.store.put(tape.state)


def must_be_same(true: Tensor | None, recorded: Tensor | None, place: str) -> None:
    """Raises Broken where the canary's hidden state is not the recorded way's."""
    if true is None and recorded is None:
        return
    if true is None or recorded is None or (true.dtype, true.shape) != (recorded.dtype, recorded.shape):
        raise Broken(f"before {place} the hidden state is of another shape than running the blocks one by one gave")
    if not torch.allclose(true, recorded, rtol=0, atol=0, equal_nan=True):  # NaN is found, and named, elsewhere
        raise Broken(f"before {place} the hidden state is not what running the blocks one by one gave")
