"""Second moments, block by block and within any budget, are those of an ordinary forward."""

from __future__ import annotations

from pathlib import Path

import pytest
from long_cases import others_long
from moment_cases import TEXTS, by_an_ordinary_forward, expert_folders, measured
from torch import Tensor

from lowmem_aim.methods import moments as tiles
from lowmem_aim.solving import input_moments

KINDS = ("llama", "gpt2", "gemma3_text", "mixtral", "qwen3_moe", "deepseek_v3")
BY_ARCHITECTURE = others_long(KINDS, KINDS[:4])


@pytest.fixture(autouse=True)
def many_small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles a matrix, and several groups of rows."""
    monkeypatch.setattr(tiles, "TILE", 20)
    monkeypatch.setattr(input_moments, "ROWS", 16)
    monkeypatch.setattr(input_moments, "EXPERT_ROWS", 8)


def is_close(found: Tensor | None, expected: Tensor) -> bool:
    return found is not None and bool((found - expected).norm() <= 1e-5 * expected.norm())


@pytest.mark.parametrize("architecture", BY_ARCHITECTURE)
def test_they_are_those_of_an_ordinary_forward(architecture: str, tmp_path: Path) -> None:
    folders = expert_folders(architecture, tmp_path)
    found = measured(folders)
    for number, (folder, texts) in enumerate(zip(folders, TEXTS, strict=True)):
        expected = by_an_ordinary_forward(folder, texts)
        assert {name for (name, _), own in found.items() if own[number] is not None} == expected.keys()
        for name, matrix in expected.items():
            assert is_close(found[name, 0][number], matrix), name
