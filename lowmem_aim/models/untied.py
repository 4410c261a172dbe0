"""A model with a tied head as one with a head of its own: its embedding, read under the head's name.

Nothing is copied. The config says untied, so whoever looks at the model sees what the output is: an untied model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lowmem_aim.models.checkpoint import Checkpoint
from lowmem_aim.models.config import TEXT, TIES
from lowmem_aim.models.wrapping import WrappingCheckpoint

if TYPE_CHECKING:
    from torch import Tensor


class UntiedCheckpoint(WrappingCheckpoint):
    """A tied checkpoint as an untied one: whatever identifies its files, and what is measured of them, is the same."""

    def __init__(self, tied: Checkpoint, pairs: Mapping[str, str]) -> None:
        """`pairs`: the head's weight -> the embedding's weight that it shares, of which `tied` holds at least one."""
        self.pairs = pairs
        self._stored = {name: name for name in tied.tensors}  # our name of a tensor -> its name in `tied`
        for head, embedding in pairs.items():
            stored = embedding if embedding in tied.tensors else head
            self._stored |= {head: stored, embedding: stored}
        tensors = {name: replace(tied.tensors[stored], name=name) for name, stored in self._stored.items()}
        super().__init__(tied, tensors, untied(tied.config))

    @property
    def numel(self) -> int:
        """The number of parameters, those that are shared counted once."""
        return self.model.numel

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, those that are shared counted once."""
        return self.model.nbytes

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start:stop of a tensor, as `Checkpoint.rows`; the head's are the embedding's."""
        return self.model.rows(self._stored[name], start, stop)

    def tensor(self, name: str) -> Tensor:
        """A whole tensor in its own shape and dtype. Raises ModelError if a file has changed."""
        return self.model.tensor(self._stored[name])

    def expect(self, names: Iterable[str]) -> None:
        """Announce tensors that are read soon."""
        self.model.expect(dict.fromkeys(self._stored[name] for name in names))

    def whole_bytes(self, name: str) -> int:
        """Bytes of RAM that reading a whole tensor takes, the result among them."""
        return self.model.whole_bytes(self._stored[name])


def as_tied(checkpoint: Checkpoint) -> UntiedCheckpoint | None:
    """The tied model that a checkpoint, or one that it reads from, shows as untied; None if there is none."""
    while isinstance(checkpoint, WrappingCheckpoint):
        if isinstance(checkpoint, UntiedCheckpoint):
            return checkpoint
        checkpoint = checkpoint.model
    return None


def untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the same model with a head of its own: the key is false, in tables within it too."""
    tables = {key: value for key, value in config.items() if isinstance(value, Mapping)}
    inner = {key: untied(value) for key, value in tables.items() if TIES in value or key == TEXT}
    return {**config, **inner, TIES: False}
