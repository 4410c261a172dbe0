"""The figures of what measuring moments takes are what it takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
from moment_cases import TEXTS, expert_folders, moments_of, names_in

from lowmem_aim.blocks.shares import Needs
from lowmem_aim.methods.moments import moment_bytes
from lowmem_aim.models.checkpoint import Checkpoint
from lowmem_aim.models.meta_model import MetaModel, load_meta_model
from lowmem_aim.solving import input_moments, needs
from lowmem_aim.solving.input_moments import InputMoments
from lowmem_aim.solving.needs import matrices_bytes, needs_of_moments


def meta_model_of(folder: Path) -> MetaModel:
    with Checkpoint.open(folder) as checkpoint:
        return load_meta_model(checkpoint)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
def test_the_matrices_of_a_block_take_what_is_told(architecture: str, tmp_path: Path) -> None:
    folders = expert_folders(architecture, tmp_path)
    sizes = dict[int, int]()
    with moments_of(folders) as moments:
        moments.come_to(1)
        for name in names_in(folders[0], 1, moments):
            sizes |= {id(own): own.size for row in moments.of([name] * 2) for own in row if own}
        assert matrices_bytes(list(map(meta_model_of, folders))) == sum(map(moment_bytes, sizes.values()))


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_no_more_rows_wait_than_is_told(architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(input_moments, "ROWS", 16)
    monkeypatch.setattr(input_moments, "EXPERT_ROWS", 8)
    most, settle = [0], InputMoments.settle

    def watched(moments: InputMoments) -> None:
        forwards = [rows for forward in moments._counted for rows in forward.rows]
        waiting = [rows for total in set(moments._sums.values()) for rows in total.waiting]
        most[0] = max(most[0], sum(rows.nbytes for rows in (*forwards, *waiting)))
        settle(moments)

    monkeypatch.setattr(InputMoments, "settle", watched)
    folders = expert_folders(architecture, tmp_path)
    with moments_of(folders) as moments:
        moments.come_to(0)
    told = max(needs.waiting_bytes(meta_model_of(folder), own) for folder, own in zip(folders, TEXTS, strict=True))
    assert told / 3 < most[0] <= told


def test_states_and_what_lies_beside_the_blocks_are_those_of_all_experts(tmp_path: Path) -> None:
    folder = tiny.build("llama", tmp_path / "model")
    model = meta_model_of(folder)
    alone = Needs.of(model, TEXTS[0])
    found = needs_of_moments([(model, TEXTS[0]), (model, TEXTS[0])], beside=1000)
    assert found.states == 2 * alone.states
    assert (found.block, found.module, found.work) == (alone.block, alone.module, alone.work)
    assert found.beside == 2 * alone.beside + needs.waiting_bytes(model, TEXTS[0]) + 1000
