"""Log-likelihoods from a model of which one block at a time is in memory.

What is not known from an earlier run is cut into rounds. All sequences of a round pass through one block before the
next comes in, so weights are read once a round; what waits between two blocks lies on the device, in RAM or in a file.
A round that is finished is kept for good, one under way as a calibration is: a killed run loses a block, or a minute.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lowmem_aim.blocks.runner import BlockRunner
from lowmem_aim.evaluating.answers import Answers
from lowmem_aim.evaluating.questions import Answer, Question, Reading, readings_of, rounds_of
from lowmem_aim.evaluating.scoring import WORK_BYTES, Scoring
from lowmem_aim.events import PhaseEnded, PhaseStarted
from lowmem_aim.measuring.mean_activations import allocations_as_budget_errors, needs_of, shares_for
from lowmem_aim.measuring.purpose import Progress
from lowmem_aim.measuring.snapshots import Snapshots
from lowmem_aim.measuring.ways import run_blocks
from lowmem_aim.models.checkpoint import Checkpoint
from lowmem_aim.models.meta_model import MetaModel
from lowmem_aim.output.records import KeptAnswers
from lowmem_aim.output.workspace import Workspace
from lowmem_aim.system.run import Run

# Of the disk that a round may take, its hidden states get a part: the last snapshot of them and the next lie beside.
COPIES = 3
MOST_SEQUENCES = 20_000  # of a round: each takes some memory, however short it is
SEQUENCE_BYTES = 2048  # of these


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
        left = readings_of(questions, (number for number, key in enumerate(keys) if key not in found))
        asked = sum(len(reading.questions) for reading in left)
        done = len(questions) - asked
        self.run.emit(PhaseStarted("evaluate", len(questions), "requests", done))
        for some in rounds_of(left, self._tokens_of_a_round(left), MOST_SEQUENCES):
            numbers = [number for reading in some for number in reading.questions]
            answers = self._round(
                some,
                questions,
                Progress(
                    self.run.emit, before=done, what="evaluated", a_block=len(numbers) / len(self.meta_model.blocks)
                ),
            )
            new = {keys[number]: [a.log_likelihood, a.greedy] for number, a in zip(numbers, answers, strict=True)}
            known.keep(new.items())
            found |= new
            done += len(numbers)
            self.space.journal.keep(KeptAnswers(done, len(questions)))
            self.space.forget_calibration()
        self.run.emit(PhaseEnded("evaluate"))
        return [Answer(float(found[key][0]), bool(found[key][1])) for key in keys]

    def _tokens_of_a_round(self, readings: Sequence[Reading]) -> int:
        """The tokens whose hidden states a round may keep, whatever the budget: a resumed run cuts its rounds alike."""
        if not readings:
            return 0
        longest = readings[0].tokens
        return max(1, self.spill // COPIES * len(longest) // needs_of(self.meta_model, [longest]).states)

    def _round(self, readings: Sequence[Reading], questions: Sequence[Question], progress: Progress) -> list[Answer]:
        sequences = [torch.tensor(reading.tokens, dtype=torch.int64) for reading in readings]
        run, place, folder = self.run, torch.device(self.run.device), self.space.private
        self.checkpoint.warm_up()  # before the budget is divided
        needs = needs_of(self.meta_model, sequences, beside=WORK_BYTES + SEQUENCE_BYTES * len(sequences))
        shares = shares_for(needs, run.budget, place, folder)
        scoring = Scoring([[questions[number] for number in reading.questions] for reading in readings])
        with torch.no_grad(), allocations_as_budget_errors():
            run_blocks(
                lambda: BlockRunner(self.checkpoint, self.meta_model, place, shares, run.budget, folder, run.emit),
                sequences,
                progress,
                Snapshots(folder, self.space.journal),
                scoring,
            )
        self.checkpoint.check_unchanged()  # a change between reading and computing would count
        return [answer for answers in scoring.answers for answer in answers]
