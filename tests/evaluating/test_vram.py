"""Evaluations on a device with memory of its own, which is not there: `--vram` is kept to, or refused before work."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import asking
import pytest
import tiny
import torch
from conftest import Run
from fake_cuda import FakeCuda, cuda
from long_cases import others_long
from torch.nn import functional as F
from transformers import PreTrainedModel

from lowmem_aim.blocks import shares
from lowmem_aim.errors import MemoryBudgetError, ModelError
from lowmem_aim.evaluating.whole_model import OF_WEIGHTS
from lowmem_aim.events import Event, Notice, Worked
from lowmem_aim.system.memory import anonymous_bytes
from lowmem_aim.system.options import Options
from lowmem_aim.units import bytes_of

__all__ = ["cuda"]
KINDS = ("loglikelihood_rolling", "loglikelihood")  # the longest texts first, as in an evaluation
REQUESTS = dict(zip(KINDS, (asking.texts(3), asking.endings(3)), strict=True))
PLENTY = 10**9
ENOUGH_RAM = 4 * 10**9


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose blocks and hidden states are not lost among what is kept free."""
    return tiny.build("llama", tmp_path_factory.mktemp("models") / "wide", hidden_size=256, intermediate_size=1024)


@pytest.fixture(autouse=True)
def _no_slack(monkeypatch: pytest.MonkeyPatch) -> None:
    """Budgets are tight here: the reserve of a real device's allocator is not counted."""
    monkeypatch.setattr(shares, "SLACK_BYTES", 1 << 20)


def on_device(folder: Path, work: Path, vram: int, seen: list[Event]) -> dict[str, list[Any]]:
    options = Options(device="cuda", vram=vram, ram=anonymous_bytes() + ENOUGH_RAM)
    return asking.ours(folder, work, REQUESTS, options=options, emit=seen.append)


def warnings(seen: Sequence[Event]) -> list[str]:
    return [event.text for event in seen if isinstance(event, Notice) and event.level == "warning"]


def test_a_tensor_of_the_device_is_told_apart_and_counted(cuda: FakeCuda) -> None:
    here, there = torch.ones(1000), torch.ones(1000, device="cuda")
    assert (here.device.type, there.device, there[1:].device.type) == ("cpu", torch.device("cuda", 0), "cuda")
    assert (cuda.now, (there + 1).device.type, cuda.peak) == (4000, "cuda", 8000)
    with pytest.raises(RuntimeError, match="same device"):
        F.linear(here[None], there[None])
    back = there.cpu()
    assert (back.device.type, torch.equal(back, here)) == ("cpu", True)
    del there
    assert cuda.now == 0


@pytest.mark.parametrize("architecture", others_long(("gemma2", "mixtral", "gpt_neox"), ()))
def test_a_device_gives_the_answers_of_the_cpu(
    architecture: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder, seen = tiny.build(architecture, tmp_path / "model"), list[Event]()
    here = asking.ours(folder, tmp_path / "here", REQUESTS)
    cuda: FakeCuda = request.getfixturevalue("cuda")
    assert on_device(folder, tmp_path / "there", PLENTY, seen) == here
    assert 0 < cuda.peak < PLENTY
    assert not warnings(seen)


def test_vram_is_kept_to_from_the_least_that_does_to_plenty(
    wide: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    here = asking.ours(wide, tmp_path / "here", REQUESTS)
    cuda: FakeCuda = request.getfixturevalue("cuda")
    least, peaks = refused(wide, tmp_path / "refused"), list[int]()
    for place, vram in enumerate((least, PLENTY)):
        seen: list[Event] = []
        cuda.peak = cuda.now
        assert on_device(wide, tmp_path / f"{place}", vram, seen) == here
        assert cuda.peak <= vram
        assert not warnings(seen)
        peaks.append(cuda.peak)
    assert peaks[0] < peaks[-1]
    assert cuda.fraction == PLENTY / cuda.total


def refused(folder: Path, work: Path) -> int:
    """The figure that a refusal of too small a budget names; nothing has been run."""
    seen: list[Event] = []
    with pytest.raises(MemoryBudgetError, match="of VRAM") as caught:
        on_device(folder, work, 10**5, seen)
    assert not any(isinstance(event, Worked) for event in seen)
    assert caught.value.exit_code == 5
    (named,) = re.findall(r"`--vram (\w+)`", caught.value.hint)
    return bytes_of(named)


def test_too_little_vram_is_refused_by_evaluate(llama: Path, tmp_path: Path, run: Run, cuda: FakeCuda) -> None:
    (tmp_path / "t.yaml").write_text(TASK.replace("FOLDER", str(tmp_path)))
    (tmp_path / "items.jsonl").write_text('{"q": "one", "a": "two"}\n{"q": "three", "a": "four"}\n')
    line = ("evaluate", llama / "base", "--tasks", "t", "--include-path", tmp_path, "-o", tmp_path / "s.json")
    ran = run(*line, "--device", "cuda", "--vram", "100KB", "--ram", "8GB")
    assert ran.code == 5
    (named,) = re.findall(r"`--vram (\w+)` would do", ran.err)
    assert not (tmp_path / "s.json").exists()
    assert run(*line, "--device", "cuda", "--vram", named, "--ram", "8GB").code == 0
    assert (tmp_path / "s.json").is_file()


TASK = """
task: t
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/items.jsonl}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{q}}"
doc_to_target: "{{a}}"
metric_list: [{metric: acc}]
"""


def test_a_model_that_writes_is_loaded_within_both_budgets(
    wide: Path, tmp_path: Path, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}

    def loads(kind: Any, place: Path, **settings: Any) -> Any:
        given.update(settings)
        raise ValueError("what is given has been seen")

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(loads))
    options = Options(device="cuda", vram=PLENTY, ram=anonymous_bytes() + ENOUGH_RAM)
    with pytest.raises(ModelError, match="cannot load"):
        asking.written(wide, tmp_path / "work", [("one", {"until": [], "max_gen_toks": 2})], options=options)
    assert given["device_map"] == "auto"
    assert given["offload_folder"]
    assert list(given["max_memory"]) == [0, "cpu"]
    assert given["max_memory"][0] == int(PLENTY * OF_WEIGHTS)
    assert 0.8 * OF_WEIGHTS * ENOUGH_RAM < given["max_memory"]["cpu"] <= OF_WEIGHTS * ENOUGH_RAM
