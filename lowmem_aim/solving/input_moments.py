"""Second moments of the inputs of a block's matrices, gathered while texts run: a `Statistic` of the observer.

Rows are added to a moment so many at a time, in the order of the texts. How many follows from the weight alone: the
sums are the same numbers whatever fits in memory. Matrices that are always given the same inputs (queries, keys and
values) share one moment.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lowmem_aim.blocks.observer import Operand, routed
from lowmem_aim.errors import ModelError, printable
from lowmem_aim.methods.moments import MatrixSpace, Moment, Place

# Rows added at a time: enough to keep a processor busy. Of fused experts, a block may have hundreds: each has fewer
# rows that wait.
ROWS, EXPERT_ROWS = 1024, 256

Matrix = tuple[str, int]  # a parameter, and which of its matrices


def rows_at_once(matrices: int) -> int:
    """The number of rows that are added at a time to the moment of a parameter with so many matrices."""
    return EXPERT_ROWS if matrices > 1 else ROWS


class InputMoments:
    """The second moments of one block's inputs in one expert."""

    def __init__(self, space: MatrixSpace, label: str) -> None:
        """`label`: what the expert is called in messages."""
        self._space, self._label = space, label
        self.weights: dict[str, Operand] = {}  # those that were given something, by parameter
        self._sums: dict[Matrix, _Sum] = {}
        self._now = _Forward()
        self._counted: deque[_Forward] = deque()  # forwards whose rows are in no sum yet

    def meet(self, weight: Operand) -> None:
        """Do nothing: a matrix has a moment once it is given something."""

    def note(self, weight: Operand, number: int, x: Tensor, *, padded: bool = False) -> None:
        """Note `x`, (..., channels), the input of matrix `number`; vectors have no moments."""
        if len(weight.shape) < 2:
            return
        place = self._now.place_of(x, padded=padded)
        if len(self._now.rows[place]):
            self.weights.setdefault(weight.parameter, weight)
            self._now.given.setdefault((weight.parameter, number), []).append(place)

    def commit(self) -> None:
        """Count what the last forward was given."""
        if self._now.given:
            self._counted.append(self._now.ended())
        self._now = _Forward()

    def discard(self) -> None:
        """Drop what was noted: the forward that gave it has failed."""
        self._now = _Forward()

    def settle(self) -> None:
        """Add the rows of counted forwards, as far as they fill what is added at a time."""
        while self._counted:
            forward = self._counted[0]
            self._divide(forward)
            for total in self._distinct():
                total.wait(forward)
            self._counted.popleft()
        for total in self._distinct():
            total.add()

    def check(self, prefix: str) -> None:
        """Add all rows that wait: the block ends. Raises ModelError naming a module whose inputs are not finite."""
        self.settle()
        for total in self._distinct():
            total.add(rest=True)
            if not bool(total.moment.diagonal().isfinite().all()):
                module = printable(total.matrices[0][0].removesuffix(".weight"))
                raise ModelError(
                    f"solving: in `{printable(self._label)}`, the inputs of `{module}` overflow or are not numbers",
                    hint="is this model sound? if it is, run it in a wider dtype (`solve: {dtype: float32}`); it "
                    "runs as it is, whatever `--nonfinite` says",
                )

    def leave_device(self) -> bool:
        """Move the moments of all experts off the device, for good. Returns False if there were none."""
        return self._space.store.leave_device()

    def taken(self) -> dict[Matrix, Moment]:
        """The moments of all matrices that were given something; the next block begins with none."""
        found = {matrix: total.moment for matrix, total in self._sums.items()}
        self._sums = {}
        return found

    def _distinct(self) -> Iterator[_Sum]:
        return iter(dict.fromkeys(self._sums.values()))

    def _divide(self, forward: _Forward) -> None:
        """Give each matrix of a forward its sum: one for those that were always given the same, this time included.

        If an allocation fails, the next call goes on there.
        """
        alike: dict[tuple[int, int, tuple[int, ...]], list[Matrix]] = {}
        for matrix in dict.fromkeys((*self._sums, *forward.given)):
            known = self._sums.get(matrix)
            at_once = rows_at_once(self.weights[matrix[0]].matrices)
            places = tuple(forward.given.get(matrix, ()))
            alike.setdefault((0 if known is None else id(known), at_once, places), []).append(matrix)
        kept = set[int]()
        for (known_as, at_once, _), matrices in alike.items():
            total = self._sums.get(matrices[0])
            if total is None:
                channels = self.weights[matrices[0][0]].channels
                total = _Sum(Moment(channels, self._space), at_once)
            elif known_as in kept:
                total = total.copy()  # until now they were given the same
            kept.add(known_as)
            total.matrices = matrices
            self._sums.update(dict.fromkeys(matrices, total))


