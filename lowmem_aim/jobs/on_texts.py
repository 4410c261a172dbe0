"""Models run on texts within a merge: the moments of experts, block by block, and ACM's comparison before it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from lowmem_aim.jobs.held import Output
from lowmem_aim.jobs.prepared import Prepared
from lowmem_aim.merging.given import BlockMoments
from lowmem_aim.merging.loop import matrix_space
from lowmem_aim.merging.merged_weights import MergedWeights
from lowmem_aim.merging.shares import Shares, share_beside
from lowmem_aim.methods.moments import MatrixSpace
from lowmem_aim.planning.tasks import Plan
from lowmem_aim.relaxing.relaxation import Consensus, Relaxation

if TYPE_CHECKING:
    from lowmem_aim.measuring.comparison import Comparison, Making
    from lowmem_aim.solving.kept_states import KeptStates


@contextlib.contextmanager
def moments_of(
    ready: Prepared,
    output: Output,
    shares: Shares,
    space: MatrixSpace,
    kept: KeptStates | None = None,
    *,
    compared: bool = False,
) -> Iterator[BlockMoments]:
    """The moments of the experts' texts, block by block; `kept` has snapshots of how far they are.

    They lie in `space`, and `shares` says what running models may take. `compared`: it is ACM that compares what is
    made of them, and no merge is under way. Raises MemoryBudgetError, DiskError.
    """
    assert ready.experts is not None
    folder, run = output.scratch, ready.run
    with (
        MergedWeights(output.plan, ready.inputs, Relaxation(), folder, run.device, as_merged=not compared) as merged,
        ready.experts.moments(
            run, space, ram=shares.models, vram=shares.device_models, folder=folder, kept=kept, merged=merged
        ) as moments,
    ):
        merged.measured_by(moments)
        yield moments


def consensus_of(ready: Prepared, output: Output, relaxation: Relaxation) -> Consensus:
    """ACM's coefficients of an output, from comparing the base with the merged model as `relaxation` leaves it.

    Raises ResumeError, ModelError, MemoryBudgetError, DiskError.
    """
    from lowmem_aim.measuring.comparison import MergedOnDemand  # transformers: only where models are run

    assert ready.comparison is not None
    shares = _shares_of_experts(ready, output.plan, ready.comparison)
    weights = partial(_weights, ready, output, relaxation, shares)
    merged = MergedOnDemand(ready.outline(), weights, making_to_compare(ready, output.plan, shares))
    return ready.comparison.consensus(output.plan, ready.inputs, merged, ready.run, output.scratch, output.journal)


def making_to_compare(ready: Prepared, plan: Plan, experts: Shares | None = None) -> Making:
    """The memory that making an output's weights takes while ACM compares.

    `experts`: the shares of those that are run for it; None: they get what they need at least.
    """
    making = ready.making(plan)
    if experts is not None:
        ram, vram = experts.models + experts.matrices, experts.device_models + experts.device_matrices
    else:
        running = ready.running() if plan.recipe.texts else None
        ram, vram = (running.least, running.vram) if running else (0, 0)
    return replace(making, ram=making.ram + ram, vram=making.vram + vram)


def _shares_of_experts(ready: Prepared, plan: Plan, comparison: Comparison) -> Shares | None:
    """The shares of experts that are run while ACM compares; None if no weight is solved from texts."""
    running, budget = ready.running() if plan.recipe.texts else None, ready.run.budget
    if running is None:
        return None
    needs, on_host = comparison.needs(plan, ready.making(plan)), budget.vram is None
    return share_beside(budget, ready.run.device, running, needs.least_ram(on_host), 0 if on_host else needs.least)


@contextlib.contextmanager
def _weights(ready: Prepared, output: Output, relaxation: Relaxation, shares: Shares | None) -> Iterator[MergedWeights]:
    """The weights of an output that is yet to be made; `shares`: of the experts, if weights are solved from texts.

    These have moments of their own: those of the merge are measured when its turn has come.
    """
    folder = output.scratch
    with contextlib.ExitStack() as stack:
        moments = None
        if shares is not None:
            matrices = stack.enter_context(matrix_space(ready.run, shares, folder))
            moments = stack.enter_context(moments_of(ready, output, shares, matrices, compared=True))
            # The experts are set up before the models that are compared: what is set up last is undone first.
            moments.come_to(0)
        weights = MergedWeights(output.plan, ready.inputs, relaxation, folder, ready.run.device)
        stack.enter_context(weights)
        if moments is not None:
            weights.measured_by(moments)
        yield weights
