"""What a run leaves behind is removed while the run still holds the lock, never after."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import Place

from lowmem_aim.errors import DiskError
from lowmem_aim.output import workspace as module
from lowmem_aim.output.workspace import workspace
from lowmem_aim.system.lock import is_held


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether the lock was held, at each clearing of a private folder."""
    seen: list[bool] = []
    clear = module._clear

    def clearing(private: Path) -> None:
        seen.append(is_held(private / "lock"))
        clear(private)

    monkeypatch.setattr(module, "_clear", clearing)
    return seen


def test_of_a_run_that_had_finished_nothing(tmp_path: Path, held: list[bool]) -> None:
    with pytest.raises(DiskError), workspace(tmp_path / "a" / "out"):
        raise DiskError("full")
    assert held == [True]
    assert list(tmp_path.iterdir()) == []


def test_of_a_calibration_that_is_done(place: Place, texts: Path, held: list[bool]) -> None:
    made = place.folder / "made.safetensors"
    words = ("--calibration", texts, "--block-size", "16", "--output", made)
    assert place.run("calibrate", place.folder / "base", *words).code == 0
    assert held == [True]
    assert made.is_file()
    assert not (place.folder / "made.safetensors.partial").exists()
