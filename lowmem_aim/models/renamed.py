"""A model whose tensors appear under the names of another model, and in its form: experts stacked or apart."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from lowmem_aim.methods.footprint import Footprint
from lowmem_aim.models.checkpoint import Checkpoint
from lowmem_aim.models.correspondence import Piece, Pieces
from lowmem_aim.models.headers import TensorInfo
from lowmem_aim.models.wrapping import WrappingCheckpoint
from lowmem_aim.system.dtypes import DTYPES
from lowmem_aim.system.on_demand import torch
from lowmem_aim.system.tensors import empty_apart

if TYPE_CHECKING:
    from torch import Tensor


class RenamedCheckpoint(WrappingCheckpoint):
    """A checkpoint whose tensors are those of another one, whole or in pieces."""

    def __init__(self, model: Checkpoint, pieces: Pieces, reference: Checkpoint) -> None:
        """Give the tensors in `pieces` the names, and where they are cut the shapes, that they have in `reference`."""
        self._pieces = pieces
        used = {piece.tensor for parts in pieces.values() for piece in parts}
        tensors = {name: info for name, info in model.tensors.items() if name not in used}
        tensors |= {name: _info(name, parts, model, reference) for name, parts in pieces.items()}
        super().__init__(model, tensors, model.config)

    @property
    def numel(self) -> int:
        """The number of parameters."""
        return self.model.numel

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, as the model has them."""
        return self.model.nbytes

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start:stop, as `Checkpoint.rows`."""
        parts = [self.model.rows(tensor, first, end) for tensor, first, end in self._cut(name, start, stop)]
        if len(parts) == 1:
            return parts[0].view(stop - start, self.tensors[name].matrix[1])
        rows = torch.empty(stop - start, self.tensors[name].matrix[1], dtype=self.tensors[name].dtype.torch)
        place = 0
        for part in parts:
            rows[place : place + len(part)] = part
            place += len(part)
        return rows

    def tensor(self, name: str) -> Tensor:
        """A whole tensor in its own shape and dtype. Raises ModelError if its file has changed."""
        info, cuts = self.tensors[name], list(self._cut(name, 0, self.tensors[name].matrix[0]))
        if len(cuts) == 1:
            tensor, first, end = cuts[0]
            if (first, end) == (0, self.model.tensors[tensor].matrix[0]):
                return self.model.tensor(tensor).view(info.shape)
        whole, place = empty_apart(info.matrix, info.dtype.torch), 0
        for tensor, first, end in cuts:
            whole[place : place + end - first] = self.model.rows(tensor, first, end)
            place += end - first
        return whole.view(info.shape)

    def _cut(self, name: str, start: int, stop: int) -> Iterator[tuple[str, int, int]]:
        """Yield (tensor, its first row, its end) of all that rows start:stop are made of."""
        place = 0
        for piece in self._pieces.get(name) or (Piece(name, 0, self.tensors[name].matrix[0]),):
            first, end = max(start, place), min(stop, place + piece.rows)
            if first < end or start == stop:
                yield piece.tensor, piece.start + max(first - place, 0), piece.start + max(end - place, 0)
                if start == stop:
                    return
            place += piece.rows

    def repeats(self, head: str, embedding: str) -> bool:
        """Whether a stored head that is tied to its embedding is the embedding once more. Raises ModelError."""
        names = [self._pieces[name][0].tensor if name in self._pieces else name for name in (head, embedding)]
        return self.model.repeats(names[0], names[1])

    def expect(self, names: Iterable[str]) -> None:
        """Announce tensors that are read soon."""
        wanted = [piece.tensor for name in names for piece in self._pieces.get(name) or (Piece(name, 0, 0),)]
        self.model.expect(dict.fromkeys(wanted))

    @property
    def footprint(self) -> Footprint:
        """Bytes that reading takes besides the rows that it gives."""
        below = self.model.footprint
        largest = max((info.dtype.itemsize for info in self.tensors.values()), default=0)
        return replace(below, element=below.element + largest)  # pieces beside the rows that are put together of them

    def whole_bytes(self, name: str) -> int:
        """Bytes of RAM that reading a whole tensor takes, the result among them."""
        parts = self._pieces.get(name)
        if parts is None:
            return self.model.whole_bytes(name)
        below = max(self.model.whole_bytes(piece.tensor) for piece in parts)
        info = self.tensors[name]
        return below + info.numel * info.dtype.itemsize


def _info(name: str, parts: tuple[Piece, ...], model: Checkpoint, reference: Checkpoint) -> TensorInfo:
    infos = [model.tensors[piece.tensor] for piece in parts]
    first = infos[0]
    if len(parts) == 1 and parts[0].rows == first.matrix[0]:
        return replace(first, name=name)
    shape = reference.tensors[name].shape
    dtype = first.dtype if all(info.dtype == first.dtype for info in infos) else DTYPES["F32"]
    whole = replace(first, name=name, shape=shape, dtype=dtype)
    return replace(whole, end=first.begin + whole.numel * dtype.itemsize)
