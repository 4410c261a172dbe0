"""Every method keeps to the memory that it declares; so do methods that declare none, by the default."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from method_cases import PARAMETERS

from lowmem_aim.methods.footprint import Footprint
from lowmem_aim.methods.method import Subject
from lowmem_aim.methods.registry import METHODS

PROGRAM = Path(__file__).parents[1] / "footprints.py"
ALLOWANCE_BYTES = 2_000_000  # what the kernel's counters lag behind, and small objects


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are the kernel's")
@pytest.mark.parametrize(
    ("shape", "dtype", "methods", "loops"),
    [
        ("512x1024", "bfloat16", ("widen", "arcee_fusion"), "1"),  # those that hold most
        pytest.param("512x1024", "bfloat16", (), "1", marks=pytest.mark.long),
        pytest.param("1024x1024", "bfloat16", (), "0", marks=pytest.mark.long),
        pytest.param("8x131072", "bfloat16", ("widen", "nuslerp"), "1", marks=pytest.mark.long),  # many columns
        pytest.param(
            "131072x8", "bfloat16", ("widen", "arcee_fusion", "della", "nuslerp"), "1", marks=pytest.mark.long
        ),  # many rows
        pytest.param("300000", "float32", ("widen", "arcee_fusion"), "1", marks=pytest.mark.long),
    ],
)
def test_no_method_takes_more_than_it_declares(shape: str, dtype: str, methods: tuple[str, ...], loops: str) -> None:
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "LOWMEM_AIM_KERNELS": loops}
    command = [sys.executable, str(PROGRAM), shape, dtype, *methods]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert {one["method"] for one in found} == set(methods or PARAMETERS)
    for one in found:
        assert one["slice"] <= one["limit"] + ALLOWANCE_BYTES, one
        assert one["tensor"] <= one["held"] + ALLOWANCE_BYTES, one


def test_every_method_of_this_package_declares_its_memory() -> None:
    assert [name for name, method in METHODS.items() if not method.package and method.takes is None] == []


@pytest.mark.parametrize("shape", [(200_000, 512), (64, 200_000), (97,), ()])
def test_a_method_that_declares_nothing_is_given_numbers_for_each_row_and_column(shape: tuple[int, ...]) -> None:
    from dataclasses import replace

    numel = 1
    for size in shape:
        numel *= size
    undeclared = replace(METHODS["widen"], takes=None)
    given = undeclared.footprint(Subject("t", shape, numel, 2), {}, True)
    columns = shape[-1] if shape else 1
    assert given.tensor >= 3 * 16 * (columns + numel // columns)
    assert given.part >= 3 * 8 * columns
    assert given | Footprint(element=10**6) == replace(given, element=10**6)
