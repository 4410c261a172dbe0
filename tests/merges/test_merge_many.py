"""Merges by many recipes at once: each output is what its recipe alone gives, and the models are read once for all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from many_merges import WEIGHTED, merged, point, points
from merge_cases import digests
from stopping import Stopped, stopping_after

from lowmem_aim.errors import DiskError, MemoryBudgetError, ResumeError, UsageError
from lowmem_aim.events import Event, Notice, PhaseStarted, Planned, TensorDone
from lowmem_aim.jobs import prepared
from lowmem_aim.jobs.merge import merge
from lowmem_aim.jobs.plan_many import plan_many
from lowmem_aim.measuring import mean_activations
from lowmem_aim.merging.shares import Shares
from lowmem_aim.merging.slices import TensorInputs
from lowmem_aim.methods.method import Rows
from lowmem_aim.output import folder as output_folder
from lowmem_aim.output.folder import is_finished
from lowmem_aim.output.verify import verify_outputs
from lowmem_aim.recipe.readings import readings
from lowmem_aim.recipe.recipe import Recipe
from lowmem_aim.system.options import Options

FEW = Options(shard_bytes=80_000)  # shards of a tiny Llama: three
ROUNDS = 5  # at most, of the methods among the points


@pytest.fixture(scope="module")
def alone(llama: Path, measured: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """The digests of what each recipe gives by itself."""
    folder = tmp_path_factory.mktemp("alone")
    return {name: digests(merge(made, folder / name, FEW)) for name, made in points(llama, measured).items()}


def in_folders(out: Path, names: Any) -> dict[str, dict[str, str]]:
    return {name: digests(out / name) for name in names}


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each tensor's inputs are read, from now on."""
    counts: Counter[str] = Counter()
    slices = TensorInputs.slices

    def noted(tensor: TensorInputs, first_pass: bool) -> Iterator[Rows]:
        counts[tensor.task.name] += 1
        return slices(tensor, first_pass)

    monkeypatch.setattr(TensorInputs, "slices", noted)
    return counts


def test_recipes_that_take_the_same_rows_share_a_reading(llama: Path, measured: Path, texts: Path) -> None:
    recipes = points(llama, measured)
    recipes["other texts"] = point(llama, "ties", WEIGHTED, aim={"calibration": str(texts)})
    recipes["acm"] = point(llama, "dare_ties", WEIGHTED, acm={"calibration": str(texts)})
    recipes["another acm"] = point(llama, "ties", WEIGHTED, acm={"calibration": str(texts), "theta": 1.2})
    recipes["mean of all"] = point(llama, "karcher", {})  # the base is one of the models
    recipes["half"] = point(llama, "ties", WEIGHTED, dtype="float16")
    assert [list(group) for group in readings(recipes)] == [
        [*(name for name in points(llama, measured) if not name.startswith("linear")), "acm"],
        ["linear", "linear-0.2"],
        ["other texts", "another acm"],
        ["mean of all"],
        ["half"],
    ]


def test_each_output_is_what_its_recipe_alone_gives(
    llama: Path, measured: Path, tmp_path: Path, alone: dict[str, dict[str, str]], read: Counter[str]
) -> None:
    recipes = points(llama, measured)
    events: list[Event] = []
    out = merged(recipes, tmp_path / "out", FEW, events.append)
    assert in_folders(out, recipes) == alone
    assert set(read.values()) == {len(readings(recipes))} == {2}
    [planned] = [event for event in events if isinstance(event, Planned)]
    started = [event.label for event in events if isinstance(event, PhaseStarted)]
    assert started == [*planned.labels] == ["reading 1: merge", "reading 1: finish", "merge", "finish"]
    assert planned.tensors == sum(isinstance(event, TensorDone) for event in events) == len(read) * len(recipes)


def test_it_is_finished_as_if_it_had_been_made_alone(llama: Path, measured: Path, tmp_path: Path) -> None:
    recipes = {name: made for name, made in points(llama, measured).items() if name in ("ties-0.2", "linear", "della")}
    out = merged(recipes, tmp_path / "out")
    notices: list[str] = []
    for name, made in recipes.items():
        merge(made, out / name, emit=lambda event: notices.append(event.text) if isinstance(event, Notice) else None)
        verify_outputs(out / name)
    assert notices == [f"`{out / name}` is finished already" for name in recipes]
    with pytest.raises(UsageError, match="it holds another merge"):
        merged({"ties-0.2": recipes["linear"]}, out)


