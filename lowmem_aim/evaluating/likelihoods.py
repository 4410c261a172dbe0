"""Log-likelihoods from a model of which one block at a time is in memory.

What is not known from an earlier run is cut into rounds. All sequences of a round pass through one block before the
next comes in, so weights are read once a round; what waits between two blocks lies on the device, in RAM or in a file.
A round that is finished is kept for good, one under way as a calibration is: a killed run loses a block, or a minute.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from lowmem_aim.blocks.past import can_continue
from lowmem_aim.blocks.runner import BlockRunner
from lowmem_aim.blocks.shares import Needs
from lowmem_aim.evaluating.answers import Answers
from lowmem_aim.evaluating.outlook import Outlook
from lowmem_aim.evaluating.questions import Answer, Question, Reading, readings_of
from lowmem_aim.evaluating.scoring import WORK_BYTES, Scoring
from lowmem_aim.events import Notice, PhaseEnded, PhaseStarted
from lowmem_aim.measuring.batches import Group, among, batches_of, groups_in_order, groups_of, lengths_of, rounds_of
from lowmem_aim.measuring.mean_activations import allocations_as_budget_errors, needs_of, shares_for
from lowmem_aim.measuring.purpose import Progress
from lowmem_aim.measuring.snapshots import Snapshots
from lowmem_aim.measuring.ways import NotTogether, run_batches, run_blocks
from lowmem_aim.models.checkpoint import Checkpoint
from lowmem_aim.models.meta_model import MetaModel
from lowmem_aim.output.records import KeptAnswers, RunAlone
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
        blocks, outlook = len(self.meta_model.blocks), ""
        while left:
            wanted = {number for number, reading in enumerate(readings) if not left.isdisjoint(reading.questions)}
            rounds = list(self._cut(readings, wanted))
            if not outlook:
                outlook = str(self._outlook(rounds, readings, len(questions), len(left)))
                self.run.emit(Notice(outlook))
            try:
                for groups in rounds:
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

    def _outlook(
        self, rounds: Sequence[Sequence[Group]], readings: Sequence[Reading], requests: int, left: int
    ) -> Outlook:
        sequences = [reading.tokens for reading in readings]
        members = [number for groups in rounds for group in groups for number in group.members]
        shared = sum(group.common * (len(group.members) - 1) for groups in rounds for group in groups)
        tokens = sum(len(sequences[number]) for number in members)
        budget, device = self.run.budget, torch.device(self.run.device)
        needs = max((self._needs(groups, sequences) for groups in rounds), key=lambda needs: needs.least)
        on_host = budget.vram is None
        return Outlook(
            requests=requests,
            known=requests - left,
            sequences=len(members),
            tokens=tokens,
            computed=tokens - shared,
            rounds=len(rounds),
            stored=self.checkpoint.nbytes,
            least=budget.ram_used() + needs.least_ram(on_host) if on_host else needs.least,
            there=budget.ram if budget.vram is None else budget.vram_left(device),
        )

    def _needs(self, groups: Sequence[Group], sequences: Sequence[array[int]]) -> Needs:
        """The needs of a round. Beside its batches, two sequences are run alone, to compare."""
        longest = range(max(len(sequences[number]) for group in groups for number in group.members))
        sizes = [size for group in groups for size in lengths_of(group, sequences)]
        members = sum(len(group.members) for group in groups)
        beside = WORK_BYTES + SEQUENCE_BYTES * members
        return needs_of(self.meta_model, [longest, longest, *map(range, sizes)], beside=beside)

    def _cut(self, readings: Sequence[Reading], wanted: set[int]) -> Iterator[list[Group]]:
        """Yield rounds of readings that are wanted.

        What is run together is decided among all of them, and rounds have the same size whatever the budget: a resumed
        run decides alike.
        """
        sequences = [reading.tokens for reading in readings]
        if self.space.journal.kept(RunAlone):
            groups = [Group([number]) for number in range(len(readings))]
        else:
            groups = groups_of(sequences)
            if any(group.common for group in groups) and not can_continue(self.meta_model.model):
                why = "this model passes on more than keys and values: what requests begin with alike is read for each"
                self.run.emit(Notice(why, "warning"))
                groups = groups_of(sequences, beginnings=False)
        some = (among(group, wanted) for group in groups)
        tokens = max(1, self.spill // COPIES // needs_of(self.meta_model, [range(1)]).states)
        yield from rounds_of((group for group in some if group.members), sequences, tokens, MOST_SEQUENCES)

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
        batches = batches_of(groups, sequences)
        shares = shares_for(self._needs(groups, sequences), run.budget, place, folder)
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
