"""Statistics by the checkpoint's names, made of what was counted by the model's; what could not be seen is told."""

from __future__ import annotations

from collections.abc import Sequence

import xxhash
from torch import Tensor

from lowmem_aim.blocks.runner import BlockRunner
from lowmem_aim.events import Emit, Notice
from lowmem_aim.relaxing.activations import Activations
from lowmem_aim.system.tensors import dtype_name


def gathered(runner: BlockRunner, sequences: Sequence[Tensor], emit: Emit) -> Activations:
    """Return what was counted, under the checkpoint's names; emit notices of what was not seen."""
    means, unreached, lost = _by_checkpoint_name(runner)
    _tell(unreached, lost, emit)
    return Activations(
        means=means,
        tied=runner.meta_model.tied,
        base_digests=runner.weights.digests,
        tokens_digest=_tokens_digest(sequences),
        sequences=len(sequences),
        tokens=sum(len(tokens) for tokens in sequences),
        dtype=dtype_name(runner.meta_model.dtype),
        unreached_experts=unreached,
    )


def _by_checkpoint_name(runner: BlockRunner) -> tuple[dict[str, Tensor], dict[str, int], list[str]]:
    """(statistics, experts that no token reached, parameters whose statistic has no place in the checkpoint)."""
    weights, tallies = runner.meta_model.weights, runner.watch.tallies
    means: dict[str, Tensor] = {}
    unreached: dict[str, int] = {}
    lost = runner.watch.stacks - tallies.keys()
    blocks = tuple(f"{path}." for path, _ in runner.blocks)
    for parameter, tally in tallies.items():
        if parameter == f"{runner.meta_model.head}.weight":
            # By its own name: a tied head may be absent from the file, or stand there twice.
            means[weights.name(parameter)] = tally.statistic()
        # Outside the blocks, a module that is never called (of a vision tower) is not one that text fails to reach.
        elif any(tally.calls) or parameter.startswith(blocks):
            found = dict(weights.scatter(parameter, tally.statistic()))
            means |= found
            lost |= set() if found else {parameter}
            flags = weights.scatter(parameter, tally.unreached())
            unreached |= {name: count for name, flag in flags if (count := _experts_in(flag))}
    return means, unreached, sorted(lost)


def _experts_in(flag: Tensor) -> int:
    """Number of experts of a tensor that no token reached; `flag` is (experts, ...), or of a single expert."""
    return int(flag.flatten(1).any(1).sum()) if flag.dim() == 3 else int(flag.any())


def _tell(unreached: dict[str, int], lost: list[str], emit: Emit) -> None:
    if unreached:
        what = f"no token of the calibration text was seen at {sum(unreached.values())} weights, most likely experts"
        emit(Notice(f"{what} that it does not reach; they stay as merged (more text reaches more experts)", "warning"))
    if lost:
        what = f"the inputs of {len(lost)} weights such as `{lost[0]}` cannot be seen or matched to the checkpoint"
        emit(Notice(f"calibration: {what}; they stay as merged", "warning"))


def _tokens_digest(sequences: Sequence[Tensor]) -> str:
    state = xxhash.xxh3_128()
    for tokens in sequences:
        state.update(len(tokens).to_bytes(8, "little"))  # the same tokens, cut elsewhere, are other sequences
        state.update(tokens.cpu().contiguous().numpy().tobytes())
    return str(state.hexdigest())