def test_in_the_least_memory_rows_are_read_once_a_round_for_all_methods(
    llama: Path,
    measured: Path,
    tmp_path: Path,
    alone: dict[str, dict[str, str]],
    read: Counter[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prepared.shares, "share_out", lambda *args, **given: Shares(300, 2, 1, kept_bytes=0))
    recipes = {name: made for name, made in points(llama, measured).items() if not name.startswith("linear")}
    assert in_folders(merged(recipes, tmp_path / "out", FEW), recipes) == {name: alone[name] for name in recipes}
    assert 3 <= max(read.values()) <= 1 + ROUNDS


def test_acm_compares_each_output_with_the_base(llama: Path, texts: Path, measured: Path, tmp_path: Path) -> None:
    acm = {"calibration": str(texts)}
    recipes = {
        "neither": point(llama, "task_arithmetic", WEIGHTED),
        "both": point(llama, "task_arithmetic", WEIGHTED, aim={"calibration": str(measured)}, acm=acm),
    }
    out = merged(recipes, tmp_path / "out")
    for name, made in recipes.items():
        assert digests(out / name) == digests(merge(made, tmp_path / "alone" / name))


# --- going on ---------------------------------------------------------------------------------------------------------


def test_stopped_again_and_again_it_ends_with_the_same_bytes(
    llama: Path,
    measured: Path,
    tmp_path: Path,
    alone: dict[str, dict[str, str]],
    each_tensor: None,
) -> None:
    names = ("ties-0.2", "ties-0.6", "dare", "della", "sce", "linear", "linear-0.2")
    recipes, out = {name: points(llama, measured)[name] for name in names}, tmp_path / "out"
    some = {name: recipes[name] for name in ("dare", "linear")}
    merged(some, out, FEW)  # finished before the others begin
    for tensors in (3, 80, 40):
        with pytest.raises(Stopped):
            merged(recipes, out, FEW, stopping_after(tensors))
    finished = [name for name in recipes if is_finished(out / name)]
    assert set(finished) >= {"dare", "linear"}
    assert len(finished) < len(recipes)
    merge(recipes["sce"], out / "sce", FEW)  # alone, what was begun together
    merged(recipes, out, FEW)
    assert in_folders(out, recipes) == {name: alone[name] for name in names}


def test_killed_between_two_readings_the_first_is_finished(
    llama: Path, measured: Path, tmp_path: Path, alone: dict[str, dict[str, str]]
) -> None:
    out = tmp_path / "out"
    program = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from many_merges import merged, points\n"
        "from lowmem_aim.system.options import Options\n"
        "from lowmem_aim.events import TensorDone\n"
        "folder, calibration, out = map(Path, sys.argv[1:])\n"
        "def emit(event):\n"
        "    if isinstance(event, TensorDone) and event.output.startswith('linear'):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "recipes = {name: points(folder, calibration)[name] for name in ('ties-0.2', 'della', 'linear')}\n"
        "merged(recipes, out, Options(shard_bytes=80_000), emit)\n"
    )
    command = [sys.executable, "-c", program, str(llama), str(measured), str(out)]
    path = os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parents[2])])
    killed = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [is_finished(out / name) for name in ("ties-0.2", "della", "linear")] == [True, True, False]
    recipes = {name: made for name, made in points(llama, measured).items() if name in ("ties-0.2", "della", "linear")}
    merged(recipes, out, FEW)
    assert in_folders(out, recipes) == {name: alone[name] for name in recipes}


