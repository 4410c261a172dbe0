"""Three tiny skills as questions and answers, drawn from a seeded generator.

Whether a question is held out for the evaluation follows from its text alone. Training and evaluation therefore cannot
overlap, whatever their seeds and lengths, and no list of the questions used has to be kept.
"""

from __future__ import annotations

import string
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random

HELD_OUT_SHARE = 8  # one question in eight is never trained on
MOST_DRAWS = 50  # for each evaluation question asked for


@dataclass(frozen=True)
class Example:
    """A question and its answer."""

    prompt: str
    answer: str

    @property
    def text(self) -> str:
        """The question and the answer as one text."""
        return self.prompt + self.answer


def _add(random: Random) -> Example:
    left, right = random.randrange(70), random.randrange(70)
    return Example(f"add:{left}+{right}=", str(left + right))


def _letters(random: Random) -> str:
    return "".join(random.choices(string.ascii_uppercase, k=random.randint(4, 8)))


def _sort(random: Random) -> Example:
    letters = _letters(random)
    return Example(f"sort:{letters}=", "".join(sorted(letters)))


def _reverse(random: Random) -> Example:
    letters = _letters(random)
    return Example(f"reverse:{letters}=", letters[::-1])


SKILLS: Mapping[str, Callable[[Random], Example]] = {"add": _add, "sort": _sort, "reverse": _reverse}


def is_held_out(example: Example) -> bool:
    """Whether a question is for the evaluation, and never trained on."""
    return zlib.crc32(example.prompt.encode()) % HELD_OUT_SHARE == 0


def draw(skill: str, random: Random, held_out: bool = False) -> Example:
    """One question of a skill, from the training part or from the held-out part."""
    while True:
        example = SKILLS[skill](random)
        if is_held_out(example) == held_out:
            return example


def mixture(shares: Mapping[str, float], count: int, random: Random) -> list[Example]:
    """`count` training questions; the skill of each is drawn by `shares`."""
    return [draw(skill, random) for skill in random.choices(list(shares), list(shares.values()), k=count)]


def evaluation(skill: str, count: int, seed: int) -> list[Example]:
    """`count` different held-out questions of a skill, the same for every model.

    Raises ValueError if the skill has fewer.
    """
    # A string seeds through SHA-512: the same on every machine, and no two skills share a stream.
    random = Random(f"evaluation {skill} {seed}")
    found: dict[str, Example] = {}
    for _ in range(MOST_DRAWS * count):
        example = draw(skill, random, held_out=True)
        found[example.prompt] = example
        if len(found) == count:
            return list(found.values())
    # There are only so many sums of small numbers: without a limit this would search forever.
    raise ValueError(f"`{skill}` has fewer than {count} held-out questions")
