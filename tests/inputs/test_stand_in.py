"""Hub models are planned with by their headers: what is fetched, what stands in for the rest, what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import adapters
import pytest
import tiny
import torch
from conftest import Run
from hub.server import NEW, OLD, PIECE, Hub, weights
from safetensors.torch import save_file

from lowmem_aim.errors import LowmemAimError, ModelError, NetworkError
from lowmem_aim.events import silent
from lowmem_aim.models.checkpoint import Checkpoint
from lowmem_aim.models.folder import INDEX, SINGLE
from lowmem_aim.models.headers import MAX_HEADER_BYTES
from lowmem_aim.models.hub import locate
from lowmem_aim.models.stand_in import FIRST_BYTES, StandIn, stand_in


def single(folder: Path, llama: Path, tensors: dict[str, torch.Tensor], **metadata: str) -> Path:
    """A model folder of one file."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_bytes((llama / "base" / "config.json").read_bytes())
    save_file(tensors, folder / SINGLE, metadata=metadata)
    return folder


def header_end(file: Path) -> int:
    with file.open("rb") as stream:
        return 8 + int.from_bytes(stream.read(8), "little")


def opened(folder: Path) -> list[tuple[object, ...]]:
    with Checkpoint.open(folder, "x") as checkpoint:
        return [(t.name, t.dtype, t.shape, t.file.name, t.begin, t.end) for t in checkpoint]


def made(hub: Hub, model: Path, tmp_path: Path) -> StandIn:
    hub.commits.setdefault(OLD, model)
    return stand_in("tiny/model", tmp_path / "stand-in", silent)


def test_of_a_hub_model_only_headers_are_fetched(hub: Hub, sharded: Path, tmp_path: Path) -> None:
    made(hub, sharded, tmp_path)
    assert hub.of_weights == {file.name: FIRST_BYTES for file in sharded.glob("*.safetensors")}
    assert all(file.stat().st_size > 10 * FIRST_BYTES for file in sharded.glob("*.safetensors"))


def test_a_stand_in_opens_as_the_model_would(hub: Hub, sharded: Path, tmp_path: Path) -> None:
    found = made(hub, sharded, tmp_path)
    assert found.located.folder == tmp_path / "stand-in"
    assert found.located.label == "tiny/model"
    assert found.missing_bytes == weights(sharded)
    assert opened(found.located.folder) == opened(sharded)
    small = [file for file in sharded.iterdir() if file.suffix == ".json"]
    assert len(small) > 3
    assert all((found.located.folder / file.name).read_bytes() == file.read_bytes() for file in small)


def test_a_stand_in_holds_no_weights(hub: Hub, sharded: Path, tmp_path: Path) -> None:
    folder = made(hub, sharded, tmp_path).located.folder
    for file in folder.glob("*.safetensors"):
        assert file.stat().st_size == (sharded / file.name).stat().st_size
        assert not any(file.read_bytes()[header_end(file) :])
        assert not hasattr(os.stat_result, "st_blocks") or file.stat().st_blocks * 512 < PIECE
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_a_header_longer_than_the_first_request_takes_a_second(hub: Hub, llama: Path, tmp_path: Path) -> None:
    model = single(tmp_path / "model", llama, {"w": torch.ones(1 << 20)}, note="x" * 3 * FIRST_BYTES)
    folder = made(hub, model, tmp_path).located.folder
    assert opened(folder) == opened(model)
    assert hub.of_weights == {SINGLE: FIRST_BYTES + header_end(model / SINGLE)}


def test_a_header_beyond_the_limit_is_not_fetched(hub: Hub, llama: Path, tmp_path: Path) -> None:
    model = single(tmp_path / "model", llama, {"w": torch.ones(8)})
    with (model / SINGLE).open("r+b") as stream:
        stream.write((MAX_HEADER_BYTES + 1).to_bytes(8, "little"))
        stream.truncate(MAX_HEADER_BYTES + FIRST_BYTES)
    folder = made(hub, model, tmp_path).located.folder
    assert "are allowed" in refusal(folder) == refusal(model)
    assert hub.of_weights == {SINGLE: FIRST_BYTES}


def test_a_single_file_beside_an_index_is_preferred(hub: Hub, llama: Path, tmp_path: Path) -> None:
    model = single(tmp_path / "model", llama, {"w": torch.ones(8)})
    (model / INDEX).write_text(json.dumps({"weight_map": {"v": "a.safetensors"}}))
    save_file({"v": torch.ones(9)}, model / "a.safetensors")
    folder = made(hub, model, tmp_path).located.folder
    assert [name for name, *_ in opened(folder)] == ["w"]
    assert opened(folder) == opened(model)


def test_weights_that_no_index_names_are_missing_too(hub: Hub, sharded: Path, tmp_path: Path) -> None:
    """A merge downloads them."""
    model = tiny.perturbed(sharded, tmp_path / "model", scale=0.0)
    (model / "original").mkdir()
    save_file({"w": torch.ones(1 << 20)}, model / "original" / "w.safetensors")
    found = made(hub, model, tmp_path)
    assert found.missing_bytes == weights(model) > weights(sharded)
    assert "original/w.safetensors" not in hub.sent


