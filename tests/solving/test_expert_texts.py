"""Each expert reads its own texts with its own tokenizer, or the texts of all."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import tiny

from lowmem_aim.errors import ModelError
from lowmem_aim.events import Emit, Event, Notice, silent
from lowmem_aim.measuring.calibration import Measurement
from lowmem_aim.measuring.texts import TextSettings
from lowmem_aim.models.checkpoint import Checkpoint
from lowmem_aim.models.reader import Reader
from lowmem_aim.solving.texts import ExpertTexts, read_texts

SHARED = TextSettings("builtin", samples=2, block_size=16, pack=False, dtype="")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in (1, 2):
        tiny.build("llama", tmp_path / f"expert{number}", seed=number)
    (tmp_path / "own.jsonl").write_text(json.dumps({"text": "abcdefghijklmnopqrst"}) + "\n")
    return tmp_path


def read(
    folder: Path, calibrations: Sequence[str], settings: TextSettings = SHARED, emit: Emit = silent
) -> list[Measurement]:
    with contextlib.ExitStack() as stack:
        experts = [stack.enter_context(Checkpoint.open(folder / f"expert{number}")) for number in (1, 2)]
        with Reader() as reader:
            return read_texts(settings, calibrations, experts, reader, emit)


def test_an_expert_without_texts_of_its_own_gets_those_of_all(folder: Path) -> None:
    own, shared = map(ExpertTexts.of, read(folder, [str(folder / "own.jsonl"), ""]))
    assert [len(tokens) for tokens in own.sequences] == [16]
    assert (len(shared.sequences), shared.tokens) == (2, 32)
    assert own.meta_model is not shared.meta_model


def test_a_context_that_is_shorter_than_a_block_is_told_only_of_texts_that_it_cuts(folder: Path) -> None:
    (folder / "long.txt").write_text("a b c " * 100)
    told: list[Event] = []
    read(
        folder, [str(folder / name) for name in ("own.jsonl", "long.txt")], replace(SHARED, block_size=512), told.append
    )
    assert [notice.text for notice in told if isinstance(notice, Notice)] == [
        "the sequences have at most 128 tokens: `expert2` allows no more"
    ]


def test_the_problems_of_all_experts_are_told_at_once(folder: Path) -> None:
    with pytest.raises(ModelError) as caught:
        read(folder, [str(folder / "none.jsonl"), str(folder / "neither.jsonl")])
    assert len(caught.value.problems) == 2


def test_texts_that_are_too_short_are_told_with_a_way_out_that_is_not_aims(folder: Path) -> None:
    (folder / "short.txt").write_text("x")
    with pytest.raises(ModelError, match="only 1 token") as caught:
        read(folder, [str(folder / "short.txt"), ""])
    assert "--calibration" not in caught.value.hint
