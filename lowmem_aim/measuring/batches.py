"""Sequences that are run together: side by side, and what several begin with only once.

What a causal model computes at a token depends on no later one. So sequences of different lengths can lie side by side,
the shorter ones filled up at their end. And of a beginning that several have in common, the keys and values are kept
while a block runs, and the rest of each sequence continues it.

Which sequences are run together depends on nothing but their tokens: sums of another shape round otherwise.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor

# More rows of a matrix product make each of them cheaper, up to some 200, and all of them take memory at once.
SIDE_BY_SIDE = 256
SHORTEST = 16  # tokens in a common beginning: less saves nothing
CONTINUED = 4  # sequences that continue a beginning at a time: its keys and values are copied for each
MEMBERS = 32  # of a group with a common beginning: what is finished or lost, is that as a whole


@dataclass(frozen=True)
class Group:
    """Sequences that are run together, by their numbers, the longest first."""

    members: Sequence[int]
    common: int = 0  # tokens that all begin with, run once


@dataclass(frozen=True)
class Batch:
    """Rows of tokens that a block is given in one call."""

    tokens: Tensor  # (rows, tokens) int64
    members: Sequence[int]  # of each row: the number of its sequence; none: a beginning that is no sequence itself
    lengths: Sequence[int]  # of each row: how many of its tokens are the sequence's; the rest fills it up
    after: int | None = None  # the number of the batch with the beginning that these rows continue

    @property
    def is_plain(self) -> bool:
        """Whether this is one whole sequence."""
        return self.after is None and len(self.tokens) == 1


def groups_of(sequences: Sequence[array[int]], beginnings: bool = True) -> list[Group]:
    """Divide all sequences, no two of which are the same, into groups; the group with the longest one comes first.

    `beginnings`: whether beginnings may be shared.
    """
    if not sequences:
        return []
    order = sorted(range(len(sequences)), key=lambda number: sequences[number].tobytes())
    common = [_common(sequences[one], sequences[other]) for one, other in itertools.pairwise(order)]

    def by_length(number: int) -> tuple[int, bytes]:
        return (-len(sequences[number]), sequences[number].tobytes())

    groups, alone = list[Group](), list[int]()
    for begin, end in _families(common if beginnings else [0] * len(common)):
        members = sorted(order[begin:end], key=by_length)
        for some in (members[start : start + MEMBERS] for start in range(0, len(members), MEMBERS)):
            if len(some) > 1:
                groups.append(Group(some, min(common[begin : end - 1])))
            else:
                alone += some
    groups += map(Group, _side_by_side(sorted(alone, key=by_length), [len(tokens) for tokens in sequences]))
    return sorted(groups, key=lambda group: by_length(group.members[0]))


def among(group: Group, wanted: Set[int]) -> Group:
    """The group without the sequences that are not wanted."""
    left = [number for number in group.members if number in wanted]
    return Group(left, group.common if len(left) > 1 else 0)


def lengths_of(group: Group, sequences: Sequence[array[int]]) -> Iterator[int]:
    """Yield the tokens of each of a group's batches, a beginning's last."""
    own = {number: len(sequences[number]) - group.common for number in group.members}
    for some in _rows_of(group, own):
        yield len(some) * own[some[0]]
    if group.common:
        yield group.common


def rounds_of(
    groups: Iterable[Group], sequences: Sequence[array[int]], tokens: int, most: int
) -> Iterator[list[Group]]:
    """Yield groups whose batches have at most so many `tokens`, and at most `most` members; or a single group."""
    found, left, count = list[Group](), tokens, 0
    for group in groups:
        size = sum(lengths_of(group, sequences))
        if found and (size > left or count + len(group.members) > most):
            yield found
            found, left, count = [], tokens, 0
        found.append(group)
        left -= size
        count += len(group.members)
    if found:
        yield found


def groups_in_order(groups: Iterable[Group]) -> list[Group]:
    """The same groups, their members numbered one after another."""
    count = itertools.count()
    return [Group([next(count) for _ in group.members], group.common) for group in groups]


def batches_of(groups: Iterable[Group], sequences: Sequence[array[int]]) -> list[Batch]:
    """The batches that run these groups. A beginning stands behind what continues it, and is needed before."""
    batches = list[Batch]()
    for group in groups:
        begin = group.common
        own = {number: len(sequences[number]) - begin for number in group.members}
        rows = _rows_of(group, own)
        after = len(batches) + len(rows) if begin else None
        batches += [
            Batch(
                _filled([sequences[number][begin:] for number in some]), some, [own[number] for number in some], after
            )
            for some in rows
        ]
        if begin:
            first = sequences[group.members[0]][:begin]
            whole = [number for number in group.members if not own[number]]
            batches.append(Batch(_filled([first]), whole, [begin]))
    return batches


def _rows_of(group: Group, own: dict[int, int]) -> list[list[int]]:
    """The members of each batch of rows; `own`: the tokens that each has for itself."""
    some = [number for number in group.members if own[number]]
    if group.common:
        return _side_by_side(some, own, CONTINUED, group.common)
    return _side_by_side(some, own)


def _side_by_side(
    numbers: Sequence[int], lengths: Sequence[int] | dict[int, int], most: int = SIDE_BY_SIDE, before: int = 0
) -> list[list[int]]:
    """Cut sequences, the longest first, into rows that are run side by side."""
    found = list[list[int]]()
    for number in numbers:
        if found:
            longest, rows = lengths[found[-1][0]], len(found[-1]) + 1
            fits = rows <= most and rows * longest <= max(SIDE_BY_SIDE, before + longest)
            if fits and (before or 2 * lengths[number] >= longest):  # else more would fill up than be read
                found[-1].append(number)
                continue
        found.append([number])
    return found


def _filled(rows: Sequence[array[int]]) -> Tensor:
    """(rows, tokens) int64, short rows filled up with token 0: some token that there is."""
    filled = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    for row, tokens in zip(filled, rows, strict=True):
        row[: len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
    return filled


def _common(one: array[int], other: array[int]) -> int:
    """The number of tokens that two sequences have in common at their beginning."""
    length = min(len(one), len(other))
    differ = numpy.asarray(one[:length]) != numpy.asarray(other[:length])
    return int(differ.argmax()) if differ.any() else length


# --- who shares a beginning -------------------------------------------------------------------------------------------


@dataclass
class _Node:
    """A common beginning of neighbours in the order of sequences, while they are gone through."""

    depth: int  # tokens
    first: int  # of the neighbours
    parts: list[tuple[int, int]]  # the best division of these: (first, end) each
    saved: int  # tokens that need not be run, in that division

    def close(self, end: int) -> None:
        """Take all neighbours together, if that saves more than their parts do."""
        saved = (end - self.first - 1) * self.depth if self.depth >= SHORTEST else 0
        if saved > self.saved:
            self.parts, self.saved = [(self.first, end)], saved


def _families(common: Sequence[int]) -> list[tuple[int, int]]:
    """The division of sequences in order into (first, end) that saves the most tokens.

    `common`: tokens that each has in common with the next. Neighbours that begin alike are a tree of beginnings, which
    is gone through from the leaves: at each node, either all below it share that beginning, or they stay as they are.
    """
    path = [_Node(0, 0, [], 0)]
    for place, depth in enumerate([*common, 0]):
        done = _Node(0, place, [(place, place + 1)], 0)
        while path[-1].depth > depth:
            node = path.pop()
            node.parts += done.parts
            node.saved += done.saved
            node.close(place + 1)
            done = node
        if path[-1].depth < depth:
            path.append(_Node(depth, done.first, [], 0))
        path[-1].parts += done.parts
        path[-1].saved += done.saved
    return path[0].parts
