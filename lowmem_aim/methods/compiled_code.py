"""The cache of loops that numba has compiled, so that only the first run of their kind waits for the compiler.

Files of the cache are made by numba, which reads them back as code: whoever may write to the folder may run code here,
as in any program's cache. They lie in $XDG_CACHE_HOME/lowmem_aim, or where NUMBA_CACHE_DIR says, and nowhere else:
numba's own choice would be the package's folder, and its settings can come from a file in the working directory.

A cache that cannot be written, or that is damaged, costs the time of compiling again, and never a run.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
from numba import njit
from numba.core.caching import CompileResultCacheImpl, FunctionCache

import lowmem_aim
from lowmem_aim.system.files import cache_folder

_ENVIRONMENT = "NUMBA_CACHE_DIR"


def folder() -> Path:
    """The folder of compiled code; it need not be there."""
    root = os.environ.get(_ENVIRONMENT)
    return (Path(root) if root else cache_folder()) / f"loops-{lowmem_aim.__version__}"


def trouble() -> str:
    """Why nothing can be kept in the folder, in words; empty if something can. The folder is made."""
    try:
        folder().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder()):
            return ""
    except OSError as error:
        return error.strerror or str(error)


def compiled(function: Callable[..., Any]) -> Any:
    """A function that numba compiles for each kind of arguments, or finds in the cache."""
    dispatcher = njit(nogil=True, error_model="numpy")(function)
    if not numba.config.DISABLE_JIT:  # else it is the function itself
        dispatcher._cache = _Cache(function)  # what `njit(cache=True)` does, which leaves the folder to numba
    return dispatcher


class _Place:
    """The place of one function's files, as numba asks for it."""

    def __init__(self, function: Any) -> None:
        self._py_file, self._line, self._folder = inspect.getfile(function), function.__code__.co_firstlineno, folder()

    def get_cache_path(self) -> str:
        """The folder."""
        return str(self._folder)

    def get_source_stamp(self) -> str:
        """A digest of the source file: compiled code of another source is of no use."""
        return _digest(self._py_file)

    def get_disambiguator(self) -> str:
        """A part of the files' names that tells functions of one name apart."""
        return str(self._line)

    def ensure_cache_path(self) -> None:
        """Make the folder. Raises OSError."""
        self._folder.mkdir(parents=True, exist_ok=True)


@functools.cache
def _digest(file: str) -> str:
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


class _Files(CompileResultCacheImpl):  # type: ignore[misc]
    """numba's files of one function. Its own constructor would choose the folder."""

    def __init__(self, function: Any) -> None:
        self._lineno = function.__code__.co_firstlineno
        self._locator = _Place(function)
        self._filename_base = self.get_filename_base(f"loops.{function.__qualname__}", "")


class _Cache(FunctionCache):  # type: ignore[misc]
    """numba's cache of one function, in which nothing that goes wrong is an error."""

    _impl_class = _Files

    def load_overload(self, signature: Any, context: Any) -> Any:
        """The compiled function for a signature; None if there is none that can be read."""
        try:
            return super().load_overload(signature, context)
        except Exception:  # a file cannot be read, or is damaged: unpickling raises anything
            return None

    def save_overload(self, signature: Any, result: Any) -> None:
        """Keep a compiled function, if that is possible."""
        try:
            super().save_overload(signature, result)
        except OSError:
            return
        except Exception:  # the index of what there is is damaged: it begins anew
            with contextlib.suppress(OSError):
                self.flush()
                super().save_overload(signature, result)
