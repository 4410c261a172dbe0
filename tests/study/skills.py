"""Three skills as questions with one exact answer each, drawn from seeded generators.

Whether a question is held out for the evaluation follows from its text alone. Training and evaluation therefore cannot
overlap, whatever their seeds and numbers.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random

HELD_OUT_SHARE = 8  # one question in eight is never trained on
MOST_DRAWS = 100  # for each question asked for


def _words(text: str) -> list[str]:
    return text.split()


NAMES = _words(
    "Anna Ben Carla David Emma Frank Grace Henry Iris Jack Kate Leo Maria Noah Olga Paul Rosa Sam Tina Victor"
)
THINGS = _words("apples books cards coins eggs flowers keys marbles pens shells stamps stickers stones tickets toys")
WORDS = _words(
    "river lamp stone garden window bread silver mountain paper engine winter orange ladder music copper bridge market "
    "forest button letter summer candle island mirror pocket ticket shadow kettle basket hammer cotton valley"
)


@dataclass(frozen=True)
class Item:
    """A question and the one answer that counts."""

    question: str
    answer: str


def arithmetic(random: Random) -> Item:
    """A word problem of two steps, and both steps as the answer: the last number is the result."""
    who, friend = random.sample(NAMES, 2)
    what = random.choice(THINGS)
    have, more = random.randrange(12, 60), random.randrange(5, 40)
    less = random.randrange(3, have)
    gains = (f"finds {more} more", f"buys {more} more", f"gets {more} more from {friend}")
    losses = (f"gives {less} to {friend}", f"loses {less} of them", f"sells {less} to {friend}")
    gain, loss = random.choice(gains), random.choice(losses)
    if random.random() < 0.5:
        told, worked = f"{gain} and then {loss}", f"{have} + {more} = {have + more}, {have + more} - {less}"
    else:
        told, worked = f"{loss} and then {gain}", f"{have} - {less} = {have - less}, {have - less} + {more}"
    question = f"{who} has {have} {what}. {who} {told}. How many {what} does {who} have now?"
    return Item(question, f"{worked} = {have + more - less}")


def _upper(random: Random) -> Item:
    words = random.sample(WORDS, 3)
    return Item(
        f"Answer with these words in upper case, separated by commas: {' '.join(words)}", ", ".join(words).upper()
    )


def _reversed(random: Random) -> Item:
    words = random.sample(WORDS, random.randint(3, 5))
    return Item(f"Write these words in reverse order, separated by bars: {' '.join(words)}", " | ".join(words[::-1]))


def _json(random: Random) -> Item:
    name, what, count = random.choice(NAMES), random.choice(THINGS), random.randrange(2, 100)
    question = f"Write JSON with the keys name, item and count: {name} has {count} {what}."
    return Item(question, f'{{"name": "{name}", "item": "{what}", "count": {count}}}')


def _numbered(random: Random) -> Item:
    words = random.sample(WORDS, 3)
    answer = " ".join(f"({place}) {word}" for place, word in enumerate(words, start=1))
    return Item(f"Number these words in one line: {' '.join(words)}", answer)


def instructions(random: Random) -> Item:
    """An instruction about the form of the answer, one of four kinds."""
    return random.choice([_upper, _reversed, _json, _numbered])(random)


_LISTS = _words("values prices ages scores weights sizes times rates counts points")
_RESULTS = {
    "the sum": "sum(%s)",
    "the largest": "max(%s)",
    "the smallest": "min(%s)",
    "a list": "[%s]",
    "a set": "{%s}",
}
_CHANGES = {"squares": "x ** 2", "doubles": "x * 2", "halves": "x / 2", "negatives": "-x", "cubes": "x ** 3"}
_CHOICES = {"even": "x % 2 == 0", "odd": "x % 2 == 1", "positive": "x > 0", "negative": "x < 0"}


def code(random: Random) -> Item:
    """A request for a Python expression; the answer is its text alone."""
    values, limit = random.choice(_LISTS), random.randrange(2, 20)
    result, form = random.choice(list(_RESULTS.items()))
    changed, value = random.choice(list(_CHANGES.items()))
    chosen, condition = random.choice(list(_CHOICES.items()))
    told, test = random.choice(
        [
            (f"numbers in {values}", ""),
            (f"{chosen} numbers in {values}", f" if {condition}"),
            (f"numbers in {values} above {limit}", f" if x > {limit}"),
        ]
    )
    question = f"Write a Python expression: {result} of the {changed} of the {told}."
    return Item(question, form % f"{value} for x in {values}{test}")


SKILLS: Mapping[str, Callable[[Random], Item]] = {"math": arithmetic, "instructions": instructions, "code": code}


def is_held_out(item: Item) -> bool:
    """Whether a question is for the evaluation, and never trained on."""
    return zlib.crc32(item.question.encode()) % HELD_OUT_SHARE == 0


def draw(skill: str, count: int, seed: str, held_out: bool) -> list[Item]:
    """`count` different questions of a skill, all of the training part or all held out.

    Raises ValueError if the skill has fewer.
    """
    random = Random(f"{skill} {seed}")  # a string seeds through SHA-512: the same on every machine
    found: dict[str, Item] = {}
    for _ in range(MOST_DRAWS * count):
        item = SKILLS[skill](random)
        if is_held_out(item) == held_out:
            found[item.question] = item
        if len(found) == count:
            return list(found.values())
    raise ValueError(f"`{skill}` has fewer than {count} such questions")
