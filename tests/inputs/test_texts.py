"""Calibration texts become the token sequences that the documentation promises."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from lowmem_aim.errors import ModelError, NetworkError, UsageError
from lowmem_aim.events import Event, Notice, silent
from lowmem_aim.measuring.texts import TextSettings, token_sequences
from lowmem_aim.recipe.recipe import Aim


def encode(texts: Sequence[str]) -> list[list[int]]:
    return [one(text) for text in texts]


def one(text: str) -> list[int]:
    """A token a word, its length; behind a special 1, as tokenizers put it."""
    return [1, *(len(word) for word in text.split())]


def sequences(path: str | Path, **settings: Any) -> list[list[int]]:
    aim = Aim(calibration=str(path), **settings)
    return [sequence.tolist() for sequence in token_sequences(TextSettings.of(aim), encode, silent)]


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    file = tmp_path / "t.jsonl"
    texts = ["  a bb ccc\n", "   ", "dddd " * 20, "e" * 7, "ff " * 30]
    file.write_text("\n\n".join(json.dumps({"text": text, "other": 1}) for text in texts) + "\n")
    return file


def test_packed_texts_are_joined_and_cut_and_the_remainder_is_dropped(jsonl: Path) -> None:
    joined = [1, 1, 2, 3, 1, *[4] * 20, 1, 7, 1, *[2] * 30]
    assert sequences(jsonl, block_size=16) == [joined[:16], joined[16:32], joined[32:48]]


def test_unpacked_texts_run_by_themselves_cut_at_block_size(jsonl: Path) -> None:
    assert sequences(jsonl, block_size=16, pack=False) == [[1, 1, 2, 3], [1, *[4] * 15], [1, 7], [1, *[2] * 15]]


def test_samples_counts_texts_in_file_order(jsonl: Path) -> None:
    assert sequences(jsonl, block_size=16, pack=False, samples=2) == [[1, 1, 2, 3], [1, *[4] * 15]]


def test_less_than_one_block_is_one_block_with_a_warning(jsonl: Path) -> None:
    seen: list[Event] = []
    aim = Aim(calibration=str(jsonl), block_size=512)
    (only,) = token_sequences(TextSettings.of(aim), encode, seen.append)
    assert len(only) == 4 + 21 + 2 + 31
    assert [event.level for event in seen if isinstance(event, Notice)] == ["warning"]


def test_paragraphs_of_a_text_file_are_its_texts(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("\n\na bb\nccc " + "d " * 20 + "\n \t\n\ne " + "ff " * 20 + "\n")
    assert sequences(tmp_path / "t.txt", pack=False, block_size=16) == [[1, 1, 2, 3, *[1] * 12], [1, 1, *[2] * 14]]


def test_the_builtin_text_fills_the_default_samples_with_many_blocks() -> None:
    found = sequences("builtin")
    assert len(found) > 40
    assert {len(sequence) for sequence in found} == {512}


class _Rows(list[dict[str, str]]):
    column_names = ("text",)

    def shuffle(self, seed: int) -> _Rows:
        assert seed == 42
        self.reverse()
        return self


def fake_datasets(monkeypatch: pytest.MonkeyPatch, rows: Any, splits: list[str]) -> None:
    def load(name: str, split: str) -> Any:
        assert (name, split) == ("some/set", "validation" if "validation" in splits else splits[0])
        if isinstance(rows, Exception):
            raise rows
        return rows

    fake = types.ModuleType("datasets")
    fake.load_dataset = load  # type: ignore[attr-defined]
    fake.get_dataset_split_names = lambda name: splits  # type: ignore[attr-defined]
    fake.config = types.SimpleNamespace(HF_HUB_OFFLINE=False)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", fake)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: None)


def test_a_hub_dataset_is_shuffled_and_long_texts_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = _Rows({"text": text} for text in ("a " * 15, "b " * 16, " cc " * 15, "", "d " * 99, "eee " * 3))
    fake_datasets(monkeypatch, rows, ["train", "validation"])
    found = sequences("some/set", block_size=16, pack=False, samples=2)
    assert found == [[1, 3, 3, 3], [1, *[2] * 15]]


@pytest.mark.parametrize(
    ("answers", "said"), [(True, "cannot be loaded: broken"), (False, "the Hub cannot be reached, and nothing of it")]
)
def test_a_hub_dataset_that_cannot_be_had_says_what_to_pass(
    answers: bool, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library, which would retry for half a minute, is held offline where the Hub does not answer."""
    from huggingface_hub import HfApi, constants

    def asked(self: HfApi, *_: Any, **__: Any) -> None:
        if not answers:
            raise ConnectionError("no route")

    offline = []

    def splits(name: str) -> list[str]:
        offline.append(constants.HF_HUB_OFFLINE)
        raise ValueError("broken")

    fake_datasets(monkeypatch, ValueError("broken"), ["train"])
    monkeypatch.setattr("datasets.get_dataset_split_names", splits)
    monkeypatch.setattr(HfApi, "dataset_info", asked)
    before = constants.HF_HUB_OFFLINE
    with pytest.raises(NetworkError, match=said) as caught:
        sequences("some/set")
    assert "builtin" in caught.value.hint
    assert offline == [before or not answers]
    assert before == constants.HF_HUB_OFFLINE


def test_without_the_datasets_package_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match=r"lowmem-aim\[data\]"):
        sequences("some/set")


def test_a_dataset_without_texts_is_an_input_error(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = _Rows()
    rows.column_names = ("audio",)  # type: ignore[assignment]
    fake_datasets(monkeypatch, rows, ["train"])
    with pytest.raises(ModelError, match="no column `text`"):
        sequences("some/set")
