"""safetensors files written by hand, right or wrong."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any


def write_raw(file: Path, header: bytes | dict[str, Any], data: bytes = b"", length: int | None = None) -> Path:
    """A file of that header and data; `length` is what the first eight bytes claim the header's to be."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return file


def entry(dtype: str, shape: list[Any], begin: Any, end: Any) -> dict[str, Any]:
    """What a header says of one tensor."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
