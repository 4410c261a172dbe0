"""Links out of a model folder: a shard may lead to weights, anything else to a Hub cache; nothing else is opened."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import adapters
import pytest
import torch
from conftest import Place
from safetensors.torch import save_file

from lowmem_aim.errors import ModelError
from lowmem_aim.models import tensor_files as reading
from lowmem_aim.models.adapter import Adapter
from lowmem_aim.models.checkpoint import Checkpoint
from lowmem_aim.output.copied import copied_files

SHARD, INDEX = "x-1.safetensors", "model.safetensors.index.json"
OUT = "is a link that leads out of its model folder"
ETAG = "0" * 40
HASH = "ab" * 32


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model of two shards with the files that are read beside them."""
    made = tmp_path / "model"
    (made / "additional_chat_templates").mkdir(parents=True)
    for number in (1, 2):
        save_file({f"w{number}": torch.full((2, 3), float(number))}, made / f"x-{number}.safetensors")
    (made / INDEX).write_text(json.dumps({"weight_map": {"w1": SHARD, "w2": "x-2.safetensors"}}))
    for name in ("config.json", "tokenizer.json", "vocab.json", "generation_config.json"):
        (made / name).write_text("{}")
    (made / "additional_chat_templates" / "x.jinja").write_text("x")
    return made


def moved(file: Path, target: Path) -> Path:
    """The file at another place, with a link in its own."""
    target.parent.mkdir(parents=True, exist_ok=True)
    file.rename(target)
    file.symlink_to(target)
    return target


def opened(folder: Path) -> list[float]:
    with Checkpoint.open(folder) as model:
        return [float(model.tensor(name)[0, 0]) for name in ("w1", "w2")]


def refused(folder: Path, name: str) -> None:
    with pytest.raises(ModelError, match=f"{name}` {OUT}") as caught:
        Checkpoint.open(folder)
    assert len(caught.value.problems) == 1


