"""Second moments of the inputs of a linear: symmetric matrices that may be larger than memory, in tiles of one size.

A matrix of 13,824 inputs has 764 MB. Of each, the tiles on and below the diagonal are kept, in a store that puts them
on the device, in RAM or in a file. All arithmetic is of whole tiles, in an order that follows from the size of the
matrix alone: where the tiles lie changes no byte of a result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

from lowmem_aim.system.on_demand import torch
from lowmem_aim.system.tensor_store import Stored, TensorStore

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
Place = tuple[int, int]  # row and column of a tile, in tiles; the row is not above the column
TILE = 1024  # rows and columns: 4 MB, enough to keep a GPU busy, and many of them fit in little memory
FLOAT = 4


class MatrixSpace:
    """The place where the matrices of a merge lie, and the threads that compute with them."""

    def __init__(
        self,
        store: TensorStore,
        device: torch.device,
        threads: int = 1,
        tell: Callable[[str], None] = lambda text: None,
    ) -> None:
        """`store` keeps tiles on `device`, in RAM or in a file; `tell` is given what the user should hear of."""
        self.store, self.device, self.tell = store, device, tell
        self._threads = threads
        self.singular: dict[str, str] = {}  # tensor -> what became of it, in the words of a sentence

    def each(self, work: Callable[[T], object], items: Iterable[T]) -> None:
        """Call work(item) for every item, in threads: the items depend on each other in nothing.

        In one thread where each operation of torch has several already, and on devices other than the CPU.
        """
        found = list(items)
        threads = min(self._threads, len(found))
        if threads < 2 or torch.get_num_threads() > 1 or self.device.type != "cpu":
            for item in found:
                work(item)
            return
        with ThreadPoolExecutor(threads) as pool:
            for done in [pool.submit(work, item) for item in found]:
                done.result()

    def settle(self) -> None:
        """Wait until all that this thread has begun on the device is computed: other threads use it next."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()


class Tiles:
    """The tiles of one matrix on and below its diagonal, (size, size) float32. Those that were never put are zero."""

    def __init__(self, size: int, space: MatrixSpace) -> None:
        self.size, self.space = size, space
        self._slots: dict[Place, Stored] = {}

    def get(self, place: Place) -> Tensor | None:
        """A tile on the device; None if it is zero. Raises DiskError."""
        slot = self._slots.get(place)
        return None if slot is None else self.space.store.get(slot)

    def put(self, place: Place, tile: Tensor) -> None:
        """Keep a tile, which must not change from now on. Raises DiskError."""
        self._slots[place] = self.space.store.put(tile.contiguous(), self._slots.get(place))

    def drop(self) -> None:
        """Forget the matrix: it is zero again."""
        for slot in self._slots.values():
            self.space.store.drop(slot)
        self._slots.clear()

    def __del__(self) -> None:
        self.drop()  # a merge makes thousands of matrices, and the store's memory must not depend on when it is asked

    @property
    def is_zero(self) -> bool:
        """Whether nothing was put."""
        return not self._slots

    @property
    def side(self) -> int:
        """The number of tiles in a row of the matrix."""
        return -(-self.size // TILE)

    def span(self, place: int) -> slice:
        """The rows, or columns, of the tiles in a row of tiles."""
        return slice(place * TILE, min((place + 1) * TILE, self.size))

    def places(self) -> Iterator[Place]:
        """Yield the place of each tile on and below the diagonal."""
        return ((row, column) for row in range(self.side) for column in range(row + 1))


class Moment(Tiles):
    """A sum of x^T x over rows x: symmetric, of which the lower half is kept."""

    def add(self, rows: Tensor, done: set[Place] | None = None) -> None:
        """Add rows^T rows of `rows`, (rows, size) float32 on the device. The sum depends on how rows are grouped.

        `done` collects the tiles to which the rows are added, and those that it has already are left: with it, a call
        of which an allocation failed can be repeated.
        """
        done = set() if done is None else done

        def added(place: Place) -> None:
            left, right = (rows[:, self.span(part)] for part in place)
            before = self.get(place)
            self.put(place, left.T @ right if before is None else torch.addmm(before, left.T, right))
            done.add(place)

        self.space.each(added, [place for place in self.places() if place not in done])

    def diagonal(self) -> Tensor:
        """The diagonal, (size,) float32 on the device."""
        whole = torch.zeros(self.size, device=self.space.device)
        for place in range(self.side):
            tile = self.get((place, place))
            if tile is not None:
                whole[self.span(place)] = tile.diagonal()
        return whole

    def times(self, rows: Tensor, into: Tensor) -> None:
        """Add rows @ self to `into`; both (rows, size) float32 on the device."""
        for column in range(self.side):
            for row in range(self.side):
                tile = self.get((max(row, column), min(row, column)))
                if tile is not None:
                    into[:, self.span(column)].addmm_(rows[:, self.span(row)], tile if row >= column else tile.T)


def moment_bytes(size: int) -> int:
    """Bytes of a matrix of so many rows and columns, as `Tiles` keeps it."""
    side = -(-size // TILE)
    below = side * (side - 1) // 2 * TILE * TILE
    last = size - (side - 1) * TILE
    # Of the tiles below the diagonal, those in the last row have fewer rows.
    below -= (side - 1) * (TILE - last) * TILE
    return FLOAT * (below + (side - 1) * TILE * TILE + last * last)