def test_a_model_smaller_than_the_first_request(hub: Hub, llama: Path, tmp_path: Path) -> None:
    model = single(tmp_path / "model", llama, {"w": torch.ones(8)})
    folder = made(hub, model, tmp_path).located.folder
    assert opened(folder) == opened(model)
    assert not any((folder / SINGLE).read_bytes()[-32:])


def test_a_server_without_ranges_is_not_read_to_the_end(hub: Hub, llama: Path, tmp_path: Path) -> None:
    model = single(tmp_path / "model", llama, {"w": torch.ones(32 << 20, dtype=torch.uint8)})
    hub.ranges = False
    folder = made(hub, model, tmp_path).located.folder
    assert opened(folder) == opened(model)
    # What was sent and not read lay in the system's buffers.
    assert hub.sent[SINGLE] < 16 << 20


def test_weights_that_are_cached_are_not_missing(hub: Hub, sharded: Path, tmp_path: Path) -> None:
    from huggingface_hub import hf_hub_download

    hub.commits[OLD] = sharded
    first, *_, last = sorted(file.name for file in sharded.glob("*.safetensors"))
    hf_hub_download("tiny/model", first, revision=OLD)
    found = made(hub, sharded, tmp_path)
    assert found.missing_bytes == weights(sharded) - (sharded / first).stat().st_size
    assert opened(found.located.folder) == opened(sharded)
    hf_hub_download("tiny/model", last, revision=OLD)
    rest = weights(sharded) - (sharded / first).stat().st_size - (sharded / last).stat().st_size
    assert stand_in("tiny/model", tmp_path / "another", silent).missing_bytes == rest > 0


@pytest.mark.parametrize("offline", [False, True])
def test_a_model_whole_in_the_cache_is_taken_from_there(
    hub: Hub, sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline: bool
) -> None:
    hub.commits[OLD] = sharded
    cached = locate("tiny/model", silent)
    hub.sent.clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    assert made(hub, sharded, tmp_path) == StandIn(cached, 0)
    assert not hub.sent
    assert not (tmp_path / "stand-in").exists()


def test_weights_of_an_older_commit_are_not_missing(hub: Hub, sharded: Path, tmp_path: Path) -> None:
    hub.commits[OLD] = sharded
    locate("tiny/model", silent)
    hub.commits[NEW] = tiny.perturbed(sharded, tmp_path / "new", scale=0.0)
    (tmp_path / "new" / "README.md").write_text("a better card")
    for file in sharded.glob("*.safetensors"):
        (tmp_path / "new" / file.name).write_bytes(file.read_bytes())
    hub.main = NEW
    found = made(hub, sharded, tmp_path)
    assert found.missing_bytes == 0
    assert (found.located.folder / "README.md").read_text() == "a better card"


def test_all_is_of_one_commit(hub: Hub, sharded: Path, llama: Path, tmp_path: Path) -> None:
    hub.commits = {OLD: sharded, NEW: llama / "base"}
    hub.pushes = True
    found = made(hub, sharded, tmp_path)
    assert hub.main == NEW
    assert opened(found.located.folder) == opened(sharded)
    assert not [path for path in hub.asked if NEW in path]
    assert [path for path in hub.asked if "main" in path] == hub.asked[:1]


def test_a_revision_is_heeded(hub: Hub, sharded: Path, llama: Path, tmp_path: Path) -> None:
    hub.commits = {OLD: sharded, NEW: llama / "base"}
    found = stand_in(f"tiny/model@{NEW}", tmp_path / "stand-in", silent)
    assert found.located.label == f"tiny/model@{NEW}"
    assert opened(found.located.folder) == opened(llama / "base")


def test_the_token_stays_on_the_hub(hub: Hub, sharded: Path, tmp_path: Path) -> None:
    made(hub, sharded, tmp_path)
    assert hub.tokens == {"hub": {"Bearer hf_secret"}, "cdn": {None}}


def test_a_local_folder_is_taken_as_it_is(hub: Hub, llama: Path, tmp_path: Path) -> None:
    base = str(llama / "base")
    assert stand_in(base, tmp_path / "stand-in", silent) == StandIn(locate(base, silent), 0)
    assert not hub.asked
    assert not (tmp_path / "stand-in").exists()


def test_of_pickles_only_the_name_is_known(hub: Hub, llama: Path, tmp_path: Path) -> None:
    model = single(tmp_path / "model", llama, {"w": torch.ones(8)})
    (model / SINGLE).rename(model / "pytorch_model.bin")
    folder = made(hub, model, tmp_path).located.folder
    assert (folder / "pytorch_model.bin").stat().st_size == 0
    assert hub.of_weights == {}
    assert refusal(folder) == refusal(model)


