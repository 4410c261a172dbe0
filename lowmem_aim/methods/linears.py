"""The linears in a tensor: their deltas, in tiles of rows, and the moments of these.

A linear is (out, in), or (in, out) as GPT-2 has it; a stack holds several of either. Rows come in tiles of `ROWS`,
which end with a matrix of a stack: products of one shape give the same bytes, whatever the memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lowmem_aim.methods.method import Rows, Subject
from lowmem_aim.methods.moments import MatrixSpace, Moment
from lowmem_aim.system.on_demand import torch
from lowmem_aim.system.tensor_store import Stored

if TYPE_CHECKING:
    from torch import Tensor

ROWS = 256  # of a linear, at a time
Solve = Callable[[Sequence["Tensor"]], "Tensor"]  # each expert's delta -> the solved one, all (outputs, inputs)


@dataclass(frozen=True)
class Linears:
    """The linears in a tensor: one, or a stack of them."""

    count: int
    height: int  # rows of one of them
    columns: int
    transposed: bool  # (in, out), not (out, in)

    @classmethod
    def of(cls, tensor: Subject) -> Linears:
        """The linears of a tensor, which must have at least two dimensions."""
        height, columns = tensor.shape[-2:]
        return cls(tensor.numel // max(height * columns, 1), height, columns, tensor.input_dim == -2)

    @property
    def inputs(self) -> int:
        """Input channels of each."""
        return self.height if self.transposed else self.columns

    def place(self, rows: Rows) -> tuple[int, int]:
        """The number of the linear that a tile of rows is of, and the first row in it."""
        return divmod(rows.start // self.columns, self.height)


def deltas_of(rows: Rows) -> list[Tensor]:
    """Each expert's delta, (rows, columns) float32."""
    base = rows.base
    return [expert - base for expert in rows.experts]


class DeltaMoments:
    """A fold of Di^T Di of every linear (out, in)."""

    def __init__(self, linears: Linears, experts: int, space: MatrixSpace) -> None:
        self._linears, self._space = linears, space
        self._moments = [[Moment(linears.inputs, space) for _ in range(experts)] for _ in range(linears.count)]

    def part(self, rows: Rows) -> Rows:
        """The rows themselves, which are there until they are added."""
        self._space.settle()
        return rows  # deltas would take more memory, in all slices that wait their turn

    def add(self, part: Rows) -> None:
        """Add a tile to its linear's moments. Raises DiskError."""
        base = part.base
        for moment, expert in zip(self._moments[self._linears.place(part)[0]], part.stored_experts, strict=True):
            moment.add(expert.to(torch.float32) - base)
        self._space.settle()  # the rows are let go of: other threads get their memory

    def finish(self) -> list[list[Moment]]:
        """The moments: of each linear, of each expert."""
        return self._moments


class Gathered:
    """A fold that keeps the deltas of linears (in, out), and gives them, and takes the solved ones, by outputs.

    They lie in squares of `ROWS` outputs and inputs, each (outputs, inputs).
    """

    def __init__(self, linears: Linears, experts: int, space: MatrixSpace) -> None:
        self._linears, self._experts, self._space = linears, experts, space
        self._kept: dict[tuple[int, int, int, int], Stored] = {}  # number, expert, first output, first input
        self._answers: dict[tuple[int, int, int], Stored] = {}  # number, first output, first input

    def part(self, rows: Rows) -> Rows:
        """The rows themselves, which are there until they are kept."""
        self._space.settle()
        return rows

    def add(self, part: Rows) -> None:
        """Keep a tile. Raises DiskError."""
        base, (number, first) = part.base, self._linears.place(part)
        for expert, stored in enumerate(part.stored_experts):
            turned = (stored.to(torch.float32) - base).T
            for output in self._outputs():
                self._kept[number, expert, output, first] = self._put(turned[output : output + ROWS])
        self._space.settle()

    def finish(self) -> Gathered:
        """The deltas, all of them kept."""
        return self

    def __del__(self) -> None:
        for slot in (*self._kept.values(), *self._answers.values()):
            self._space.store.drop(slot)

    def moments(self, number: int) -> list[Moment]:
        """Di Di^T of one linear (in, out)."""
        found = [Moment(self._linears.inputs, self._space) for _ in range(self._experts)]
        for output in self._outputs():
            for expert, moment in enumerate(found):
                moment.add(self._delta(number, expert, output))
        return found

    def by_outputs(self, number: int) -> Iterator[list[Tensor]]:
        """Yield the deltas of all experts for some outputs of one linear after another, (outputs, inputs)."""
        for output in self._outputs():
            yield [self._delta(number, expert, output) for expert in range(self._experts)]

    def solved(self, solutions: Sequence[Solve]) -> Callable[[Rows, int, int], Tensor]:
        """Solve all linears, and return the function that gives a tile of rows of the solved deltas."""
        for number, solution in enumerate(solutions):
            for output in self._outputs():
                found = solution([self._delta(number, expert, output) for expert in range(self._experts)])
                for first in self._inputs():
                    self._answers[number, output, first] = self._put(found[:, first : first + ROWS])

        def answers(rows: Rows, number: int, first: int) -> Tensor:
            assert first % ROWS == 0
            parts = [self._answers[number, output, first] for output in self._outputs()]
            return torch.cat([self._space.store.get(part).T for part in parts], dim=1)

        return answers

    def _outputs(self) -> range:
        return range(0, self._linears.columns, ROWS)

    def _inputs(self) -> range:
        return range(0, self._linears.height, ROWS)

    def _put(self, square: Tensor) -> Stored:
        return self._space.store.put(square.contiguous())

    def _delta(self, number: int, expert: int, output: int) -> Tensor:
        """Some outputs of an expert's delta, (outputs, inputs)."""
        parts = [self._kept[number, expert, output, first] for first in self._inputs()]
        return torch.cat([self._space.store.get(part) for part in parts], dim=1)
