"""A program: the memory that each method really takes for one slice, beside what it declares, as lines of JSON.

    python tests/footprints.py SHAPE DTYPE [METHOD ...]

Run it in an environment with MALLOC_MMAP_THRESHOLD_=65536, so that what is freed goes back to the system at once.
"""

from __future__ import annotations

import gc
import json
import math
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from method_cases import PARAMETERS, resolved, tensors

from lowmem_aim.methods import kernels
from lowmem_aim.methods.method import Rounds, Rows, Subject
from lowmem_aim.methods.moments import MatrixSpace
from lowmem_aim.methods.registry import METHODS
from lowmem_aim.models.headers import matrix_shape
from lowmem_aim.system.tensor_store import TensorStore

# Beside the parameters of `method_cases`, those that take another way.
FURTHER: list[tuple[str, dict[str, Any]]] = [
    ("model_stock", {}),
    ("nuslerp", {"weight": (0.3, 0.4)}),
    ("nuslerp", {"weight": (0.3, 0.4), "nuslerp_flatten": False}),
]
SMALL = 4  # rows


def status(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def taken(work: Callable[[], Any]) -> tuple[Any, int]:
    """Return what `work` returns, and the bytes that it takes at its peak."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is in use
    before = status("VmRSS")
    result = work()
    return result, status("VmHWM") - before


def measured(method: str, given: dict[str, Any], shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[Any]:
    base, *experts = (
        t.to(dtype) for t in tensors(shape, min(METHODS[method].most or 3, len(given.get("weight", "123"))))
    )
    parameters = resolved(method, given, experts)
    subject = Subject("t", shape, math.prod(shape), len(experts), input_dim=-2 if shape[0] > shape[-1] else -1)
    if METHODS[method].rows_of_linears and not METHODS[method].texts:  # with its matrices in a file
        store = TensorStore(torch.device("cpu"), device_bytes=0, ram_bytes=0, folder=Path(tempfile.gettempdir()))
        subject = replace(subject, linear=True, space=MatrixSpace(store, torch.device("cpu")))
    flat = [t.reshape(matrix_shape(shape)) for t in (base, *experts)]
    rows = Rows(flat[0], tuple(flat[1:]), 0)
    script = METHODS[method].start(subject, parameters)
    of_slice, of_tensor = 0, 0
    held = Rounds(script)
    rounds = iter(held)
    fold, _ = taken(lambda: next(rounds, None))
    while fold is not None:
        part, own = taken(lambda fold=fold: fold.part(rows))
        of_slice = max(of_slice, own)
        own = taken(lambda fold=fold, part=part: fold.add(part))[1]
        of_tensor = max(of_tensor, own)
        del part
        fold, own = taken(lambda: next(rounds, None))
        of_tensor = max(of_tensor, own)
    own = taken(lambda: held.combine(rows))[1]
    declared = METHODS[method].footprint(subject, parameters, kernels.available())
    limit = declared.element * subject.numel + declared.slice + declared.part
    yield {"method": method, "slice": max(of_slice, own), "limit": limit, "tensor": of_tensor, "held": declared.tensor}


def main() -> None:
    shape = tuple(map(int, sys.argv[1].split("x")))
    dtype = getattr(torch, sys.argv[2])
    torch.set_num_threads(1)
    for method, given in [*PARAMETERS.items(), *FURTHER]:
        if len(sys.argv) > 3 and method not in sys.argv[3:]:
            continue
        list(measured(method, given, (*(min(SMALL, size) for size in shape[:-1]), shape[-1]), dtype))  # code is loaded
        for found in measured(method, given, shape, dtype):
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