def refusal(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        Checkpoint.open(folder)
    return str(caught.value).replace(str(folder), "folder") + caught.value.hint


def spoil_length(file: Path) -> None:
    with file.open("r+b") as stream:
        stream.write((1 << 60).to_bytes(8, "little"))


def spoil_json(file: Path) -> None:
    with file.open("r+b") as stream:
        stream.seek(8)
        stream.write(b"[")


def cut_off(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def empty(file: Path) -> None:
    os.truncate(file, 0)


def remove(file: Path) -> None:
    file.unlink()


@pytest.mark.parametrize("spoil", [spoil_length, spoil_json, cut_off, empty, remove])
def test_what_is_wrong_with_a_shard_shows_as_it_would_in_the_model(
    hub: Hub, sharded: Path, tmp_path: Path, spoil: Any
) -> None:
    model = tiny.perturbed(sharded, tmp_path / "model", scale=0.0)
    spoil(min(model.glob("*.safetensors")))
    folder = made(hub, model, tmp_path).located.folder
    assert refusal(folder) == refusal(model)
    assert all(count <= FIRST_BYTES for count in hub.of_weights.values())


@pytest.mark.parametrize("name", ["../evil.safetensors", "sub/evil.safetensors", "/evil.safetensors", "evil.bin", 7])
def test_an_index_cannot_name_files_elsewhere(hub: Hub, llama: Path, tmp_path: Path, name: Any) -> None:
    model = single(tmp_path / "model", llama, {"w": torch.ones(8)})
    (model / SINGLE).rename(model / "a.safetensors")
    (model / INDEX).write_text(json.dumps({"weight_map": {"w": "a.safetensors", "v": name}}))
    hub.listed = {str(name): b"x" * 100}
    folder = made(hub, model, tmp_path).located.folder
    assert not [file for file in tmp_path.rglob("evil*") if file.name != "evil.bin" or file.stat().st_size]
    assert not [path for path in hub.asked if "evil" in path]
    with pytest.raises(ModelError, match="not a plain file name"):
        Checkpoint.open(folder)


def test_pickles_elsewhere_are_not_named(hub: Hub, llama: Path, tmp_path: Path) -> None:
    hub.listed = {"../evil.bin": b"x", "..\\evil.bin": b"x", "sub/evil.bin": b"x"}
    made(hub, llama / "base", tmp_path)
    assert not list(tmp_path.rglob("*evil*"))


@pytest.mark.parametrize(
    ("reference", "gated", "message"),
    [
        ("tiny/model", True, "gated"),
        ("tiny/model@no-such", False, "no such revision"),
        ("tiny/other", False, "no such model"),
        ("a/b/c", False, "no model folder"),
    ],
)
def test_errors_of_the_hub_are_told_apart(
    hub: Hub, llama: Path, tmp_path: Path, reference: str, gated: bool, message: str
) -> None:
    hub.commits[OLD] = llama / "base"
    hub.gated = gated
    with pytest.raises(ModelError, match=message):
        stand_in(reference, tmp_path / "stand-in", silent)


@pytest.mark.parametrize(
    ("wrong", "kind", "message"),
    [("gated", ModelError, "gated"), ("stingy", NetworkError, "of 100000 bytes"), ("drops", NetworkError, "closed")],
)
def test_what_goes_wrong_while_headers_are_fetched_is_told_with_the_models_name(
    hub: Hub, llama: Path, tmp_path: Path, wrong: str, kind: type[LowmemAimError], message: str
) -> None:
    made(hub, llama / "base", tmp_path)  # the small files are there: only a shard's request can fail
    setattr(hub, wrong, True)
    with pytest.raises(kind, match=f"`tiny/model`.*{message}"):
        stand_in("tiny/model", tmp_path / "another", silent)


@pytest.mark.parametrize("known", [False, True])
def test_without_the_hub_a_model_that_is_not_whole_is_an_error(
    hub: Hub, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    if known:
        made(hub, llama / "base", tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    asked = len(hub.asked)
    with pytest.raises(NetworkError, match="cannot be reached"):
        stand_in("tiny/model", tmp_path / "another", silent)
    assert len(hub.asked) == asked


def test_of_an_adapter_on_the_hub_only_the_header_is_fetched(hub: Hub, llama: Path, tmp_path: Path, run: Run) -> None:
    random = {
        f"{module}.lora_A.weight": torch.randn(900, 32) for module in adapters.shapes_of(llama / "base", "q_proj")
    }
    random |= {name.replace("_A", "_B"): torch.randn(32, 900) for name in random}
    hub.commits[OLD] = adapter = adapters.write(tmp_path / "adapter", random, r=900)
    (adapter / "optimizer.safetensors").write_bytes(b"of no use")
    found = stand_in("tiny/model", tmp_path / "stand-in", silent, adapter=True)
    weights = "adapter_model.safetensors"
    assert hub.of_weights == {weights: FIRST_BYTES}
    assert found.missing_bytes == (adapter / weights).stat().st_size > FIRST_BYTES
    flags = ("--method", "linear", "--expert", f"{llama / 'base'}+tiny/model", "--expert", llama / "math", "--json")
    done = run("plan", tmp_path / "out", *flags, "--no-measure")
    assert done.code == 0, done.err
    adapted = json.loads(done.out.splitlines()[-1])["survey"]["models"][0]
    assert adapted["label"] == "base+tiny/model"
    assert adapted["missing_bytes"] == found.missing_bytes
    assert "LoRA of rank 900 on 3 tensors" in adapted["adapter"]
