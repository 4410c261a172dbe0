"""A checkpoint that reads from another one: whatever a class derived from it does not change is the other's."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowmem_aim.methods.footprint import Footprint
from lowmem_aim.models.checkpoint import Checkpoint
from lowmem_aim.models.headers import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor


class WrappingCheckpoint(Checkpoint):
    """A checkpoint in front of another one, `model`. Closing it closes that one."""

    def __init__(
        self, model: Checkpoint, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any], label: str = ""
    ) -> None:
        """`tensors` and `config` are what is seen in place of the model's own; `label` too, unless it is empty."""
        super().__init__(model.folder, label or model.label, config, tensors, model.read, model.oddities)
        self.model = model

    @property
    def place(self) -> tuple[Path, ...]:
        """The folders that the model is read from."""
        return self.model.place

    @property
    def labels(self) -> tuple[str, ...]:
        """The label of each folder in `place`."""
        return self.model.labels

    @property
    def adapter(self) -> str:
        """The adapter in it, in a few words; "" if it has none."""
        return self.model.adapter

    @property
    def files(self) -> list[Path]:
        """The files that hold tensors."""
        return self.model.files

    # -- reading

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start:stop of a tensor, as `Checkpoint.rows`."""
        return self.model.rows(name, start, stop)

    def tensor(self, name: str) -> Tensor:
        """A whole tensor in its own shape and dtype. Raises ModelError if a file has changed."""
        return self.model.tensor(name)

    def expect(self, names: Iterable[str]) -> None:
        """Announce tensors that are read soon."""
        self.model.expect(names)

    # -- memory

    @property
    def footprint(self) -> Footprint:
        """Bytes that reading takes besides the rows that it gives."""
        return self.model.footprint

    def whole_bytes(self, name: str) -> int:
        """Bytes of RAM that reading a whole tensor takes, the result among them."""
        return self.model.whole_bytes(name)

    def warm_up(self) -> None:
        """Load and compile whatever reading needs."""
        self.model.warm_up()

    # -- files

    def fingerprint(self) -> str:
        """A cheap identity of the files as they are on disk, as `Checkpoint.fingerprint`."""
        return self.model.fingerprint()

    def stats(self) -> dict[str, os.stat_result]:
        """File's name -> size, times and inode as they are now. Raises ModelError."""
        return self.model.stats()

    def check_unchanged(self) -> None:
        """Raise ModelError if a file has changed since it was opened."""
        self.model.check_unchanged()

    def close(self) -> None:
        """Close all files."""
        self.model.close()
