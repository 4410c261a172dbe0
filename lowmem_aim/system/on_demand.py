"""torch and numpy, imported when they are first used: `from lowmem_aim.system.on_demand import torch`.

torch takes more than a second to import. A recipe, folders and headers are read without it, so that what is wrong with
them is told at once. Files that are imported before a model is run take torch from here; `blocks`, and what runs
models, import it as usual.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any


class _OnDemand(ModuleType):
    """A module whose attributes are those of the library that it is named after."""

    def __getattr__(self, name: str) -> Any:
        """An attribute of the library, which is imported if it has not been yet. Raises AttributeError."""
        library = sys.modules.get(self.__name__)
        if library is None or getattr(library.__spec__, "_initializing", False):
            with uncollected():
                library = importlib.import_module(self.__name__)
        return getattr(library, name)


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Put off garbage collection during an import, which makes a million objects that all stay: a fifth of its time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


if TYPE_CHECKING:
    import numpy as numpy
    import torch as torch
else:
    numpy = _OnDemand("numpy")
    torch = _OnDemand("torch")
