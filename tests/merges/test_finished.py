"""A finished output is of its inputs as they were: if they have changed since, that is told, and exit 7."""

from __future__ import annotations

import json
import os
import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from calibrating import activations_of
from long_cases import others_long
from merge_cases import digests, recipe
from stopping import SHARDS, stopping_after

from lowmem_aim.errors import ResumeError, UsageError, VerifyError
from lowmem_aim.jobs.merge import merge
from lowmem_aim.jobs.plan import plan
from lowmem_aim.merging.slices import TensorInputs
from lowmem_aim.output.folder import PRIVATE, SUMS
from lowmem_aim.output.journal import Journal
from lowmem_aim.output.records import VERSION, Schema
from lowmem_aim.output.verify import verify
from lowmem_aim.recipe.reader import read_recipe
from lowmem_aim.recipe.recipe import Recipe, Tokenizer
from lowmem_aim.recipe.yaml_tree import tree_of
from lowmem_aim.relaxing.activations import Activations


@pytest.fixture
def models(llama: Path, tmp_path: Path) -> Path:
    """Copies that may be changed."""
    for name in ("base", "math", "code", "chat"):
        tiny.perturbed(llama / name, tmp_path / "models" / name, scale=0.0)
    return tmp_path / "models"


@pytest.mark.parametrize(
    ("name", "cut", "message"),
    others_long(
        [
            ("model.safetensors.index.json", 0, "is missing"),
            ("model-00001-of-", 0, "is missing"),
            ("model-00001-of-", 5, "bytes instead of"),
            ("tokenizer.json", 0, "is missing"),
        ],
        [("model-00001-of-", 0, "is missing")],
    ),
)
def test_an_output_that_has_lost_files_is_not_called_finished(
    name: str, cut: int, message: str, models: Path, tmp_path: Path
) -> None:
    job, out = recipe(models, "ties"), tmp_path / "out"
    merge(job, out, SHARDS)
    (file,) = out.glob(f"{name}*")
    if cut:
        os.truncate(file, file.stat().st_size - cut)
    else:
        file.unlink()
    with pytest.raises(VerifyError, match=message) as caught:
        merge(job, out, SHARDS)
    assert "was finished, but is damaged" in caught.value.problems[0]
    assert plan(job, out, SHARDS, measure=False).exit_code == VerifyError.exit_code