@dataclass
class _Forward:
    """The inputs of a block's matrices in one forward."""

    rows: list[Tensor] = field(default_factory=list)  # (rows, channels) of each input
    given: dict[Matrix, list[int]] = field(default_factory=dict)  # numbers of inputs, in the order of the calls
    _places: dict[tuple[object, ...], int] = field(default_factory=dict)
    _held: list[Tensor] = field(default_factory=list)  # so that the memory of an input is no other tensor's meanwhile

    def place_of(self, x: Tensor, *, padded: bool) -> int:
        """The number of an input; one that several modules are given has one number."""
        # The version tells a tensor that was changed in place from what it was before.
        key = (x.data_ptr(), x.shape, x.stride(), x.dtype, x._version, padded)
        if key not in self._places:
            rows = x.detach().reshape(-1, x.shape[-1])
            # Copied, since the model may go on to change them in place.
            self.rows.append(routed(rows) if padded else rows.clone())
            self._places[key] = len(self.rows) - 1
            self._held.append(x)
        return self._places[key]

    def ended(self) -> _Forward:
        """Let go of what only matters during the forward."""
        self._places.clear()
        self._held.clear()
        return self


@dataclass(eq=False)
class _Sum:
    """A moment, and the rows that wait to be added to it."""

    moment: Moment
    at_once: int
    matrices: list[Matrix] = field(default_factory=list)  # that are given these rows
    waiting: list[Tensor] = field(default_factory=list)
    done: set[Place] = field(default_factory=set)  # tiles to which the next rows are added already

    def wait(self, forward: _Forward) -> None:
        """Take the rows that the matrices were given in a forward."""
        self.waiting += [forward.rows[place] for place in forward.given.get(self.matrices[0], ())]

    def add(self, *, rest: bool = False) -> None:
        """Add the rows that wait, `at_once` at a time; with `rest`, also fewer. A failed call can be repeated."""
        left = sum(map(len, self.waiting))
        while left >= self.at_once or (rest and left):
            count = min(left, self.at_once)
            self.moment.add(self._first(count), self.done)
            self.done.clear()
            self._remove(count)
            left -= count

    def _first(self, count: int) -> Tensor:
        """The first rows that wait, (count, channels) float32."""
        found = torch.empty(count, self.moment.size, device=self.waiting[0].device)
        filled = 0
        for rows in self.waiting:
            part = rows[: count - filled]
            found[filled : filled + len(part)] = part
            filled += len(part)
        return found

    def _remove(self, count: int) -> None:
        while count:
            rows = self.waiting.pop(0)
            if len(rows) > count:
                self.waiting.insert(0, rows[count:])
            count -= min(count, len(rows))

    def copy(self) -> _Sum:
        """Copy the sum as it is now."""
        moment = Moment(self.moment.size, self.moment.space)
        for place in moment.places():
            tile = self.moment.get(place)
            if tile is not None:
                moment.put(place, tile)
        return _Sum(moment, self.at_once, list(self.matrices), list(self.waiting), set(self.done))
