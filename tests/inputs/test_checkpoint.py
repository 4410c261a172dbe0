"""Model folders: what is read is what safetensors reads, and whatever is malformed is refused by name."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from raw import entry, write_raw
from safetensors.torch import load_file, save_file

from lowmem_aim.errors import ModelError
from lowmem_aim.models.checkpoint import Checkpoint
from lowmem_aim.system.tensors import digest

READS = ["mmap", "pread"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards and an index; odd shapes and dtypes."""
    made = tmp_path / "model"
    made.mkdir()
    generator = torch.Generator().manual_seed(0)
    first = {"a": torch.randn(5, 7, generator=generator), "b": torch.randn(11, generator=generator).bfloat16()}
    second = {"c": torch.randn(2, 3, 5, generator=generator).half(), "n": torch.arange(6), "s": torch.tensor(2.5)}
    save_file(first, made / "x-1.safetensors")
    save_file(second, made / "x-2.safetensors")
    weight_map = {**dict.fromkeys(first, "x-1.safetensors"), **dict.fromkeys(second, "x-2.safetensors")}
    (made / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (made / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return made


@pytest.mark.parametrize("read", READS)
def test_tensors_and_rows_are_those_of_the_safetensors_library(folder: Path, read: Any) -> None:
    truth = load_file(folder / "x-1.safetensors") | load_file(folder / "x-2.safetensors")
    with Checkpoint.open(folder, read=read) as checkpoint:
        assert set(checkpoint.tensors) == set(truth)
        for name, expected in truth.items():
            assert torch.equal(checkpoint.tensor(name), expected)
            rows, columns = checkpoint.tensors[name].matrix
            flat = expected.reshape(rows, columns)
            for start in range(0, rows, 2):
                stop = min(start + 2, rows)
                assert torch.equal(checkpoint.rows(name, start, stop), flat[start:stop])


def test_a_model_of_many_shards_maps_one_window_at_a_time(folder: Path) -> None:
    with Checkpoint.open(folder) as checkpoint:
        checkpoint.expect(checkpoint.tensors)  # advice changes nothing
        held = checkpoint.rows("a", 0, 5)
        before = held.clone()
        for name in ("c", "a", "c"):
            checkpoint.rows(name, 0, 1)
            mapped = checkpoint.stored.mapped
            assert mapped == [checkpoint.tensors[name].file]
        assert torch.equal(held, before)  # what is still in use stays


@pytest.mark.parametrize("read", READS)
def test_a_tensor_larger_than_the_window_is_read_through_it(tmp_path: Path, monkeypatch: Any, read: Any) -> None:
    monkeypatch.setattr("lowmem_aim.models.tensor_files.WINDOW_BYTES", 8192)
    big = torch.randn(1001, 37)
    save_file({"lead": torch.randn(3), "big": big}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with Checkpoint.open(tmp_path, read=read) as checkpoint:
        parts = [checkpoint.rows("big", i, min(i + 13, 1001)).clone() for i in range(0, 1001, 13)]
    assert torch.equal(torch.cat(parts), big)


def test_a_tensor_at_an_odd_offset_is_read(tmp_path: Path) -> None:
    values = torch.tensor([1.5, -2.0])
    header = {"odd": entry("U8", [3], 0, 3), "w": entry("F32", [2], 3, 11)}
    write_raw(tmp_path / "model.safetensors", header, b"abc" + values.numpy().tobytes())
    (tmp_path / "config.json").write_text("{}")
    with Checkpoint.open(tmp_path) as checkpoint:
        assert torch.equal(checkpoint.tensor("w"), values)


def test_inputs_are_opened_for_reading_only(folder: Path) -> None:
    before = {f: f.read_bytes() for f in folder.iterdir()}
    with Checkpoint.open(folder) as checkpoint:
        checkpoint.tensor("a").fill_(7)  # the mapping is private: even this cannot reach the file
    assert {f: f.read_bytes() for f in folder.iterdir()} == before


@pytest.mark.parametrize("read", READS)
def test_a_file_that_shrinks_while_it_is_read_is_an_error_not_a_crash(folder: Path, read: Any) -> None:
    with Checkpoint.open(folder, read=read) as checkpoint:
        checkpoint.rows("a", 0, 1)
        os.truncate(folder / "x-1.safetensors", 100)
        with pytest.raises(ModelError, match=r"x-1.safetensors` changed while it was being read"):
            checkpoint.rows("a", 4, 5)


def test_digest_is_of_the_bytes() -> None:
    ones = torch.ones(3, dtype=torch.bfloat16)
    assert digest(ones) == digest(ones.clone()) != digest(torch.ones(3, dtype=torch.float16))


class TestFolders:
    def refused(self, folder: Path, match: str) -> None:
        with pytest.raises(ModelError, match=match):
            Checkpoint.open(folder)

    def test_missing(self, tmp_path: Path) -> None:
        self.refused(tmp_path / "none", "no model folder")

    def test_without_config(self, folder: Path) -> None:
        (folder / "config.json").unlink()
        self.refused(folder, r"no config\.json")

    def test_config_is_no_table(self, folder: Path) -> None:
        (folder / "config.json").write_text("[1]")
        self.refused(folder, "not a JSON object")

    def test_quantised_config(self, folder: Path) -> None:
        (folder / "config.json").write_text('{"quantization_config": {"bits": 4}}')
        self.refused(folder, "quantised")

    def test_pickle_only(self, folder: Path) -> None:
        for file in [*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"]:
            file.unlink()
        (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
        with pytest.raises(ModelError, match="only pickle") as caught:
            Checkpoint.open(folder)
        assert "`lowmem-aim convert FOLDER NEW`" in caught.value.hint

    def test_nothing_at_all(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text("{}")
        self.refused(tmp_path, "has neither model.safetensors nor")

    def test_a_folder_of_models_is_one_problem_and_the_hint_names_them(self, llama: Path, tmp_path: Path) -> None:
        for name in ("base", "math"):
            (tmp_path / name).symlink_to(llama / name)
        with pytest.raises(ModelError) as caught:
            Checkpoint.open(tmp_path)
        assert caught.value.problems == (f"`{tmp_path}` is not a model folder: it has no config.json and no weights",)
        assert caught.value.hint == f"name one of the models in it: `{tmp_path / 'base'}`, `{tmp_path / 'math'}`"

    def test_all_broken_shards_are_listed_at_once(self, folder: Path) -> None:
        os.truncate(folder / "x-1.safetensors", 40)
        (folder / "x-2.safetensors").unlink()
        with pytest.raises(ModelError) as caught:
            Checkpoint.open(folder)
        text = "\n".join(caught.value.problems)
        assert "x-1.safetensors` is not a valid" in text
        assert "'x-2.safetensors', which is missing" in text

    def test_a_tensor_that_is_not_in_its_shard(self, folder: Path) -> None:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        index["weight_map"]["ghost"] = "x-1.safetensors"
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        self.refused(folder, "lacks `ghost`")

    @pytest.mark.parametrize(
        "name",
        ["../x.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "", "a\0b", "C:x", "a\\b", 3, None, ["x"]],
    )
    def test_a_shard_name_that_is_no_plain_file_name(self, folder: Path, name: Any) -> None:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
        self.refused(folder, "not a plain file name")

    def test_a_shard_that_is_a_directory(self, folder: Path) -> None:
        (folder / "x-1.safetensors").unlink()
        (folder / "x-1.safetensors").mkdir()
        self.refused(folder, "missing")

    @pytest.mark.parametrize("content", ["[]", '{"weight_map": []}', "{", '{"weight_map": {}}'])
    def test_an_index_without_a_weight_map(self, folder: Path, content: str) -> None:
        (folder / "model.safetensors.index.json").write_text(content)
        self.refused(folder, "no `weight_map`|not valid JSON")