class TestChangedInputsOfAFinishedOutput:
    """Times or inodes that differ lead to reading again; other content is exit 7, with what changed."""

    def finished(self, models: Path, out: Path, **flags: Any) -> Recipe:
        job = recipe(models, "ties", **flags)
        merge(job, out, SHARDS)
        return job

    def again(self, job: Recipe, out: Path) -> list[str]:
        notices: list[str] = []
        merge(job, out, SHARDS, stopping_after(0, notices))
        return notices

    def refused(self, job: Recipe, out: Path, *messages: str) -> None:
        before = digests(out)
        for fresh in (False, True):
            with pytest.raises(ResumeError) as caught:
                merge(job, out, replace(SHARDS, fresh=fresh))
            assert "its inputs have changed since" in caught.value.problems[0]
            assert all(any(message in problem for problem in caught.value.problems) for message in messages)
            assert "name a new folder, or remove this one" in caught.value.hint
        assert digests(out) == before

    def test_weights_of_the_same_size(self, models: Path, tmp_path: Path) -> None:
        job = self.finished(models, tmp_path / "out")
        tiny.edit_tensors(models / "math", lambda tensors: tensors["model.norm.weight"].add_(1))
        self.refused(job, tmp_path / "out", "`math` no longer has the same `model.norm.weight`")

    def test_weights_that_were_copied_back_with_the_old_time(self, models: Path, tmp_path: Path) -> None:
        """Another inode is enough to look."""
        job, file = self.finished(models, tmp_path / "out"), models / "math" / "model.safetensors"
        times = file.stat().st_atime_ns, file.stat().st_mtime_ns
        other = models / "other"
        other.write_bytes(file.read_bytes()[:-4] + b"\0\0\x80\x3f")
        os.replace(other, file)
        os.utime(file, ns=times)
        self.refused(job, tmp_path / "out", "`math` no longer has the same")

    def test_other_tensors_and_several_models(self, models: Path, tmp_path: Path) -> None:
        job = self.finished(models, tmp_path / "out")
        for name in ("math", "chat"):
            tiny.edit_tensors(models / name, lambda tensors: tensors.update({"more": torch.ones(2)}))
        self.refused(
            job, tmp_path / "out", *(f"`{n}` no longer has the same tensors or files" for n in ("math", "chat"))
        )

    @pytest.mark.parametrize("name", others_long(["tokenizer_config.json", "config.json"], ["config.json"]))
    def test_small_files_of_the_base(self, name: str, models: Path, tmp_path: Path) -> None:
        job, file = self.finished(models, tmp_path / "out"), models / "base" / name
        file.write_text(json.dumps(json.loads(file.read_text()) | {"an_addition": 1}))
        self.refused(job, tmp_path / "out", f"{name} has changed")

    def test_the_experts_tokenizer_where_rows_are_matched_by_it(self, models: Path, tmp_path: Path) -> None:
        job = replace(recipe(models, "ties"), tokenizer=Tokenizer("base"))
        file = models / "math" / "tokenizer.json"
        table = json.loads(file.read_text())
        vocabulary = table["model"]["vocab"]
        first, second = [token for token, _ in sorted(vocabulary.items(), key=lambda item: item[1])[60:62]]
        vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
        file.write_text(json.dumps(table))
        merge(job, tmp_path / "out", SHARDS)
        vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
        file.write_text(json.dumps(table))
        self.refused(job, tmp_path / "out", "the rows of the vocabulary that belong together have changed")

    def test_calibration_texts_and_activations(self, models: Path, texts: Path, tmp_path: Path) -> None:
        job = self.finished(models, tmp_path / "a", omega=0.3, calibration=str(texts))
        texts.write_text(texts.read_text().replace("fox", "cat"))
        self.refused(job, tmp_path / "a", "the calibration of AIM has changed")
        file = activations_of(models / "base", texts, tmp_path / "activations.safetensors")
        job = self.finished(models, tmp_path / "b", omega=0.3, calibration=str(file))
        activations = Activations.load(file)
        means = {name: value + 1 for name, value in activations.means.items()}
        replace(activations, means=means).save(file)
        self.refused(job, tmp_path / "b", "the calibration of AIM has changed")

    def test_the_base_of_relax(self, models: Path, texts: Path, tmp_path: Path) -> None:
        acm = {"theta": 0.7, "calibration": str(texts), "samples": 2}
        table = {"merge_method": "passthrough", "base_model": str(models / "base"), "acm": acm}
        job = read_recipe(tree_of(table | {"models": [{"model": str(models / "math")}]}, "recipe"))
        merge(job, tmp_path / "out", SHARDS)
        tiny.edit_tensors(models / "base", lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].add_(0.1))
        self.refused(job, tmp_path / "out", "`base` no longer has the same `model.layers.1.mlp.up_proj.weight`")

    def test_other_times_are_read_once_and_remembered(
        self, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out = tmp_path / "out"
        job = self.finished(models, out)
        os.utime(models / "math" / "model.safetensors", (1, 1))
        foreseen = plan(job, out, SHARDS, measure=False)
        assert foreseen.exit_code == 0
        assert any("`math` has new or moved files" in note for note in foreseen.notes)
        notices = self.again(job, out)
        assert [text for text in notices if "read again" in text] == [
            "`math` has new or moved files: what was read from it is read again"
        ]
        verify(out, f"{PRIVATE}/{SUMS}")
        monkeypatch.setattr(TensorInputs, "__init__", None)  # nothing is read any more
        assert not any("read again" in text for text in self.again(job, out))
        (out / PRIVATE / "inputs.json").write_text('{"journal": 1}')
        monkeypatch.undo()
        assert any("read again" in text for text in self.again(job, out))

    def test_a_journal_that_has_lost_digests_is_told_and_no_other_is_taken_for_it(
        self, models: Path, tmp_path: Path
    ) -> None:
        job = self.finished(models, tmp_path / "out")
        with sqlite3.connect(tmp_path / "out" / PRIVATE / "journal.sqlite") as connection:
            connection.execute("DELETE FROM entries WHERE kind = 'group' AND name LIKE 'model-00001%'")
        connection.close()
        assert any("finished already" in text for text in self.again(job, tmp_path / "out"))
        os.utime(models / "math" / "model.safetensors", (1, 1))
        with pytest.raises(UsageError, match="its journal is damaged"):
            merge(job, tmp_path / "out", SHARDS)

    def test_another_versions_journal_is_refused_by_its_version(self, models: Path, tmp_path: Path) -> None:
        job = self.finished(models, tmp_path / "out")
        with Journal(tmp_path / "out" / PRIVATE) as journal:
            journal.keep(Schema(VERSION + 1))
        with pytest.raises(ResumeError, match=f"records of version {VERSION + 1}") as caught:
            merge(job, tmp_path / "out", SHARDS)
        assert "--fresh" not in caught.value.hint, "a finished model is never overwritten"
