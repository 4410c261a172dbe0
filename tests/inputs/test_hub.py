"""Hub ids resolve through huggingface_hub's own cache; what the outputs call them; what is never fetched."""

from __future__ import annotations

import fnmatch
import shutil
from pathlib import Path

import adapters
import pytest
import yaml
from conftest import Run

from lowmem_aim.errors import ModelError
from lowmem_aim.events import silent
from lowmem_aim.models.hub import WANTED, locate

REVISION = "0123456789012345678901234567890123456789"


@pytest.fixture
def hub(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hub cache, links to blobs and all, that holds the tiny Llamas as `tiny/base`, `tiny/math` and `tiny/code`."""
    cache = tmp_path / "hub"
    for name in ("base", "math", "code"):
        repository = cache / f"models--tiny--{name}"
        snapshot = repository / "snapshots" / REVISION
        for folder in (snapshot, repository / "blobs", repository / "refs"):
            folder.mkdir(parents=True)
        (repository / "refs" / "main").write_text(REVISION)
        for number, file in enumerate(sorted((llama / name).iterdir())):
            (repository / "blobs" / str(number)).write_bytes(file.read_bytes())
            (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return cache


def test_a_merge_of_hub_ids(hub: Path, llama: Path, tmp_path: Path, run: Run) -> None:
    more = ("--expert", f"tiny/math@{REVISION}", "--expert", "tiny/code@main", "--density", 0.5)
    done = run("merge", tmp_path / "out", "--method", "ties", "--base", "tiny/base", *more)
    assert done.code == 0, done.err
    local = ("--expert", llama / "math", "--expert", llama / "code", "--density", 0.5)
    assert run("merge", tmp_path / "local", "--method", "ties", "--base", llama / "base", *local).code == 0
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "local/model.safetensors").read_bytes()
    front = yaml.safe_load((tmp_path / "out/README.md").read_text().split("---\n")[1])
    assert front["base_model"] == ["tiny/base", "tiny/math", "tiny/code"]
    text = (tmp_path / "out/mergekit_config.yml").read_text()
    assert "Fill in" not in text  # it runs as it is
    config = yaml.safe_load(text)
    assert config["models"][0]["model"] == f"tiny/math@{REVISION}"


def test_a_model_and_its_adapter_on_the_hub(hub: Path, llama: Path, tmp_path: Path, run: Run) -> None:
    adapter = adapters.write(tmp_path / "a", adapters.factors(adapters.shapes_of(llama / "base", "q_proj")))
    snapshot = hub / "models--tiny--lora" / "snapshots" / REVISION
    shutil.copytree(adapter, snapshot)
    reference = f"tiny/base@{REVISION}+tiny/lora@{REVISION}"
    for out, expert in (("out", reference), ("local", f"{llama / 'base'}+{adapter}")):
        done = run("merge", tmp_path / out, "--method", "linear", "--base", "tiny/base", "--expert", expert)
        assert done.code == 0, done.err
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "local/model.safetensors").read_bytes()
    front = yaml.safe_load((tmp_path / "out/README.md").read_text().split("---\n")[1])
    assert front["base_model"] == ["tiny/base", "tiny/lora"]
    assert yaml.safe_load((tmp_path / "out/mergekit_config.yml").read_text())["models"][0]["model"] == reference
    assert "Fill in" not in (tmp_path / "out/mergekit_config.yml").read_text()


def test_of_a_model_that_only_gives_its_tokenizer_no_weights_are_needed(
    hub: Path, llama: Path, tmp_path: Path, run: Run
) -> None:
    (hub / "models--tiny--code/snapshots" / REVISION / "model.safetensors").unlink()
    command = ("--method", "linear", "--expert", llama / "math", "--tokenizer-source", f"tiny/code@{REVISION}")
    done = run("merge", tmp_path / "out", *command)
    assert done.code == 0, done.err
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (llama / "code" / name).read_bytes()
    recipe = yaml.safe_load((tmp_path / "out/mergekit_config.yml").read_text())
    assert recipe["tokenizer_source"] == f"tiny/code@{REVISION}"


def test_a_folder_wins_over_a_hub_id(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert locate("tiny/base", silent).folder == Path("tiny/base")


def test_a_missing_folder_in_a_folder_that_is_there_is_no_hub_id(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="no model folder `tiny/base`"):
        locate("tiny/base", silent)


@pytest.mark.parametrize("reference", ["name", "a/b/c", "/a/b", "./a/b", "~/nowhere/b", "a b/c", "a/b@", "a/b+lora"])
def test_what_cannot_be_a_hub_id_never_reaches_the_network(reference: str) -> None:
    with pytest.raises(ModelError):
        locate(reference, silent)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.pt", "modeling_x.py", "a.gguf", "x.pkl", "consolidated.00.pth"]
)
def test_neither_pickle_nor_code_is_fetched(name: str) -> None:
    assert not any(fnmatch.fnmatch(name, pattern) for pattern in WANTED)


def test_errors_of_the_hub_are_told_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import httpx2 as http
    import huggingface_hub
    from huggingface_hub import errors

    from lowmem_aim.errors import NetworkError

    response = http.Response(404, request=http.Request("GET", "https://example.org"))
    cases = [
        (errors.GatedRepoError("x", response=response), ModelError, "gated"),
        (errors.RepositoryNotFoundError("x", response=response), ModelError, "no such model"),
        (errors.RevisionNotFoundError("x", response=response), ModelError, "no such revision"),
        (errors.LocalEntryNotFoundError("x"), NetworkError, "cannot be reached"),
        (ConnectionError("reset"), NetworkError, "reset"),
    ]
    monkeypatch.chdir(tmp_path)
    for error, kind, message in cases:

        def fail(*_: object, error: Exception = error, **__: object) -> str:
            raise error

        monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
        with pytest.raises(kind, match=message):
            locate("a/b", silent)
