"""Log-likelihood questions as token ids, and the forwards that answer them.

A question is a context and its continuation. The forward for it reads both but the last token, and the continuation is
scored at the last positions: as many as it has tokens. Questions whose forwards read the same tokens share one; choices
of one token (` A`, ` B`, ...) all do. What else forwards share is in `measuring/batches.py`.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import xxhash

from lowmem_aim.errors import ModelError

_IDS = "i"  # four bytes an id: all questions of a large task are in memory at once


@dataclass(frozen=True)
class Question:
    """A continuation to score after a context: what the forward reads, and the continuation's tokens."""

    read: array[int]
    scored: array[int]  # not empty, and no longer than `read`

    @classmethod
    def of(cls, context: Sequence[int], continuation: Sequence[int], longest: int) -> Question:
        """A context, cut at its beginning so that no more than `longest` tokens are read, and a continuation.

        Raises ModelError if there is nothing to score, nothing before it, or more to score than may be read.
        """
        if not context or not continuation or len(continuation) > longest:
            raise ModelError(
                f"a continuation of {len(continuation)} tokens after {len(context)} cannot be scored by a model that "
                f"reads {longest} at a time",
                hint="is the task meant for this model, and `--max-length` long enough?",
            )
        tokens = array(_IDS, [*context, *continuation][-longest - 1 :])
        return cls(tokens[:-1], array(_IDS, continuation))

    @property
    def key(self) -> str:
        """The question's name in a cache of answers: 32 hex digits."""
        state = xxhash.xxh3_128(self.read.tobytes())
        state.update(b"?" + self.scored.tobytes())
        return str(state.hexdigest())


@dataclass(frozen=True)
class Answer:
    """The log-likelihood of a continuation, in nats, and whether each of its tokens was the likeliest."""

    log_likelihood: float
    greedy: bool


@dataclass
class Reading:
    """One forward, and the questions that it answers, by their numbers."""

    tokens: array[int]
    questions: list[int] = field(default_factory=list)


def readings_of(questions: Sequence[Question], numbers: Iterable[int]) -> list[Reading]:
    """The forwards that answer the questions of these numbers, in an order that depends on nothing but the tokens."""
    found: dict[bytes, Reading] = {}
    for number in numbers:
        read = questions[number].read
        found.setdefault(read.tobytes(), Reading(read)).questions.append(number)
    return [found[key] for key in sorted(found, key=lambda key: (-len(key), key))]
