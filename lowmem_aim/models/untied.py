"""A model with a tied head as one with a head of its own: its embedding, read under the head's name.

Nothing is copied. The config says untied, so whoever looks at the model sees what the output is: an untied model.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowmem_aim.methods.footprint import Footprint
from lowmem_aim.models.checkpoint import Checkpoint
from lowmem_aim.models.config import TEXT, TIES

if TYPE_CHECKING:
    from torch import Tensor


class UntiedCheckpoint(Checkpoint):
    """A tied checkpoint as an untied one. Closing it closes the checkpoint that it was made of."""

    def __init__(self, tied: Checkpoint, pairs: Mapping[str, str]) -> None:
        """`pairs`: the head's weight -> the embedding's weight that it shares, of which `tied` holds at least one."""
        self.tied, self.pairs = tied, pairs
        self._stored = {name: name for name in tied.tensors}  # our name of a tensor -> its name in `tied`
        for head, embedding in pairs.items():
            stored = embedding if embedding in tied.tensors else head
            self._stored |= {head: stored, embedding: stored}
        tensors = {name: replace(tied.tensors[stored], name=name) for name, stored in self._stored.items()}
        super().__init__(tied.folder, tied.label, untied(tied.config), tensors, tied.read, tied.oddities)

    @property
    def place(self) -> tuple[Path, ...]:
        """The folders that the model is read from."""
        return self.tied.place

    @property
    def labels(self) -> tuple[str, ...]:
        """The label of each folder in `place`."""
        return self.tied.labels

    @property
    def adapter(self) -> str:
        """The adapter in it, in a few words; "" if it has none."""
        return self.tied.adapter

    @property
    def files(self) -> list[Path]:
        """The files that hold tensors."""
        return self.tied.files

    @property
    def numel(self) -> int:
        """The number of parameters, those that are shared counted once."""
        return self.tied.numel

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, those that are shared counted once."""
        return self.tied.nbytes

    # -- reading

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start:stop of a tensor, as `Checkpoint.rows`; the head's are the embedding's."""
        return self.tied.rows(self._stored[name], start, stop)

    def tensor(self, name: str) -> Tensor:
        """A whole tensor in its own shape and dtype. Raises ModelError if a file has changed."""
        return self.tied.tensor(self._stored[name])

    def expect(self, names: Iterable[str]) -> None:
        """Announce tensors that are read soon."""
        self.tied.expect(dict.fromkeys(self._stored[name] for name in names))

    # -- memory

    @property
    def footprint(self) -> Footprint:
        """Bytes that reading takes besides the rows that it gives."""
        return self.tied.footprint

    def whole_bytes(self, name: str) -> int:
        """Bytes of RAM that reading a whole tensor takes, the result among them."""
        return self.tied.whole_bytes(self._stored[name])

    def warm_up(self) -> None:
        """Load and compile whatever reading needs."""
        self.tied.warm_up()

    # -- files

    def fingerprint(self) -> str:
        """A cheap identity of the files: that of the tied model, since what is measured of the two is the same."""
        return self.tied.fingerprint()

    def stats(self) -> dict[str, os.stat_result]:
        """File's name -> size, times and inode as they are now. Raises ModelError."""
        return self.tied.stats()

    def check_unchanged(self) -> None:
        """Raise ModelError if a file has changed since it was opened."""
        self.tied.check_unchanged()

    def close(self) -> None:
        """Close all files."""
        self.tied.close()


def untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the same model with a head of its own: the key is false, in tables within it too."""
    tables = {key: value for key, value in config.items() if isinstance(value, Mapping)}
    inner = {key: untied(value) for key, value in tables.items() if TIES in value or key == TEXT}
    return {**config, **inner, TIES: False}
