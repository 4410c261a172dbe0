"""Mean |x| of each input channel of the base model, one block of weights in memory at a time.

    1. record    one forward a sequence, every block an identity: finds what each block is called with
    2. run       block by block: load the block's weights (accelerate's offload hook over the checkpoint's own files),
                 run every sequence's hidden state through it with that sequence's recorded arguments, drop the weights
    3. finish    the same forward again, the last block giving the true hidden state: final norm, output head

Memory: one block, the activations of one sequence, the hidden states of all; under a budget (`shares`) hidden states go
to a file and a block's modules are loaded one by one. Each weight is read once, or, if it is paged, once a sequence;
embeddings are read by row; the output head is never loaded and no logits are computed.

How the blocks can be run, and what happens if a model forbids the cheapest way, is in `ways.py`.

Forwards are one sequence each, unpadded, without gradients or caches: no padding enters a mean, and no result depends
on which sequences share a batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence, Sized
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from lowmem_aim.blocks.runner import LESS, BlockRunner
from lowmem_aim.blocks.shares import BOUNDLESS, Needs, Shares, share_out
from lowmem_aim.errors import MemoryBudgetError, ModelError, printable
from lowmem_aim.events import Emit, PhaseEnded, PhaseStarted, silent
from lowmem_aim.measuring.by_weight import gathered
from lowmem_aim.measuring.purpose import Progress
from lowmem_aim.measuring.snapshots import Snapshots
from lowmem_aim.measuring.ways import run_blocks
from lowmem_aim.models.checkpoint import Checkpoint
from lowmem_aim.models.meta_model import MetaModel
from lowmem_aim.output.folder import check_disk, snapshot_bytes
from lowmem_aim.relaxing.activations import Activations
from lowmem_aim.system.memory import Budget, is_allocation_failure


def mean_activations(
    base: Checkpoint,
    meta_model: MetaModel,
    sequences: Sequence[Tensor],  # (length,) int64 each; lengths may differ
    *,
    device: str = "cpu",
    budget: Budget | None = None,
    spill: Path | None = None,
    snapshots: Snapshots | None = None,
    emit: Emit = silent,
) -> Activations:
    """The activation statistics of `base` (AIM, arXiv 2502.02421): the mean of |x| over tokens, then over sequences.

    The forward runs in the meta model's dtype, within `budget` (None: no bound). What does not fit goes to a file
    without a name in the folder `spill` (None: stays in RAM). Progress is kept in `snapshots`, from which a killed run
    is resumed. The result is reproducible for one device, set of versions and thread count, whatever the budget. The
    model is left as it was found, also after an exception.

    Raises ModelError (a sequence that the model cannot take, weights that do not load, inputs that overflow),
    MemoryBudgetError if not even single modules fit, and DiskError.
    """
    _check_sequences(sequences)
    place = torch.device(device)
    base.warm_up()  # before the budget is divided
    shares = BOUNDLESS if budget is None else shares_for(needs_of(meta_model, sequences), budget, place, spill)
    progress = Progress(emit)
    emit(PhaseStarted("calibrate", len(meta_model.blocks), "blocks"))
    with torch.no_grad(), allocations_as_budget_errors():
        runner = run_blocks(
            lambda: BlockRunner(base, meta_model, place, shares, budget, spill, emit), sequences, progress, snapshots
        )
    base.check_unchanged()  # a change between reading and computing would count
    result = gathered(runner, sequences, emit)
    emit(PhaseEnded("calibrate"))
    return result


def needs_of(meta_model: MetaModel, sequences: Sequence[Sized], beside: int = 0) -> Needs:
    """The needs of running a model on these sequences; `beside`: the bytes that something else takes meanwhile.

    Raises ModelError for a model without a list of blocks.
    """
    meta_model.require_blocks()
    needs = Needs.of(meta_model, sequences)
    return replace(needs, beside=needs.beside + beside)


def shares_for(needs: Needs, budget: Budget, device: torch.device, spill: Path | None) -> Shares:
    """Divide the budget, and check that the disk of `spill` has space for hidden states.

    Beside what does not fit the budget, the disk takes two snapshots: the last one stays until the next is whole. Those
    of an interrupted run that lie in `spill` make way for them. Raises MemoryBudgetError, DiskError.
    """
    shares = share_out(budget, device, needs)
    if spill is not None:
        needed = shares.spilled(needs.states) + 2 * needs.states - snapshot_bytes(spill)
        check_disk(spill, needed, "running the model, for hidden states,")
    return shares


@contextlib.contextmanager
def allocations_as_budget_errors() -> Iterator[None]:
    """Raise MemoryBudgetError for an allocation that fails outside the blocks, where nothing can be made smaller."""
    try:
        yield
    except Exception as error:
        if not is_allocation_failure(error):
            raise
        raise MemoryBudgetError(
            f"running the model, memory ran out: {printable(str(error).splitlines()[0] if str(error) else '')}",
            hint=LESS,
        ) from error


def _check_sequences(sequences: Sequence[Tensor]) -> None:
    if not sequences:
        raise ModelError("there is no calibration text", "give at least one sequence of tokens")
    for index, tokens in enumerate(sequences):
        if tokens.dim() != 1 or tokens.dtype != torch.int64 or not len(tokens) or int(tokens.min()) < 0:
            raise ModelError(
                f"calibration sequence {index} is not a list of token ids", "give int64 tensors of one dimension"
            )