def test_activations_are_measured_once_for_all_readings(
    llama: Path, texts: Path, tmp_path: Path, each_tensor: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    aim = {"calibration": str(texts)}
    recipes = {
        "ties": point(llama, "ties", WEIGHTED, aim=aim),
        "linear": point(llama, "linear", WEIGHTED, aim={**aim, "omega": 0.1}),
        "plain": point(llama, "linear", WEIGHTED),
    }
    options = Options(use_cache=False)
    measure, times = mean_activations.mean_activations, []

    def counted(*args: Any, **given: Any) -> Any:
        times.append(1)
        return measure(*args, **given)

    monkeypatch.setattr(mean_activations, "mean_activations", counted)
    with pytest.raises(Stopped):  # in the first reading: they are kept beside the outputs of the second, too
        merged(recipes, tmp_path / "out", options, stopping_after(5))
    assert len(times) == 1
    for name in ("ties", "plain"):  # whatever becomes of the others
        merge(recipes[name], tmp_path / "out" / name, options)
    out = merged(recipes, tmp_path / "out", options)
    assert len(times) == 1
    for name in ("ties", "linear"):
        assert digests(out / name) == digests(merge(recipes[name], tmp_path / "alone" / name))


# --- before work ------------------------------------------------------------------------------------------------------


def several(llama: Path, **more: Any) -> dict[str, Recipe]:
    return {name: point(llama, name, WEIGHTED, **more) for name in ("ties", "dare_ties", "linear")}


class TestProblems:
    """All are told at once, before any work, with the recipes that they are of, unless they are of all."""

    def refused(self, recipes: dict[str, Recipe], out: Path, **options: Any) -> list[str]:
        there = set(out.parent.rglob("*"))
        with pytest.raises((UsageError, ResumeError)) as caught:
            merged(recipes, out, Options(**options))
        assert set(out.parent.rglob("*")) == there
        found = plan_many(recipes, out, Options(**options), measure=False)
        assert [*found.together.problems] == [*caught.value.problems]
        assert found.together.exit_code == caught.value.exit_code
        return [*caught.value.problems]

    def test_of_some_and_of_all(self, llama: Path, tmp_path: Path) -> None:
        recipes = several(llama)
        recipes["zero"] = point(llama, "linear", {"weight": 0.0})
        recipes["none"] = point(llama, "linear", {"weight": 0.0})
        (tmp_path / "out" / "ties").mkdir(parents=True)
        (tmp_path / "out" / "ties" / "mine.txt").touch()
        found = self.refused(recipes, tmp_path / "out")
        assert found == [
            f"recipes `ties`, `dare_ties`: the output folder `{tmp_path / 'out' / 'ties'}` is not empty: `mine.txt`",
            "recipes `zero`, `none`: recipe.yml:1:1: the weights sum to zero, and `normalize` would divide by that",
        ]
        with pytest.raises(UsageError) as caught:
            merged(several(llama), tmp_path / "new", Options(shard_bytes=10))
        assert list(caught.value.problems) == ["a shard size of 10 bytes is too small"]

    def test_an_interrupted_run_of_another_recipe(self, llama: Path, tmp_path: Path, each_tensor: None) -> None:
        recipes, out = several(llama), tmp_path / "out"
        with pytest.raises(Stopped):
            merged(recipes, out, FEW, stopping_after(30))
        others = {**recipes, "dare_ties": recipes["ties"]}
        before, *rest = self.refused(others, out, shard_bytes=FEW.shard_bytes)
        assert before == "recipe `dare_ties`: the interrupted run in this folder was a different one:"
        assert any("merge_method" in problem for problem in rest)

    def test_names_that_are_no_folders_stages_and_several_omegas(self, llama: Path, tmp_path: Path) -> None:
        aim = {"calibration": "builtin", "omega": [0.2, 0.4]}
        recipes = {"a/b": point(llama, "ties", WEIGHTED), "c": point(llama, "ties", WEIGHTED, aim=aim)}
        with pytest.raises(UsageError) as caught:
            merged(recipes, tmp_path / "out")
        assert list(caught.value.problems) == [
            "recipe `a/b`: `a/b` is no name of a folder",
            "recipe `c`: a recipe with several omegas cannot be one of several merges",
        ]

    def test_a_disk_without_space_for_all(self, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        one = plan_many(several(llama), tmp_path / "out", measure=False).passes[0].output_bytes["ties"]
        free = output_folder.SMALL_FILES_BYTES + int(2.5 * one)
        usage = type("usage", (), {"total": 10**12, "used": 0, "free": free})
        monkeypatch.setattr(output_folder.shutil, "disk_usage", lambda folder: usage)
        with pytest.raises(DiskError, match="all outputs together needs"):
            merged(several(llama), tmp_path / "out")
        assert plan_many(several(llama), tmp_path / "out", disk=2 * one, measure=False).together.fits


# --- the plan ---------------------------------------------------------------------------------------------------------


class TestPlanMany:
    def test_passes_and_bytes(self, llama: Path, tmp_path: Path, measured: Path) -> None:
        recipes = several(llama)
        found = plan_many(recipes, tmp_path / "out", measure=False)
        assert [list(one.output_bytes) for one in found.passes] == [["ties", "dare_ties"], ["linear"]]
        out = merged(recipes, tmp_path / "out")
        weights = (llama / "base" / "model.safetensors").stat().st_size
        for one, models in zip(found.passes, (4, 3), strict=True):  # linear reads no base
            assert 0 < models * weights - one.read_bytes < models * 5000  # the headers
            for name, nbytes in one.output_bytes.items():
                made = sum(file.stat().st_size for file in (out / name).iterdir() if file.is_file())
                assert nbytes <= made <= nbytes + output_folder.SMALL_FILES_BYTES
        assert plan_many(recipes, tmp_path / "out", measure=False).passes == ()

    def test_outputs_beyond_the_disk_come_in_further_passes(self, llama: Path, tmp_path: Path) -> None:
        recipes = {f"p{number}": point(llama, "ties", {**WEIGHTED, "density": number / 10}) for number in range(1, 6)}
        size = plan_many(recipes, tmp_path / "out", measure=False).passes[0].output_bytes["p1"]
        found = plan_many(recipes, tmp_path / "out", disk=2 * size)
        assert [list(one.output_bytes) for one in found.passes] == [["p1", "p2"], ["p3", "p4"], ["p5"]]
        [step] = found.together.steps
        once = plan_many(recipes, tmp_path / "out").together.steps[0]
        assert step.phase == once.phase == "merge"
        assert step.limits.keys() == once.limits.keys() >= {"write", "compute"}
        assert not (tmp_path / "out").exists()

    def test_outputs_beyond_the_memory_too(self, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        recipes = {f"p{number}": point(llama, "ties", {**WEIGHTED, "density": number / 10}) for number in range(1, 5)}
        alone = plan_many(dict([*recipes.items()][:1]), tmp_path / "out", Options(ram=1), measure=False)
        ram = alone.together.needs[0].least
        with pytest.raises(MemoryBudgetError):
            merged(recipes, tmp_path / "out", Options(ram=ram))
        found = plan_many(recipes, tmp_path / "out", Options(ram=ram), disk=10**9, measure=False)
        assert found.together.fits
        assert len(found.passes) > 1
