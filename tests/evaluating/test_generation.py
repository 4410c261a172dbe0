"""Texts that a model writes: the harness' own, wherever its weights lie, kept batch by batch, from a vetted folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import asking
import pytest
import quantising
import tiny
import torch
from lm_eval.api.instance import Instance
from long_cases import others_long
from transformers import PreTrainedModel

from lowmem_aim.errors import ModelError
from lowmem_aim.evaluating import generation
from lowmem_aim.evaluating.generation import Request
from lowmem_aim.evaluating.whole_model import cannot_write, room_of
from lowmem_aim.events import Advanced, Event, PhaseStarted
from lowmem_aim.models.opening import open_model
from lowmem_aim.system.memory import Budget, anonymous_bytes
from lowmem_aim.system.options import Options

GREEDY = {"until": ["z", "  "], "max_gen_toks": 6, "do_sample": False}
SHORT = {"until": [], "max_gen_toks": 3}
DRAWN = {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 1.0}
CONTEXTS = ("one two", "a", "three four five " * 20, "six")  # the third is longer than what the model reads
REQUESTS: list[Request] = [(text, settings) for settings in (GREEDY, SHORT) for text in CONTEXTS]
NOTHING = Options(ram=1_000_000)  # less than the program has already


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build("llama", tmp_path_factory.mktemp("models") / "llama", shard_size="40KB")


@pytest.mark.parametrize("architecture", others_long(tiny.ARCHITECTURES, ("qwen2", "mixtral")))
def test_texts_are_the_harness_own_in_memory_and_from_disk(architecture: str, tmp_path: Path) -> None:
    folder = tiny.build(architecture, tmp_path / "model")
    asked = [Instance("generate_until", {}, request, number) for number, request in enumerate(REQUESTS)]
    expected = asking.harness(folder).generate_until(asked, disable_tqdm=True)
    assert len(set(expected)) >= 3  # the limits of both settings are met, and an end of the text
    assert asking.written(folder, tmp_path / "memory", REQUESTS) == expected
    assert asking.written(folder, tmp_path / "disk", REQUESTS, options=NOTHING) == expected
    assert not list((tmp_path / "disk").rglob("offload"))


def test_several_texts_at_a_time_are_what_the_harness_writes_so(llama: Path, tmp_path: Path) -> None:
    some = [(text, GREEDY) for text in CONTEXTS[:2]]
    model = asking.harness(llama)
    model.batch_size_per_gpu = 2
    asked = [Instance("generate_until", {}, request, number) for number, request in enumerate(some)]
    assert asking.written(llama, tmp_path / "work", some, batch=2) == model.generate_until(asked, disable_tqdm=True)


def test_a_kill_costs_one_batch(llama: Path, tmp_path: Path) -> None:
    whole = asking.written(llama, tmp_path / "whole", REQUESTS, batch=2)

    def stopping(event: Event) -> None:
        if isinstance(event, Advanced) and event.done >= 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        asking.written(llama, tmp_path / "work", REQUESTS, batch=2, emit=stopping)
    left = tmp_path / "work" / ".lowmem_aim" / "staging" / "offload"
    left.mkdir(parents=True, exist_ok=True)  # as a kill leaves it
    (left / "weight.dat").touch()
    seen: list[Event] = []
    assert asking.written(llama, tmp_path / "work", REQUESTS, batch=2, emit=seen.append) == whole
    assert [event.done for event in seen if isinstance(event, PhaseStarted)] == [4]
    assert [event.done for event in seen if isinstance(event, Advanced)] == [6, 8]
    assert not left.exists()


def test_what_is_known_is_not_written_again_and_loads_no_model(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = asking.written(llama, tmp_path / "work", [*REQUESTS, REQUESTS[0]])
    assert first[0] == first[-1]

    def refuse(*_: Any) -> Any:
        raise AssertionError

    monkeypatch.setattr(generation, "loaded_whole", refuse)
    assert asking.written(llama, tmp_path / "work", REQUESTS[::-1]) == first[:-1][::-1]
    for other in (dict(GREEDY, max_gen_toks=13), dict(GREEDY, until=["y"])):
        with pytest.raises(AssertionError):
            asking.written(llama, tmp_path / "work", [(CONTEXTS[0], other)])


def test_texts_that_are_drawn_at_random_are_drawn_each_time(llama: Path, tmp_path: Path) -> None:
    drawn = [(CONTEXTS[0], DRAWN)] * 3
    first = asking.written(llama, tmp_path / "work", drawn)
    assert len(set(first)) == 3
    seen: list[Event] = []
    assert asking.written(llama, tmp_path / "work", drawn, emit=seen.append) == first  # from the same seed
    assert [event.done for event in seen if isinstance(event, PhaseStarted)] == [0]


def test_loaders_are_given_a_folder_of_vetted_files_and_links(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in llama.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "modeling_own.py").write_text("raise SystemExit('the code of a model was run')\n")
    (folder / "stray.safetensors").write_bytes(next(llama.glob("*.safetensors")).read_bytes())
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**settings, "_name_or_path": "/etc/passwd"}))
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    seen: dict[str, Path] = {}
    given: list[Path] = []
    load = PreTrainedModel.from_pretrained.__func__

    def recorded(kind: Any, place: Path, **settings: Any) -> Any:
        given.append(place)
        seen.update({file.name: file.resolve() for file in place.iterdir()})
        assert "_name_or_path" not in json.loads((place / "generation_config.json").read_text())
        assert settings["trust_remote_code"] is False
        return load(kind, place, **settings)

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(recorded))
    asking.written(folder, tmp_path / "work", REQUESTS[-1:])
    shards = {file.name for file in llama.glob("*.safetensors")}
    assert seen.keys() == {"config.json", "generation_config.json", "model.safetensors.index.json"} | shards
    assert all(seen[name] == (folder / name).resolve() for name in shards)
    assert not any(place.exists() or place == folder for place in given)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_a_wrong_generation_config_is_the_models_error(llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in llama.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    for content in ("[1]", "{"):
        (folder / "generation_config.json").write_text(content)
        with pytest.raises(ModelError, match="generation_config"):
            asking.written(folder, tmp_path / "work", REQUESTS[-1:])


def test_weights_get_most_of_each_budget_and_the_device_first() -> None:
    used = anonymous_bytes()
    both = room_of(Budget(used + 2 * 10**9, 10**9), torch.device("cuda", 1))
    assert list(both) == [1, "cpu"]
    assert 0.6e9 < both[1] < 0.9e9
    assert 1e9 < both["cpu"] < 1.8e9
    assert list(room_of(Budget(used), torch.device("cpu"))) == ["cpu"]


def test_a_model_whose_tensors_are_not_plainly_in_its_folder_is_refused(llama: Path, tmp_path: Path) -> None:
    whole = tiny.build("llama", tmp_path / "whole", dtype=torch.bfloat16)
    quantising.quantised(quantising.FORMATS["fp8 with one scale"], whole, tmp_path / "quantised")
    with open_model(llama, "plain") as plain, open_model(tmp_path / "quantised", "packed") as packed:
        assert not list(cannot_write(plain))
        assert ["quantised" in str(error) for error in cannot_write(packed)] == [True]