class TestShards:
    def test_one_on_another_disk_is_read(self, folder: Path, tmp_path: Path) -> None:
        """Whatever it is called there."""
        moved(folder / SHARD, tmp_path / "other disk" / "weights")
        assert opened(folder) == [1.0, 2.0]

    def test_through_several_links(self, folder: Path, tmp_path: Path) -> None:
        moved(moved(folder / SHARD, tmp_path / "a"), tmp_path / "b" / "c")
        assert opened(folder) == [1.0, 2.0]

    @pytest.mark.parametrize("target", ["secret", "/dev/zero", "/", SHARD, "nowhere", "pipe"])
    def test_anything_but_weights_is_refused(self, folder: Path, tmp_path: Path, target: str) -> None:
        (tmp_path / "secret").write_text("root:x:0:0")
        os.mkfifo(tmp_path / "pipe")
        (folder / SHARD).unlink()
        (folder / SHARD).symlink_to(target if target == SHARD else tmp_path / target)
        refused(folder, SHARD)

    def test_what_the_target_holds_is_not_told(self, folder: Path, tmp_path: Path) -> None:
        (tmp_path / "secret").write_bytes((20).to_bytes(8, "little") + b'{"password":"hunter2')
        (folder / SHARD).unlink()
        (folder / SHARD).symlink_to(tmp_path / "secret")
        with pytest.raises(ModelError) as caught:
            Checkpoint.open(folder)
        assert "password" not in str(caught.value)

    def test_what_nobody_reads_may_lead_anywhere(self, folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
        (tmp_path / "secret").write_text("x")
        for name in ("consolidated.safetensors", "notes.txt", "training.json", "other.model.txt"):
            (folder / name).symlink_to(tmp_path / "secret")
        seen: list[Path] = []
        plain = reading.open_regular
        monkeypatch.setattr(reading, "open_regular", lambda file: (seen.append(file), plain(file))[1])
        assert opened(folder) == [1.0, 2.0]
        assert sorted(file.name for file in seen) == [SHARD, "x-2.safetensors"]

    def test_a_merge_reads_it_and_copies_nothing_of_it(self, place: Place) -> None:
        """Neither as a shard, nor as the weights of a module in a folder of its own, which are copied as a file."""
        assert place.merge().code == 0
        expected = (place.out / "model.safetensors").read_bytes()
        shutil.rmtree(place.out)
        base, elsewhere = place.folder / "base", place.folder / "elsewhere"
        moved(base / "model.safetensors", elsewhere / "model.safetensors")
        (base / "2_Dense").mkdir()
        (base / "2_Dense" / "model.safetensors").symlink_to(elsewhere / "model.safetensors")
        (base / "2_Dense" / "config.json").write_text("{}")
        (base / "modules.json").write_text(json.dumps([{"idx": 0, "path": "2_Dense", "type": "x"}]))
        done = place.merge()
        assert done.code == 0, done.err
        assert "`2_Dense/model.safetensors` (a link that leads out of the folder)" in done.err
        assert (place.out / "model.safetensors").read_bytes() == expected
        assert sorted(file.name for file in (place.out / "2_Dense").iterdir()) == ["config.json"]


READ = ("config.json", "tokenizer.json", "vocab.json", "generation_config.json", INDEX)
TEMPLATE = "additional_chat_templates/x.jinja"


class TestOtherFiles:
    @pytest.mark.parametrize("name", [*READ, TEMPLATE, "additional_chat_templates", "tokenizer.model", "README.md"])
    def test_a_link_out_is_refused_by_name(self, folder: Path, tmp_path: Path, name: str) -> None:
        (folder / name).touch() if not (folder / name).exists() else None
        moved(folder / name, tmp_path / "elsewhere" / Path(name).name)
        refused(folder, name)

    @pytest.mark.parametrize("name", READ)
    def test_a_file_that_only_looks_like_a_blob_is_refused(self, folder: Path, tmp_path: Path, name: str) -> None:
        """Beside a folder `snapshots`, in a folder `blobs` of no repository, under a hash of another folder."""
        for place in (Path("blobs") / ETAG, Path("blobs/cd") / HASH, Path("models--a--b") / ETAG, Path("snapshots/x")):
            target = moved(folder / name, tmp_path / "cache" / place)
            refused(folder, name)
            (folder / name).unlink()
            target.rename(folder / name)

    def test_all_of_them_are_told_at_once(self, folder: Path, tmp_path: Path) -> None:
        for name in ("config.json", "vocab.json"):
            moved(folder / name, tmp_path / "elsewhere" / name)
        with pytest.raises(ModelError) as caught:
            Checkpoint.open(folder)
        assert len(caught.value.problems) == 2

    def test_a_link_within_the_folder_is_followed(self, folder: Path) -> None:
        moved(folder / "tokenizer.json", folder / "v2" / "tokenizer.json")
        with Checkpoint.open(folder) as model:
            assert model.small_file("tokenizer.json", 100) == b"{}"

    def test_one_that_appears_after_the_check_is_not_followed(self, folder: Path, tmp_path: Path) -> None:
        (tmp_path / "secret").write_text("{}")
        with Checkpoint.open(folder) as model:
            (folder / "tokenizer.9.json").symlink_to(tmp_path / "secret")
            with pytest.raises(ModelError, match=OUT):
                model.small_file("tokenizer.9.json", 100)


def cache_of(folder: Path, cache: Path, shared: bool) -> Path:
    """The snapshot of a Hub cache that holds the files of `folder`, with blobs as the library keeps them."""
    repository = cache / "models--owner--name"
    snapshot = repository / "snapshots" / ETAG
    for number, file in enumerate(sorted(f for f in folder.rglob("*") if f.is_file())):
        blob = repository / "blobs" / f"{number:040x}"
        store = cache / "blobs" / f"{number:064x}"[:2] / f"{number:064x}" if shared else blob
        for place in (blob, store, snapshot / file.relative_to(folder)):
            place.parent.mkdir(parents=True, exist_ok=True)
        file.rename(store)
        if shared:
            blob.symlink_to(os.path.relpath(store, blob.parent))
        link = snapshot / file.relative_to(folder)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


@pytest.mark.parametrize("shared", [False, True])
class TestTheHubsCache:
    """In both layouts: blobs of a repository, and blobs that are links to those of the whole cache."""

    def check(self, folder: Path) -> None:
        assert opened(folder) == [1.0, 2.0]
        with Checkpoint.open(folder) as model:
            assert copied_files(model).keys() == {"tokenizer.json", "vocab.json", "generation_config.json", TEMPLATE}

    def test_a_snapshot_is_read(self, folder: Path, tmp_path: Path, shared: bool) -> None:
        self.check(cache_of(folder, tmp_path / "cache", shared))

    @pytest.mark.parametrize("through", ["blobs", "snapshots"])
    def test_a_folder_of_links_into_it_is_read(self, folder: Path, tmp_path: Path, shared: bool, through: str) -> None:
        """As old versions of `hf download --local-dir` made them."""
        snapshot = cache_of(folder, tmp_path / "cache", shared)
        for file in (f for f in snapshot.rglob("*") if f.is_symlink()):
            (folder / file.relative_to(snapshot)).symlink_to(file if through == "snapshots" else file.resolve())
        self.check(folder)

    def test_a_blob_that_leads_elsewhere_is_refused(self, folder: Path, tmp_path: Path, shared: bool) -> None:
        snapshot = cache_of(folder, tmp_path / "cache", shared)
        moved((snapshot / "vocab.json").resolve(), tmp_path / "secret")
        refused(snapshot, "vocab.json")


def test_an_adapters_weights_may_be_elsewhere_and_its_config_not(llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    adapters.write(folder, adapters.factors({"model.layers.0.mlp.up_proj": (48, 32)}))
    moved(folder / "adapter_model.safetensors", tmp_path / "other disk" / "weights")
    Adapter.open(folder, "adapter")
    moved(folder / "adapter_config.json", tmp_path / "elsewhere" / "config.json")
    with pytest.raises(ModelError, match=f"adapter_config.json` {OUT}"):
        Adapter.open(folder, "adapter")
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.safetensors").symlink_to(tmp_path / "elsewhere" / "config.json")
    with pytest.raises(ModelError, match=f"adapter_model.safetensors` {OUT}"):
        Adapter.open(folder, "adapter")


def test_of_pickle_only_the_caches_blobs_are_followed(tmp_path: Path, place: Place) -> None:
    folder = place.folder / "math"
    (folder / "model.safetensors").unlink()
    torch.save({"w": torch.ones(2)}, folder / "pytorch_model.bin")
    blob = moved(folder / "pytorch_model.bin", tmp_path / "models--a--b" / "blobs" / ETAG)
    assert place.run("convert", folder, place.folder / "new").code == 0
    (folder / "pytorch_model.bin").unlink()
    blob.rename(folder / "pytorch_model.bin")
    moved(folder / "pytorch_model.bin", tmp_path / "elsewhere" / ETAG)
    assert OUT in place.run("convert", folder, place.folder / "newer").err
