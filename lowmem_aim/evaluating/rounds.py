"""The rounds in which questions are answered: what is read in each, and what that takes of memory."""

from __future__ import annotations

from array import array
from collections.abc import Sequence, Set
from dataclasses import dataclass

from lowmem_aim.blocks.past import can_continue
from lowmem_aim.blocks.shares import Needs
from lowmem_aim.evaluating.questions import Reading
from lowmem_aim.evaluating.scoring import WORK_BYTES
from lowmem_aim.events import Emit, Notice, silent
from lowmem_aim.measuring.batches import Group, among, groups_of, lengths_of, rounds_of
from lowmem_aim.measuring.mean_activations import needs_of
from lowmem_aim.models.meta_model import MetaModel

# Of the disk that a round may take, its hidden states get a part: the last snapshot of them and the next lie beside.
COPIES = 3
MOST_SEQUENCES = 20_000  # of a round: each takes some memory, however short it is
SEQUENCE_BYTES = 2048  # of these


@dataclass(frozen=True)
class Rounds:
    """The readings of all questions, and those of them that are left, in groups, round by round."""

    readings: Sequence[Reading]
    groups: Sequence[Sequence[Group]]  # of each round; never empty

    @property
    def sequences(self) -> list[array[int]]:
        """The tokens of each reading."""
        return [reading.tokens for reading in self.readings]

    @property
    def members(self) -> list[int]:
        """The numbers of the readings that are left."""
        return [number for groups in self.groups for group in groups for number in group.members]

    @property
    def shared(self) -> int:
        """Tokens that need not be run, because several readings begin with them."""
        return sum(group.common * (len(group.members) - 1) for groups in self.groups for group in groups)


def needs_of_round(groups: Sequence[Group], sequences: Sequence[array[int]], meta_model: MetaModel) -> Needs:
    """The needs of a round. Beside its batches, two sequences are run alone, to compare. Raises ModelError."""
    longest = range(max(len(sequences[number]) for group in groups for number in group.members))
    sizes = [size for group in groups for size in lengths_of(group, sequences)]
    members = sum(len(group.members) for group in groups)
    beside = WORK_BYTES + SEQUENCE_BYTES * members
    return needs_of(meta_model, [longest, longest, *map(range, sizes)], beside=beside)


def in_rounds(
    readings: Sequence[Reading],
    wanted: Set[int],
    meta_model: MetaModel,
    spill: int,
    *,
    alone: bool = False,
    emit: Emit = silent,
) -> Rounds:
    """Cut the readings that are wanted, at least one, into rounds that take `spill` bytes of disk at most.

    `alone`: this model runs none of them together. What is run together is decided among all readings, and rounds have
    the same size whatever the budget: a resumed run decides alike.
    """
    sequences = [reading.tokens for reading in readings]
    groups = [Group([number]) for number in range(len(readings))] if alone else _together(sequences, meta_model, emit)
    some = (among(group, wanted) for group in groups)
    tokens = max(1, spill // COPIES // needs_of(meta_model, [range(1)]).states)
    found = rounds_of((group for group in some if group.members), sequences, tokens, MOST_SEQUENCES)
    return Rounds(readings, list(found))


def _together(sequences: Sequence[array[int]], meta_model: MetaModel, emit: Emit) -> list[Group]:
    groups = groups_of(sequences)
    if any(group.common for group in groups) and not can_continue(meta_model.model):
        why = "this model passes on more than keys and values: what requests begin with alike is read for each"
        emit(Notice(why, "warning"))
        return groups_of(sequences, beginnings=False)
    return groups
