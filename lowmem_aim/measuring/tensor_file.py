"""A file of tensors, one after another, that is whole and durable or absent, and whose digest tells damage."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import xxhash

from lowmem_aim.system.files import disk_errors, open_to_read, sync_folder
from lowmem_aim.system.on_demand import torch
from lowmem_aim.system.tensors import dtype_name, dtype_named, raw


class TensorsOut:
    """Appends tensors to a file, and digests what it appends."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self._state = stream, xxhash.xxh3_128()

    def put(self, value: Any) -> Any:
        """Append the tensors in a value, and return a description of the value from which `taken` restores it.

        A tensor is described by its dtype and shape, a tuple by its parts, anything else by itself.
        """
        if isinstance(value, tuple):
            return [self.put(part) for part in value]
        if not isinstance(value, torch.Tensor):
            return value
        data = raw(value.cpu().contiguous())
        self._stream.write(data)
        self._state.update(data)
        return {"dtype": dtype_name(value.dtype), "shape": list(value.shape)}

    def digest(self) -> str:
        """xxh3-128 of all that was appended, as 32 hex digits."""
        return str(self._state.hexdigest())


def taken(stream: IO[bytes], stored: Any) -> Any:
    """Read the next value of the file; `stored` is what `TensorsOut.put` returned for it."""
    if isinstance(stored, list):
        return tuple(taken(stream, part) for part in stored)
    if not isinstance(stored, dict):
        return stored
    value = torch.empty(stored["shape"], dtype=dtype_named(stored["dtype"]))
    stream.readinto(raw(value))  # type: ignore[attr-defined]
    return value


def digest_of_file(file: Path) -> str:
    """xxh3-128 of a file; empty if the file cannot be read."""
    state = xxhash.xxh3_128()
    try:
        with open_to_read(file, follow=False) as stream:
            while data := stream.read(8 << 20):
                state.update(data)
    except OSError:
        return ""
    return str(state.hexdigest())


@contextlib.contextmanager
def durable_tensors(file: Path) -> Iterator[TensorsOut]:
    """Write tensors to a new file, which is durable at the end of this block, or gone if writing it fails.

    Raises DiskError.
    """
    with disk_errors(file), _whole_or_absent(file) as stream:
        yield TensorsOut(stream)
        stream.flush()
        os.fsync(stream.fileno())
        sync_folder(file.parent)


@contextlib.contextmanager
def _whole_or_absent(file: Path) -> Iterator[IO[bytes]]:
    """Open a new file, and remove it again if writing it fails."""
    try:
        file.unlink(missing_ok=True)  # an older one of this number, or a link that leads elsewhere
        with file.open("xb") as stream:
            yield stream
    except BaseException:
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)
        raise
