"""Log-likelihoods from a model of which one block at a time is in memory.

What is not known from an earlier run is cut into rounds. All sequences of a round pass through one block before the
next comes in, so weights are read once a round; what waits between two blocks lies on the device, in RAM or in a file.
A round that is finished is kept for good, one under way as a calibration is: a killed run loses a block, or a minute.
"""

from __future__ import annotations

import gc
import itertools
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from lowmem_aim.blocks.runner import BlockRunner
from lowmem_aim.evaluating.answers import Answers
from lowmem_aim.evaluating.outlook import outlook_of
from lowmem_aim.evaluating.questions import Answer, Question, readings_of
from lowmem_aim.evaluating.rounds import in_rounds, needs_of_round
from lowmem_aim.evaluating.scoring import Scoring
from lowmem_aim.events import Notice, PhaseEnded, PhaseStarted
from lowmem_aim.measuring.batches import Group, batches_of, groups_in_order
from lowmem_aim.measuring.mean_activations import allocations_as_budget_errors, shares_for
from lowmem_aim.measuring.purpose import Progress
from lowmem_aim.measuring.snapshots import Snapshots
from lowmem_aim.measuring.ways import NotTogether, run_batches, run_blocks
from lowmem_aim.models.checkpoint import Checkpoint
from lowmem_aim.models.meta_model import MetaModel
from lowmem_aim.output.records import KeptAnswers, RunAlone
from lowmem_aim.output.workspace import Workspace
from lowmem_aim.system.run import Run


@dataclass(frozen=True)
class BlockwiseModel:
    """A model that is run block by block, for one evaluation."""

    checkpoint: Checkpoint
    meta_model: MetaModel  # in the forward's dtype
    run: Run
    space: Workspace  # for hidden states, and snapshots of them
    spill: int  # bytes that a round may take there

    def answers(self, questions: Sequence[Question], known: Answers) -> list[Answer]:
        """The answers to all questions, those that are not `known` computed now, and kept there.

        Raises ModelError, MemoryBudgetError, DiskError.
        """
        keys = [question.key for question in questions]
        found = known.kept(keys)
        left = {number for number, key in enumerate(keys) if key not in found}
        self.run.emit(PhaseStarted("evaluate", len(questions), "requests", len(questions) - len(left)))
        for new in self._rounds(questions, left):
            values = {keys[number]: [answer.log_likelihood, answer.greedy] for number, answer in new.items()}
            known.keep(values.items())
            found |= values
            left.difference_update(new)
            self.space.journal.keep(KeptAnswers(len(questions) - len(left), len(questions)))
            self.space.forget_calibration()
        self.run.emit(PhaseEnded("evaluate"))
        return [Answer(float(found[key][0]), bool(found[key][1])) for key in keys]

    def _rounds(self, questions: Sequence[Question], left: set[int]) -> Iterator[dict[int, Answer]]:
        """Yield the answers to the questions that are `left`, a round at a time; whoever takes them shortens `left`."""
        readings = readings_of(questions, range(len(questions))) if left else []
        blocks, has_told = len(self.meta_model.blocks), False
        while left:
            wanted = {number for number, reading in enumerate(readings) if not left.isdisjoint(reading.questions)}
            alone = self.space.journal.kept(RunAlone) is not None
            rounds = in_rounds(readings, wanted, self.meta_model, self.spill, alone=alone, emit=self.run.emit)
            if not has_told:
                told = outlook_of(rounds, questions, left, self.checkpoint, self.meta_model, self.run)
                self.run.emit(Notice(str(told)))
                has_told = True
            try:
                for groups in rounds.groups:
                    members = [readings[number] for group in groups for number in group.members]
                    asked = [sorted(left.intersection(reading.questions)) for reading in members]
                    done = len(questions) - len(left)
                    answers = self._round(
                        groups_in_order(groups),
                        [reading.tokens for reading in members],
                        [[questions[number] for number in numbers] for numbers in asked],
                        Progress(self.run.emit, before=done, what="evaluated", a_block=sum(map(len, asked)) / blocks),
                    )
                    yield dict(zip(itertools.chain(*asked), itertools.chain(*answers), strict=True))
            except NotTogether as reason:
                self.run.emit(Notice(f"{reason}; requests are run one by one instead", "warning"))
                self.space.journal.keep(RunAlone())

    def _round(
        self,
        groups: Sequence[Group],
        sequences: Sequence[array[int]],
        questions: Sequence[Sequence[Question]],
        progress: Progress,
    ) -> list[list[Answer]]:
        """The answers to the questions of each sequence. Raises NotTogether."""
        run, place, folder = self.run, torch.device(self.run.device), self.space.private
        self.checkpoint.warm_up()  # before the budget is divided
        gc.collect()  # what the round before has left: a runner and its calls refer to each other
        batches = batches_of(groups, sequences)
        shares = shares_for(needs_of_round(groups, sequences, self.meta_model), run.budget, place, folder)
        snapshots, scoring = Snapshots(folder, self.space.journal), Scoring(questions)

        def runner() -> BlockRunner:
            return BlockRunner(self.checkpoint, self.meta_model, place, shares, run.budget, folder, run.emit)

        with torch.no_grad(), allocations_as_budget_errors():
            if all(batch.is_plain for batch in batches):
                alone = [torch.tensor(tokens, dtype=torch.int64) for tokens in sequences]
                run_blocks(runner, alone, progress, snapshots, scoring)
            else:
                run_batches(runner(), batches, progress, snapshots, scoring)
        self.checkpoint.check_unchanged()  # a change between reading and computing would count
        return scoring.answers
