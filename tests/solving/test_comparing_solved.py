"""ACM on merges that are solved from texts: what it compares is the merge that would be written without it."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_cuda import FakeCuda, cuda
from long_cases import others_long
from merge_cases import digests, tensors_in
from stopping import SHARDS, Stopped, stop
from text_merges import job, models

from lowmem_aim.blocks.shares import SLACK_BYTES
from lowmem_aim.events import Event, PhaseStarted
from lowmem_aim.jobs import on_texts
from lowmem_aim.jobs import plan as planning
from lowmem_aim.jobs.merge import merge
from lowmem_aim.measuring import comparison
from lowmem_aim.merging.shares import Running, Shares, share_beside
from lowmem_aim.methods import moments as tiles
from lowmem_aim.methods import solved
from lowmem_aim.recipe.from_flags import relax_recipe
from lowmem_aim.recipe.reader import read_recipe
from lowmem_aim.recipe.recipe import Recipe
from lowmem_aim.solving import experts, input_moments, kept_states
from lowmem_aim.solving.experts import Experts
from lowmem_aim.system import memory
from lowmem_aim.system.memory import Budget
from lowmem_aim.system.options import Options

__all__ = ["cuda"]
MB = 10**6
AIM = {"omega": "0.4"}
SOLVED: dict[str, dict[str, Any]] = {"regmean_plus": AIM, "regmean": {}, "task_arithmetic": {"weight": ("solved",)}}
BY_METHOD = others_long(SOLVED, ("regmean_plus",))


@pytest.fixture(autouse=True, scope="module")
def _many_small_parts() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for module in (tiles, solved):
            patch.setattr(module, "TILE", 24)
        patch.setattr(input_moments, "ROWS", 16)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models with texts of their own, and `texts.jsonl`, with which ACM compares."""
    folder = models("llama", tmp_path_factory.mktemp("llama"))
    texts = ("The quick brown fox.", "jumps over", "a lazy dog that has been sleeping all day long in the sun")
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


