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

    def part(self, rows: Rows) -> tuple[int, list[Tensor]]:
        """The number of a tile's linear, and the tile of each delta."""
        deltas = deltas_of(rows)
        self._space.settle()
        return self._linears.place(rows)[0], deltas

    def add(self, part: tuple[int, list[Tensor]]) -> None:
        """Add a tile to its linear's moments. Raises DiskError."""
        number, deltas = part
        for moment, delta in zip(self._moments[number], deltas, strict=True):
            moment.add(delta)

    def finish(self) -> list[list[Moment]]:
        """The moments: of each linear, of each expert."""
        return self._moments


class Gathered:
    """A fold that keeps the deltas of linears (in, out), and gives them, and takes the solved ones, by outputs."""

    def __init__(self, linears: Linears, experts: int, space: MatrixSpace) -> None:
        self._linears, self._experts, self._space = linears, experts, space
        self._kept: dict[tuple[int, int, int], Stored] = {}  # number, expert, first row -> (outputs, rows)
        self._answers: dict[tuple[int, int], Stored] = {}  # number, first output -> (outputs, inputs)

    def part(self, rows: Rows) -> tuple[tuple[int, int], list[Tensor]]:
        """The place of a tile, and the tile of each delta, (outputs, rows)."""
        deltas = [delta.T.contiguous() for delta in deltas_of(rows)]
        self._space.settle()
        return self._linears.place(rows), deltas

    def add(self, part: tuple[tuple[int, int], list[Tensor]]) -> None:
        """Keep a tile. Raises DiskError."""
        (number, first), deltas = part
        for expert, delta in enumerate(deltas):
            self._kept[number, expert, first] = self._space.store.put(delta)

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
            for moment, delta in zip(found, self._some_outputs(number, output), strict=True):
                moment.add(delta)
        return found

    def by_outputs(self, number: int) -> Iterator[list[Tensor]]:
        """Yield the deltas of all experts for some outputs of one linear after another, (outputs, inputs)."""
        return (self._some_outputs(number, output) for output in self._outputs())

    def solved(self, solutions: Sequence[Solve]) -> Callable[[Rows, int, int], Tensor]:
        """Solve all linears, and return the function that gives a tile of rows of the solved deltas."""
        for number, solution in enumerate(solutions):
            for output in self._outputs():
                found = solution(self._some_outputs(number, output))
                self._answers[number, output] = self._space.store.put(found)

        def answers(rows: Rows, number: int, first: int) -> Tensor:
            return torch.cat([part[:, first : first + rows.count].T for part in self._solved(number)], dim=1)

        return answers

    def _outputs(self) -> range:
        return range(0, self._linears.columns, ROWS)

    def _some_outputs(self, number: int, output: int) -> list[Tensor]:
        """The deltas of all experts for some outputs, (outputs, inputs)."""
        store, first_rows = self._space.store, range(0, self._linears.height, ROWS)
        return [
            torch.cat([store.get(self._kept[number, expert, row])[output : output + ROWS] for row in first_rows], dim=1)
            for expert in range(self._experts)
        ]

    def _solved(self, number: int) -> Iterator[Tensor]:
        return (self._space.store.get(self._answers[number, output]) for output in self._outputs())
