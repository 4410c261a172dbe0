"""The cost of log-likelihoods, told before work."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass

import torch

from lowmem_aim.blocks.calls import ForwardFailed
from lowmem_aim.blocks.forwards import Broken
from lowmem_aim.blocks.runner import BlockRunner
from lowmem_aim.blocks.shares import Needs, share_out
from lowmem_aim.errors import LowmemAimError
from lowmem_aim.evaluating.pace import measured, samples_of
from lowmem_aim.evaluating.questions import Question
from lowmem_aim.evaluating.rounds import Rounds, needs_of_round
from lowmem_aim.measuring.batches import lengths_of
from lowmem_aim.models.checkpoint import Checkpoint
from lowmem_aim.models.meta_model import MetaModel
from lowmem_aim.system.run import Run
from lowmem_aim.units import clock, counted, shown


@dataclass(frozen=True)
class Outlook:
    """The cost of answering the requests of all tasks."""

    requests: int
    known: int  # of these, from an earlier run
    sequences: int  # that are read for the others: requests that read the same share one
    tokens: int  # of these sequences
    computed: int  # of these tokens: common beginnings count once
    rounds: int
    stored: int  # bytes of the model on disk
    least: int  # bytes of memory, of the device if that has its own, without which it does not run
    there: int  # bytes of memory that it may take
    seconds: float | None = None  # estimated; None: unknown

    def __str__(self) -> str:
        """The figures as one line for people."""
        known = f", {self.known} of them answered before" if self.known else ""
        times = f", {self.rounds} times" if self.rounds > 1 else ""
        time = "" if self.seconds is None else f"; about {clock(self.seconds)} (an estimate)"
        return (
            f"log-likelihoods: {counted(self.requests, 'request')}{known}; {counted(self.sequences, 'text')} with "
            f"{self.tokens} tokens, {self.computed} after sharing, in {counted(self.rounds, 'round')}; at most "
            f"{shown(self.stored)} are read from disk{times}; takes at least {shown(self.least)} of memory, of "
            f"{shown(self.there)}{time}"
        )


def outlook_of(
    rounds: Rounds,
    questions: Sequence[Question],
    left: Set[int],
    checkpoint: Checkpoint,
    meta_model: MetaModel,
    run: Run,
) -> Outlook:
    """The cost of the questions that are `left`, by their numbers, in these rounds. Raises ModelError."""
    sequences, members = rounds.sequences, rounds.members
    tokens = sum(len(sequences[number]) for number in members)
    needs = max((needs_of_round(groups, sequences, meta_model) for groups in rounds.groups), key=lambda n: n.least)
    budget, on_host = run.budget, run.budget.vram is None
    return Outlook(
        requests=len(questions),
        known=len(questions) - len(left),
        sequences=len(members),
        tokens=tokens,
        computed=tokens - rounds.shared,
        rounds=len(rounds.groups),
        stored=checkpoint.nbytes,
        least=budget.ram_used() + needs.least_ram(on_host) if on_host else needs.least,
        there=budget.ram if budget.vram is None else budget.vram_left(torch.device(run.device)),
        seconds=_seconds(rounds, questions, left, needs, checkpoint, meta_model, run),
    )


def _seconds(
    rounds: Rounds,
    questions: Sequence[Question],
    left: Set[int],
    needs: Needs,
    checkpoint: Checkpoint,
    meta_model: MetaModel,
    run: Run,
) -> float | None:
    """Seconds that the rounds take; None for a model that is not run block by block, or does not fit."""
    sequences, members, device = rounds.sequences, rounds.members, torch.device(run.device)
    asked = [left & set(rounds.readings[number].questions) for number in members]
    scored = sum(max(len(questions[number].scored) for number in numbers) for numbers in asked)
    try:
        checkpoint.warm_up()  # before the budget is divided
        shares = share_out(run.budget, device, needs)
        runner = BlockRunner(checkpoint, meta_model, device, shares, run.budget)
        pace = measured(runner, samples_of(rounds), max(1, round(scored / len(members))))
    except (LowmemAimError, Broken, ForwardFailed):  # the run itself tells it, or runs the model in another way
        return None
    filled = sum(size for groups in rounds.groups for group in groups for size in lengths_of(group, sequences))
    return pace.seconds(filled, len(members), len(rounds.groups))
