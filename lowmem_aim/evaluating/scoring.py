"""Continuations scored from what a model's output head is given: the head a few rows at a time, no logits kept.

The log of a softmax needs, at each position, the sum of all exponentials, the largest logit, and the logit of the token
that is scored: all three are carried from one part of the vocabulary to the next. What a model does to its logits
(Gemma caps them, Cohere scales them) it does to each part, in its own forward.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lowmem_aim.blocks.forwards import GivenLogits
from lowmem_aim.blocks.head import OutputHead
from lowmem_aim.blocks.runner import BlockRunner
from lowmem_aim.errors import ModelError
from lowmem_aim.evaluating.questions import Answer, Question
from lowmem_aim.measuring.purpose import Purpose
from lowmem_aim.system.tensor_store import Stored

# Fixed, so that no answer depends on the budget: sums that are cut elsewhere round otherwise.
POSITIONS = 256  # of one sequence, at a time
HEAD_BYTES, LOGITS_BYTES = 32 << 20, 32 << 20  # of a part of the head, and of its logits at POSITIONS, at most
WORK_BYTES = HEAD_BYTES + LOGITS_BYTES


class Scoring(Purpose):
    """Scores the questions of each sequence; `answers` has them once the runner has finished."""

    counts = False

    def __init__(self, questions: Sequence[Sequence[Question]]) -> None:
        """`questions` of each sequence that is run."""
        self._questions = questions
        self._kept = [Stored() for _ in questions]
        self.answers: list[list[Answer]] = []

    def take(self, runner: BlockRunner, number: int, head_input: Tensor | None) -> None:
        """Keep the head's input at the positions that are scored."""
        if head_input is None:
            raise ModelError("this model does not call its output head", "only models that continue a text are scored")
        last = max(len(question.scored) for question in self._questions[number])
        runner.store.put(head_input[0, -last:].contiguous(), self._kept[number])

    def finish(self, runner: BlockRunner) -> None:
        """Go through the head once, for all sequences. Raises ModelError for logits that are no numbers."""
        head, as_model = OutputHead(runner), logits_of_model(runner)
        sums = Sums(self._questions, runner.device)
        step = rows_at_a_time(head)
        for start in range(0, head.rows, step):
            part = head.part(start, min(start + step, head.rows))
            for number, kept in enumerate(self._kept):
                for first, x in enumerate(torch.split(runner.store.get(kept), POSITIONS)):
                    sums.add(number, first * POSITIONS, start, as_model(F.linear(x, *part)))
        self.answers = sums.answers()


def rows_at_a_time(head: OutputHead) -> int:
    """The rows of the head that are read at a time."""
    return max(1, min(HEAD_BYTES // (int(head.columns) * 4), LOGITS_BYTES // (POSITIONS * 16)))


class Sums:
    """Sums over the logits at each position of all sequences, from the parts of the vocabulary so far."""

    def __init__(self, questions: Sequence[Sequence[Question]], device: torch.device) -> None:
        """`questions` of each sequence; `device`: where the logits are."""
        lengths = [[len(question.scored) for question in asked] for asked in questions]
        last = [max(own) for own in lengths]
        self._begin = [0, *itertools.accumulate(last)]  # of each sequence: its first position
        self._asked = [0, *itertools.accumulate(map(sum, lengths))]  # likewise: its first token that is scored
        self._lengths = lengths
        at = [place for own, most in zip(lengths, last, strict=True) for n in own for place in range(most - n, most)]
        tokens = [token for asked in questions for question in asked for token in question.scored]
        self._at = torch.tensor(at, device=device)  # of each token that is scored: its position in its sequence
        self._tokens = torch.tensor(tokens, device=device)
        self._logits = torch.full((len(tokens),), torch.nan, device=device)  # of these tokens, as they become known
        positions = self._begin[-1]
        self._largest = torch.full((positions,), -torch.inf, device=device)
        self._likeliest = torch.zeros(positions, dtype=torch.int64, device=device)  # the token with that logit
        self._total = torch.zeros(positions, dtype=torch.float64, device=device)  # of exp(logit - largest)

    def add(self, number: int, first: int, start: int, logits: Tensor) -> None:
        """Add logits, (positions, rows), of a sequence's positions from `first` and the vocabulary from `start`."""
        logits = logits.float()
        here = slice(self._begin[number] + first, self._begin[number] + first + len(logits))
        before = self._largest[here]
        highest, row = logits.max(-1)
        largest = torch.maximum(before, highest)
        total = (logits - largest[:, None]).exp_().sum(-1, dtype=torch.float64)
        self._total[here] = self._total[here] * (before - largest).double().exp() + total
        self._likeliest[here] = torch.where(highest > before, row + start, self._likeliest[here])
        self._largest[here] = largest
        asked = slice(self._asked[number], self._asked[number + 1])
        at, tokens = self._at[asked] - first, self._tokens[asked] - start
        inside = (at >= 0) & (at < logits.shape[0]) & (tokens >= 0) & (tokens < logits.shape[1])
        self._logits[asked] = torch.where(
            inside, logits[at.clamp(0, logits.shape[0] - 1), tokens.clamp(0, logits.shape[1] - 1)], self._logits[asked]
        )

    def answers(self) -> list[list[Answer]]:
        """The answers to each sequence's questions. Raises ModelError for logits that are no numbers."""
        found = []
        for number, lengths in enumerate(self._lengths):
            asked = slice(self._asked[number], self._asked[number + 1])
            at = self._at[asked] + self._begin[number]
            logs = (self._logits[asked].double() - self._largest[at].double() - self._total[at].log()).cpu()
            hits = (self._likeliest[at] == self._tokens[asked]).cpu()
            if not bool(logs.isfinite().all()):
                raise ModelError(
                    "logits overflow or are not numbers: this model cannot be scored",
                    hint="is the model sound? if it is, evaluate in a wider dtype (`--dtype float32`)",
                )
            parts = zip(torch.split(logs, lengths), torch.split(hits, lengths), strict=True)
            found.append([Answer(float(log.sum()), bool(hit.all())) for log, hit in parts])
        return found


def logits_of_model(runner: BlockRunner) -> Callable[[Tensor], Tensor]:
    """The function from what the head gives, (positions, rows), to the model's logits of these rows.

    Raises ModelError if a logit depends on others: then a vocabulary cannot be scored in parts.
    """

    def changed(logits: Tensor) -> Tensor:
        given = runner.forward(torch.zeros(1, dtype=torch.int64), GivenLogits(logits[None]))
        value: Tensor = given.logits
        return value.reshape(logits.shape).to(logits.dtype)

    probe = torch.linspace(-60, 60, 64, dtype=runner.meta_model.dtype, device=runner.device).reshape(2, 32)
    whole = changed(probe)
    if not torch.equal(torch.cat([changed(probe[:, :16]), changed(probe[:, 16:])], -1), whole):
        raise ModelError("the logits of this model depend on each other: they cannot be computed in parts")
    return (lambda logits: logits) if torch.equal(whole, probe) else changed
