"""Strange things in the place of a sweep's own files are refused by name: links, pipes, scores of others."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from lowmem_aim.errors import UsageError
from lowmem_aim.evaluating.tasks import Asked
from lowmem_aim.jobs.scored_points import ScoredPoints
from lowmem_aim.jobs.swept import Swept
from lowmem_aim.output.records import SweepSize
from lowmem_aim.output.sweep_folder import check_sweep_folder, sweep_folder

Make = Callable[[Path], None]


def link(path: Path) -> None:
    path.symlink_to(path.parents[-2])


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """The folder of a sweep with one point."""
    with sweep_folder(tmp_path / "out") as folder:
        folder.note("point", "recipe")
        folder.journal.keep(SweepSize(1, 1, finished=True))
        folder.scores_of("point").write_text('{"name": "point", "scores": {"sums": 0.5}}')
        (folder.models / "point").mkdir()
    check_sweep_folder(folder.out)
    return folder.out


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("scores", link),
        ("report", link),
        ("models", Path.touch),
        ("models/point", link),
        ("scores/point.json", link),
        ("scores/other.json", os.mkfifo),
        ("experts/expert.json", Path.mkdir),
        ("recipes/point.yml", link),
        ("adds-most.yml", os.mkfifo),
        ("search.jsonl", link),
    ],
)
@pytest.mark.skipif(os.name != "posix", reason="links and pipes")
def test_what_is_no_file_or_folder_of_a_sweep_is_refused(out: Path, name: str, make: Make) -> None:
    place = out / name
    if place.exists():
        place.rename(out.parent / "aside")
    make(place)
    with pytest.raises(UsageError) as told, sweep_folder(out):
        pass
    [problem] = told.value.problems
    assert f"`{place}` is no " in problem


def test_scores_of_another_point_are_refused(out: Path) -> None:
    (out / "scores" / "point.json").write_text(json.dumps({"name": "other", "scores": {"sums": 0.5}}))
    with sweep_folder(out) as folder, pytest.raises(UsageError, match=r"point.json` has the scores of `other`"):
        ScoredPoints(Swept((), Asked(("sums",))), folder, ()).comparison()
