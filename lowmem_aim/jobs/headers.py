"""Models found as planning needs them: here as they are, from the Hub as headers without weights."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lowmem_aim.events import Emit
from lowmem_aim.models.hub import Located, local_model
from lowmem_aim.models.stand_in import stand_in
from lowmem_aim.system.files import cache_folder, disk_errors, real


class Headers:
    """A finder of models; those that are not here are stood in for by their headers."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack = stack  # at its end, the stand-ins are removed
        self._scratch: Path | None = None
        self.missing: dict[str, int] = {}  # label -> bytes to download

    def find(self, reference: str, emit: Emit, adapter: bool = False) -> Located:
        """The folder of a model or an adapter, or of its stand-in. Raises ModelError, NetworkError or DiskError."""
        if here := local_model(reference, adapter):
            self.missing[here.label] = 0
            return here
        self._scratch = self._scratch or self._stack.enter_context(scratch_folder())
        folder = self._scratch / f"{len(self.missing)}" / reference.replace("/", "--")[:100]
        found = stand_in(reference, folder, emit, adapter)
        self.missing[found.located.label] = found.missing_bytes
        return found.located

    def stands_in(self, folder: Path) -> bool:
        """Whether a folder holds headers in a model's place."""
        return self._scratch is not None and real(self._scratch) in real(folder).parents


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A temporary folder in the cache, or where the system keeps such folders if the cache cannot be written."""
    with contextlib.ExitStack() as stack:
        try:
            cache_folder().mkdir(parents=True, exist_ok=True)
            made = tempfile.TemporaryDirectory(prefix="stand-ins-", dir=cache_folder())
        except OSError:
            with disk_errors(cache_folder()):
                made = tempfile.TemporaryDirectory(prefix="lowmem-aim-stand-ins-")
        yield Path(stack.enter_context(made))
