"""The recorder: each block's arguments, recorded in one cheap forward, and the canary that checks the result.

Blocks can be run one at a time only if a model does nothing between them but pass the hidden state on. The recorder
assumes this; the canary, one short sequence in an ordinary forward that is suspended at each block, shows whether it
holds for the model at hand.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowmem_aim.blocks.calls import Call, ForwardFailed
from lowmem_aim.blocks.forwards import Broken, RecordingForward
from lowmem_aim.blocks.runner import BlockRunner
from lowmem_aim.system.tensor_store import Stored

# Long enough for attention to have something to work on, short enough to cost next to nothing.
CANARY_TOKENS = 32


def recorded_calls(
    runner: BlockRunner,
    tokens: Tensor,
    shared: dict[tuple[Any, ...], Stored],
    counted: bool,
    past: int | None = None,
) -> tuple[list[Call], Stored]:
    """Return what each block is called with in one text's forward, and the hidden state that the first block is given.

    `tokens`: int64, (tokens,) or (rows, tokens); `past` as in `BlockRunner.forward`. `shared` collects masks and rotary
    tables, which several texts' calls have in common. The inputs of modules before the first block count if `counted`.
    Raises Broken if the model's blocks cannot be left out, or are not called once each, in order.
    """
    forward = RecordingForward(runner, shared, [])
    try:
        with runner.watch.counting(counted):
            runner.forward(tokens, forward, past)
    except ForwardFailed as error:
        raise Broken(f"this model's blocks cannot be left out ({error})") from error
    if forward.state is None or len(forward.calls) != len(runner.blocks):
        raise Broken("this model does not call its blocks once each, in order")
    return forward.calls, runner.store.put(forward.state)


def must_be_same(true: Tensor | None, recorded: Tensor | None, place: str) -> None:
    """Raise Broken unless the canary's hidden state, `true`, equals the recorded one.

    `place` names the block or head before which they are compared, for the message.
    """
    if true is None and recorded is None:
        return
    if true is None or recorded is None or (true.dtype, true.shape) != (recorded.dtype, recorded.shape):
        raise Broken(f"before {place} the hidden state is of another shape than running the blocks one by one gave")
    if not torch.allclose(true, recorded, rtol=0, atol=0, equal_nan=True):  # `Watch.check` finds NaN
        raise Broken(f"before {place} the hidden state is not what running the blocks one by one gave")
