"""Sequences that are run together: who shares a beginning, who lies side by side, and what a round holds."""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence

from lowmem_aim.measuring.batches import (
    CONTINUED,
    MEMBERS,
    SIDE_BY_SIDE,
    Group,
    among,
    batches_of,
    groups_of,
    rounds_of,
)


def sequences(*given: Sequence[int]) -> list[array[int]]:
    return [array("i", tokens) for tokens in given]


def read(groups: Sequence[Group], given: Sequence[array[int]]) -> dict[int, list[int]]:
    """The tokens that each sequence is made of in the batches, and those before them."""
    batches, found = batches_of(groups, given), dict[int, list[int]]()
    for batch in batches:
        for row, (member, length) in enumerate(zip(batch.members, batch.lengths, strict=False)):
            before = [] if batch.after is None else batches[batch.after].tokens[0].tolist()
            found[member] = before + batch.tokens[row, :length].tolist()
    return found


def test_each_sequence_is_in_one_batch_whole() -> None:
    rng = random.Random(0)
    stems = [[rng.randrange(3) for _ in range(rng.randrange(60))] for _ in range(9)]
    given = {tuple(rng.choice(stems) + [rng.randrange(3) for _ in range(rng.randint(1, 40))]) for _ in range(200)}
    some = sequences(*sorted(given))
    assert read(groups_of(some), some) == {number: list(tokens) for number, tokens in enumerate(some)}


def test_a_beginning_is_shared_where_that_saves_the_most() -> None:
    few, deep, other = [1] * 20, [1] * 20 + [2] * 30, [3] * 40
    some = sequences([*few, 9], [*deep, 4], [*deep, 5, 5], deep, other, [7])
    families = {(group.common, frozenset(group.members)) for group in groups_of(some)}
    # Of four that begin with 20 tokens alike, three have 50 in common: these save 100, all four together 60.
    assert families == {(50, frozenset({1, 2, 3})), (0, frozenset({4, 0})), (0, frozenset({5}))}
    assert all(group.common == 0 for group in groups_of(some, beginnings=False))


def test_short_beginnings_are_not_worth_it() -> None:
    (group,) = groups_of(sequences([1] * 10 + [2], [1] * 10 + [3]))
    assert group.common == 0


def test_batches_and_groups_are_bounded() -> None:
    begin = [1] * 100
    many = sequences(*([*begin, *[2] * n] for n in range(1, 101)))
    groups = groups_of(many)
    assert [len(group.members) for group in groups] == [MEMBERS, MEMBERS, MEMBERS, 100 - 3 * MEMBERS]
    for batch in batches_of(groups, many):
        rows, length = batch.tokens.shape
        assert rows <= CONTINUED
        assert rows * length <= max(SIDE_BY_SIDE, len(begin) + length)
    apart = sequences(*([n] * n for n in range(1, 200)))
    for batch in batches_of(groups_of(apart), apart):
        rows, length = batch.tokens.shape
        assert rows * length <= max(SIDE_BY_SIDE, length)
        assert all(2 * own >= length for own in batch.lengths)


def test_a_group_does_not_change_when_others_are_finished() -> None:
    some = sequences(*([*[number] * 40, ending] for number in range(5) for ending in (7, 8, 9)))
    groups = groups_of(some)
    wanted = set(groups[2].members) | set(groups[4].members) | {groups[1].members[0]}
    left = [among(group, wanted) for group in groups]
    assert (left[2], left[4]) == (groups[2], groups[4])
    assert (list(left[1].members), left[1].common) == ([groups[1].members[0]], 0)
    assert not left[0].members


def test_a_round_holds_no_more_than_it_may() -> None:
    some = sequences(*([number] * length for number, length in enumerate((1, 2, 20, 3, 9))))
    alone = [Group([number]) for number in (2, 4, 3, 1, 0)]
    rounds = [[group.members[0] for group in found] for found in rounds_of(alone, some, 12, 2)]
    assert rounds == [[2], [4, 3], [1, 0]]
    assert [len(found) for found in rounds_of(alone, some, 1000, 2)] == [2, 2, 1]