def compared(folder: Path, method: str, **flags: Any) -> Recipe:
    return job(folder, method, acm=True, calibration=str(folder / "texts.jsonl"), **SOLVED.get(method, {}) | flags)


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The merge by a method, with ACM, as an uninterrupted run with all memory makes it."""
    return functools.cache(
        lambda method: merge(compared(folder, method), tmp_path_factory.mktemp("whole") / method, SHARDS)
    )


def groups(folder: Path) -> dict[str, float]:
    """The mean mutual information of each group, in nats."""
    found = json.loads((folder / "lowmem_aim.json").read_text())["acm"]["groups"]
    return {name: group["mutual_information"] for name, group in found.items()}


@pytest.mark.parametrize("method", BY_METHOD)
def test_it_is_the_merge_and_then_acm(folder: Path, whole: Callable[[str], Path], method: str, tmp_path: Path) -> None:
    texts, own = str(folder / "texts.jsonl"), SOLVED[method]
    plain = merge(job(folder, method, **own, **({"calibration": texts} if "omega" in own else {})), tmp_path / "plain")
    flags = {"base": str(folder / "base"), "expert": (), "relaxations": "acm", "calibration": texts}
    then = merge(read_recipe(relax_recipe(str(plain), flags)), tmp_path / "then")
    assert groups(whole(method)) == pytest.approx(groups(then), rel=1e-3)
    assert len({round(information, 3) for information in groups(then).values()}) > 3
    ours, theirs, unrelaxed = map(tensors_in, (whole(method), then, plain))
    for name, value in theirs.items():
        assert float((ours[name] - value).abs().max()) < 1e-5, name
    assert any(float((unrelaxed[name] - value).abs().max()) > 1e-3 for name, value in theirs.items())


@pytest.mark.parametrize("method", BY_METHOD)
def test_modules_and_matrices_that_come_and_go_change_no_byte(
    folder: Path, whole: Callable[[str], Path], method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = digests(whole(method))
    for module in (comparison, experts):
        monkeypatch.setattr(module, "shares_for", paging(module.shares_for))
    monkeypatch.setattr(on_texts, "share_beside", lambda *_: Shares(0, 1, 0, 0, matrices=0, models=1 << 30))
    monkeypatch.setattr("lowmem_aim.blocks.shares.SMALLEST_PAGED", 1)
    monkeypatch.setattr("lowmem_aim.merging.merged_weights.ELEMENTS", 33)
    small = replace(SHARDS, slice_rows=3, read="pread")
    assert digests(merge(compared(folder, method), tmp_path / "paged", small)) == expected


def paging(shares_for: Any) -> Any:
    """The function with shares in which modules are loaded one by one, and hidden states lie in a file."""
    return lambda *args: replace(shares_for(*args), weights=1, ram_states=0)


@pytest.mark.parametrize("method", BY_METHOD)
def test_interrupted_after_the_comparison_it_goes_on_to_the_same_bytes(
    folder: Path, whole: Callable[[str], Path], method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_states, "SECONDS", 0.0)
    recipe, out = compared(folder, method), tmp_path / "out"
    with pytest.raises(Stopped):
        merge(recipe, out, SHARDS, stopping_in("compare"))
    assert "compare" in phases_of(recipe, out, stopping_in("merge"))
    stop(recipe, out, 12)
    assert "compare" not in phases_of(recipe, out)
    assert digests(out) == digests(whole(method))


def stopping_in(phase: str) -> Any:
    """An Emit that stops the run in a phase: in the comparison after a block."""
    now = [""]

    def emit(event: Event) -> None:
        now[0] = event.phase if isinstance(event, PhaseStarted) else now[0]
        if now[0] == phase and (phase != "compare" or type(event).__name__ == "Advanced"):
            raise Stopped

    return emit


def phases_of(recipe: Any, out: Path, emit: Any = None) -> list[str]:
    """The phases that a run begins until it is stopped or done."""
    found: list[str] = []

    def noting(event: Event) -> None:
        if isinstance(event, PhaseStarted):
            found.append(event.phase)
        if emit:
            emit(event)

    with contextlib.suppress(Stopped):
        merge(recipe, out, SHARDS, noting)
    return found


@pytest.mark.parametrize(("method", "times"), others_long((("ties", 1), ("regmean", 2)), (("ties", 1),)))
def test_only_methods_that_are_solved_from_texts_run_these_for_the_comparison(
    folder: Path, method: str, times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, moments = [], Experts.moments

    def counted(*args: Any, **rest: Any) -> Any:
        run.append(method)
        return moments(*args, **rest)

    monkeypatch.setattr(Experts, "moments", counted)
    merge(compared(folder, method, omega=None), tmp_path / "out")
    assert len(run) == times


@pytest.mark.long
def test_each_of_several_omegas_is_compared_by_itself(folder: Path, tmp_path: Path) -> None:
    merge(compared(folder, "regmean", omega="0.1,1"), tmp_path / "out")
    merge(compared(folder, "regmean", omega="0.1"), tmp_path / "one")
    assert digests(tmp_path / "out" / "omega-0.1") == digests(tmp_path / "one")
    assert groups(tmp_path / "out" / "omega-1") != groups(tmp_path / "one")


def test_the_plan_has_the_experts_of_the_comparison(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "MEASURED_SECONDS", 0.05)
    monkeypatch.setattr(memory, "anonymous_bytes", lambda: 100 * MB)
    monkeypatch.setattr(memory, "free_bytes", lambda: 8000 * MB)
    several = {"omega": "0.1,1"}
    ties, solved = (planning.plan(compared(folder, method, **several), tmp_path) for method in ("ties", "regmean"))
    assert [step.phase for step in ties.steps] == ["calibrate", "compare", "texts", "merge"]
    assert [step.phase for step in solved.steps] == ["calibrate", "compare", "compare", "texts", "merge"]
    assert any("as many again for each output that ACM compares" in note for note in solved.notes)
    assert not any("ACM" in note for note in ties.notes)
    one_more_model = SLACK_BYTES
    assert solved.needs[0].why.startswith("compare")
    assert solved.needs[0].least >= ties.needs[0].least + one_more_model


@pytest.mark.long
def test_models_and_experts_are_run_on_the_device_and_weights_solved_there(
    folder: Path, whole: Callable[[str], Path], tmp_path: Path, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (tiles, solved):
        monkeypatch.setattr(module, "TILE", 64)  # few operations: each takes its time on a device that is not there
    expected = tensors_in(whole("regmean_plus"))
    found = tensors_in(merge(compared(folder, "regmean_plus"), tmp_path / "there", Options(device="cuda")))
    assert all(float((found[name] - value).abs().max()) < 1e-5 for name, value in expected.items())


@pytest.mark.parametrize("ram", [500, 600, 1000, 5000])
def test_what_is_to_spare_is_shared_by_the_comparison_and_the_experts(
    ram: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "anonymous_bytes", lambda: 0)
    running = Running(least=200 * MB, block=300 * MB, vram=0, moments=500 * MB)
    found = share_beside(Budget(ram * MB), torch.device("cpu"), running, 300 * MB, 0)
    assert found.models >= running.least
    assert 300 * MB + found.models + found.matrices <= ram * MB
    assert found.matrices == (500 * MB if ram == 5000 else 0)


def test_on_a_device_they_share_its_memory_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "anonymous_bytes", lambda: 0)
    running = Running(least=50 * MB, block=0, vram=300 * MB, moments=500 * MB)
    for vram in (700, 800, 9000):
        found = share_beside(Budget(1000 * MB, vram * MB), torch.device("meta"), running, 100 * MB, 400 * MB)
        assert found.device_models >= running.vram
        assert 400 * MB + found.device_models + found.device_matrices <= vram * MB
