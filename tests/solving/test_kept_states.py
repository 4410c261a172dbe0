"""A merge that was stopped measures the same moments when it goes on, and loses one block."""

from __future__ import annotations

import errno
import itertools
import os
from pathlib import Path
from typing import Any

import pytest
from long_cases import others_long
from moment_cases import TEXTS, Matrices, expert_folders, measured, same
from stopping import Stopped

from lowmem_aim.blocks.runner import BlockRunner
from lowmem_aim.errors import DiskError
from lowmem_aim.events import Event, Notice
from lowmem_aim.output.folder import PRIVATE, STATES
from lowmem_aim.output.journal import Journal
from lowmem_aim.output.records import SolvingSnapshot
from lowmem_aim.output.workspace import workspace
from lowmem_aim.solving import kept_states
from lowmem_aim.solving.expert_moments import ExpertMoments
from lowmem_aim.solving.kept_states import KeptStates
from lowmem_aim.view.status import status_of

BLOCKS = 4


@pytest.fixture(autouse=True)
def each_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Snapshots whenever they may be made."""
    monkeypatch.setattr(kept_states, "SECONDS", 0.0)


@pytest.fixture
def driven(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of every block that is loaded."""
    blocks: list[int] = []
    loaded = BlockRunner.loaded

    def noted(runner: BlockRunner, index: int) -> Any:
        blocks.append(index)
        return loaded(runner, index)

    monkeypatch.setattr(BlockRunner, "loaded", noted)
    return blocks


class Merge:
    """The moments that a merge asks for, whose tensors are written `late` blocks after their moments were asked for."""

    def __init__(self, folders: list[Path], work: Path, late: int = 0, **options: Any) -> None:
        self.folders, self.work, self.late, self.options = folders, work, late, options
        self.written = 0  # blocks
        work.mkdir()

    def run(self, stop_at: int = BLOCKS, *, before: bool = False) -> Matrices:
        """Go on until block `stop_at` is measured, or, `before` that, until the block before it is written."""

        def each(moments: ExpertMoments, block: int) -> None:
            if block == stop_at and not before:
                raise Stopped
            if block - self.late >= self.written:
                moments.finished(self.written)
                self.written += 1
            if block + 1 == stop_at and before:
                raise Stopped

        with Journal(self.work) as journal:
            kept = KeptStates(self.work, journal)
            return measured(self.folders, range(self.written, BLOCKS), each=each, kept=kept, **self.options)

    def files(self) -> int:
        """The number of snapshots in the folder."""
        return len(list(self.work.glob(STATES)))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return expert_folders("llama", tmp_path_factory.mktemp("experts"), num_hidden_layers=BLOCKS)


@pytest.fixture(scope="module")
def expected(folders: list[Path]) -> Matrices:
    return measured(folders, range(BLOCKS))


STOPS = list(itertools.product((1, 2, 3), (0, 1, 2), (False, True)))


@pytest.mark.parametrize(
    ("stop_at", "late", "before"), others_long(STOPS, [(3, 0, False), (3, 0, True), (3, 1, False)])
)
def test_stopped_anywhere_it_goes_on_with_the_same_moments(
    stop_at: int, late: int, before: bool, folders: list[Path], expected: Matrices, tmp_path: Path, driven: list[int]
) -> None:
    merge = Merge(folders, tmp_path / "work", late)
    with pytest.raises(Stopped):
        merge.run(stop_at, before=before)
    assert merge.files() <= 2
    written = merge.written
    driven.clear()
    found = merge.run()
    assert found
    assert same(found, {key: own for key, own in expected.items() if key in found})
    assert {name.split(".")[2] for name, _ in found} == {str(block) for block in range(written, BLOCKS)}
    assert written - 1 <= min(driven) <= written  # one block is lost at most
    assert max(driven.count(block) for block in driven) == len(folders)


@pytest.mark.parametrize("late", [pytest.param(0, marks=pytest.mark.long), 1])
def test_stopped_with_merged_states_it_goes_on_with_the_same_moments(
    late: int, folders: list[Path], tmp_path: Path, driven: list[int]
) -> None:
    expected = measured(folders, range(BLOCKS), plus_plus=True)
    merge = Merge(folders, tmp_path / "work", late, plus_plus=True)
    with pytest.raises(Stopped):
        merge.run(3)
    written = merge.written
    driven.clear()
    found = merge.run()
    assert same(found, {key: own for key, own in expected.items() if key in found})
    assert {name.split(".")[2] for name, _ in found} == {str(block) for block in range(written, BLOCKS)}
    assert written - 1 <= min(driven)


def test_a_damaged_snapshot_and_one_of_other_texts_count_as_none(
    folders: list[Path], expected: Matrices, tmp_path: Path, driven: list[int]
) -> None:
    for name, texts in (("damaged", TEXTS), ("others", [TEXTS[1], TEXTS[0]])):
        merge = Merge(folders, tmp_path / name)
        with pytest.raises(Stopped):
            merge.run(3)
        if name == "damaged":
            for file in merge.work.glob(STATES):
                data = bytearray(file.read_bytes())
                data[100] ^= 1
                file.write_bytes(data)
        merge.options = {"texts": texts}
        driven.clear()
        found = merge.run()
        assert min(driven) == 0
        wanted = expected if name == "damaged" else measured(folders, [3], texts=texts)
        assert same(found, {key: own for key, own in wanted.items() if key in found})


def test_it_tells_where_it_goes_on(folders: list[Path], tmp_path: Path) -> None:
    merge = Merge(folders, tmp_path / "work")
    with pytest.raises(Stopped):
        merge.run(2)
    seen: list[Event] = []
    merge.options = {"emit": seen.append}
    merge.run()
    assert Notice(f"resuming: the texts have passed 2/{BLOCKS} blocks") in seen


def test_a_full_disk_is_an_error_and_the_snapshot_before_still_counts(
    folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, driven: list[int]
) -> None:
    merge = Merge(folders, tmp_path / "work")
    with pytest.raises(Stopped):
        merge.run(1)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(DiskError):
            merge.run(3)
    driven.clear()
    merge.run()
    assert min(driven) == 1


def test_a_run_that_has_kept_only_states_is_told_to_have_kept_something_and_fresh_discards_them(
    folders: list[Path], tmp_path: Path
) -> None:
    merge = Merge(folders, tmp_path / PRIVATE)
    with pytest.raises(Stopped):
        merge.run(2)
    assert status_of(tmp_path).kept
    assert merge.files()
    with workspace(tmp_path, fresh=True) as space:
        assert not merge.files()
        assert not space.journal.holds(SolvingSnapshot)
