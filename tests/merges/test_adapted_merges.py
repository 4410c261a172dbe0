"""Merges of `base+adapter`: the bytes of a merge of the same model as a folder, for any slices, budget and stop."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from adapters import factors, shapes_of, write
from calibrating import activations_of, same
from conftest import Run
from merge_cases import BY_METHOD, FLAGS, digests
from safetensors.torch import save_file
from stopping import SHARDS, stop

from lowmem_aim.errors import MemoryBudgetError, ResumeError
from lowmem_aim.events import silent
from lowmem_aim.jobs.merge import merge
from lowmem_aim.models.hub import locate
from lowmem_aim.models.opening import opened
from lowmem_aim.models.reader import Reader
from lowmem_aim.recipe.from_flags import applied, empty_recipe
from lowmem_aim.recipe.reader import read_recipe
from lowmem_aim.recipe.recipe import Recipe
from lowmem_aim.relaxing.activations import Activations
from lowmem_aim.system.options import Options

PROJECTIONS = ("q_proj", "v_proj", "down_proj")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, three adapters `one`, `two` (a DoRA) and `three`, and `whole-one` ...: each added to the base."""
    folder = tmp_path_factory.mktemp("adapted")
    base = tiny.build("llama", folder / "base")
    shapes = shapes_of(base, *PROJECTIONS)
    write(folder / "one", factors(shapes, seed=1))
    magnitudes = {
        f"{module}.lora_magnitude_vector": torch.rand(out, generator=torch.Generator().manual_seed(out)) + 0.5
        for module, (out, _) in shapes.items()
    }
    write(folder / "two", factors(shapes, seed=2) | magnitudes, use_dora=True)
    write(folder / "three", factors(shapes, seed=3) | {"lm_head.weight": torch.randn(tiny.VOCAB, 32)}, use_rslora=True)
    for name in ("one", "two", "three"):
        whole(base, folder / name, folder / f"whole-{name}")
    return folder


def whole(base: Path, adapter: Path, folder: Path) -> Path:
    """`base+adapter` as a model's folder, as it is read."""
    tiny.perturbed(base, folder, scale=0.0)
    with (
        Reader() as reader,
        opened(f"{base}+{adapter}", lambda *part: locate(part[0], silent, part[1]), "mmap", reader) as model,
    ):
        tensors = {name: model.tensor(name).clone() for name in model.tensors}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def adapted(models: Path, name: str) -> str:
    return f"{models / 'base'}+{models / name}"


def recipe(models: Path, method: str, names: tuple[str, ...], of: Callable[[str], str], **flags: Any) -> Recipe:
    given = {"method": method, "base": str(models / "base"), "expert": tuple(of(name) for name in names)}
    return read_recipe(applied(empty_recipe(), given | flags))


def shards(folder: Path) -> dict[str, str]:
    return {name: value for name, value in digests(folder).items() if name.endswith((".safetensors", ".index.json"))}


# --- the same bytes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", BY_METHOD)
def test_every_method_merges_it_as_the_same_model_in_a_folder(method: str, models: Path, tmp_path: Path) -> None:
    flags = dict(FLAGS[method])
    names = ("one", "two", "three")[: len(flags.pop("experts", "abc"))] if method != "slerp" else ("two",)
    merge(recipe(models, method, names, lambda name: str(models / f"whole-{name}"), **flags), tmp_path / "whole")
    job = recipe(models, method, names, lambda name: adapted(models, name), **flags)
    merge(job, tmp_path / "out")
    assert shards(tmp_path / "out") == shards(tmp_path / "whole")
    merge(job, tmp_path / "slices", Options(slice_rows=3, read="pread"))
    assert digests(tmp_path / "slices") == digests(tmp_path / "out")


def test_the_smallest_budget_gives_the_same_bytes(models: Path, tmp_path: Path) -> None:
    job = recipe(models, "ties", ("one", "two"), lambda name: adapted(models, name), weight=("0.3",), density=("0.4",))
    merge(job, tmp_path / "out")
    with pytest.raises(MemoryBudgetError) as refused:
        merge(job, tmp_path / "small", Options(ram=1))
    merge(job, tmp_path / "small", Options(ram=refused.value.enough))
    assert digests(tmp_path / "small") == digests(tmp_path / "out")


def test_interrupted_again_and_again_it_ends_with_the_same_bytes(
    models: Path, tmp_path: Path, each_tensor: None
) -> None:
    job = recipe(models, "ties", ("one", "two"), lambda name: adapted(models, name), weight=("0.3",), density=("0.4",))
    merge(job, tmp_path / "whole", SHARDS)
    for tensors in (3, 1, 9):
        stop(job, tmp_path / "out", tensors)
    merge(job, tmp_path / "out", SHARDS)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def reweighted(adapter: Path) -> None:
    write(adapter, factors(shapes_of(adapter.parent / "base", *PROJECTIONS), seed=9))


def rescaled(adapter: Path) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(file.read_text().replace('"lora_alpha": 6', '"lora_alpha": 7'))


def touched(adapter: Path) -> None:
    os.utime(adapter / "adapter_model.safetensors", ns=(1, 1))


@pytest.mark.parametrize("change", [reweighted, rescaled])
@pytest.mark.parametrize("finished", [True, False])
def test_a_changed_adapter_is_no_resume(
    finished: bool, change: Callable[[Path], None], models: Path, tmp_path: Path, each_tensor: None
) -> None:
    place = tmp_path / "models"
    tiny.perturbed(models / "base", place / "base", scale=0.0)
    write(place / "one", factors(shapes_of(place / "base", *PROJECTIONS), seed=1))
    job = recipe(place, "linear", ("one",), lambda name: adapted(place, name))
    if finished:
        merge(job, tmp_path / "out", SHARDS)
    else:
        stop(job, tmp_path / "out", 20)
    touched(place / "one")
    if not finished:
        stop(job, tmp_path / "out", 1)  # the same content at another time: it is read again, and goes on
    change(place / "one")
    with pytest.raises(ResumeError, match=r"`base\+one` no longer has the same"):
        merge(job, tmp_path / "out", SHARDS)


# --- AIM and ACM ------------------------------------------------------------------------------------------------------


def test_an_adapted_base_is_calibrated_as_the_same_model_in_a_folder(models: Path, texts: Path, tmp_path: Path) -> None:
    found = activations_of(Path(adapted(models, "two")), texts, tmp_path / "a.safetensors")
    expected = activations_of(models / "whole-two", texts, tmp_path / "b.safetensors")
    assert same(Activations.load(found), Activations.load(expected))


@pytest.mark.parametrize("table", ["aim", "acm"])
def test_relaxed_merges_of_adapted_models(table: str, models: Path, texts: Path, tmp_path: Path) -> None:
    def job(name: Callable[[str], str]) -> Recipe:
        experts = [{"model": name(one), "parameters": {"weight": 0.4}} for one in ("one", "three")]
        whole = {"merge_method": "task_arithmetic", "base_model": name("two"), "models": experts}
        return read_recipe(applied_table(whole | {table: {"calibration": str(texts)}}))

    merge(job(lambda name: adapted(models, name)), tmp_path / "out")
    merge(job(lambda name: str(models / f"whole-{name}")), tmp_path / "whole")
    assert shards(tmp_path / "out") == shards(tmp_path / "whole")


def applied_table(table: dict[str, Any]) -> Any:
    from lowmem_aim.recipe.yaml_tree import parse

    return parse(yaml.safe_dump(table), "recipe.yml")


def test_a_bfloat16_base_stays_bfloat16_in_forwards_and_outputs(models: Path, texts: Path, tmp_path: Path) -> None:
    base = tiny.build("llama", tmp_path / "base", dtype=torch.bfloat16)
    write(tmp_path / "one", factors(shapes_of(base, *PROJECTIONS)))
    found = Activations.load(activations_of(Path(f"{base}+{tmp_path / 'one'}"), texts, tmp_path / "a.safetensors"))
    assert found.dtype == "bfloat16"
    out = merge(recipe(tmp_path, "linear", ("one",), lambda name: adapted(tmp_path, name)), tmp_path / "out")
    whole(base, tmp_path / "one", tmp_path / "whole-one")
    job = recipe(tmp_path, "linear", ("one",), lambda name: str(tmp_path / f"whole-{name}"), dtype="bfloat16")
    assert shards(out) == shards(merge(job, tmp_path / "rounded"))


# --- what is told -----------------------------------------------------------------------------------------------------


def test_the_plan_the_card_and_the_recipe_name_both(
    models: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(models)
    flags = ("--method", "ties", "--base", "base", "--expert", "base+one", "--expert", "base+two", "--density", "0.5")
    planned = run("plan", tmp_path / "out", *flags, "--no-measure")
    assert planned.code == 0, planned.err
    text = " ".join(planned.out.split())
    assert "base+one: " in text
    assert "LoRA of rank 4 on 9 tensors" in text
    assert "DoRA of rank 4 on 9 tensors" in text
    done = run("merge", tmp_path / "out", *flags, "--quiet")
    assert done.code == 0, done.err
    kept = (tmp_path / "out" / "mergekit_config.yml").read_text()
    assert [model["model"] for model in yaml.safe_load(kept)["models"]] == ["base+one", "base+two"]
    assert "#   base+one" in kept
    front = yaml.safe_load((tmp_path / "out" / "README.md").read_text().split("---")[1])
    assert front["base_model"] == ["base", "one", "two"]
    facts = json.loads((tmp_path / "out" / "lowmem_aim.json").read_text())
    digests_of = {item["model"]: item["xxh3_128"] for item in facts["inputs"]}
    assert set(digests_of) == {"base", "base+one", "base+two"}
    assert len(set(digests_of.values())) == 3


def test_models_of_one_name_are_told_apart(models: Path, tmp_path: Path, run: Run) -> None:
    for place in ("run1", "run2"):
        write(tmp_path / place / "best", factors(shapes_of(models / "base", "q_proj"), seed=len(place)))
    experts = [f"{models / 'base'}+{tmp_path / place / 'best'}" for place in ("run1", "run2")]
    flags = [flag for expert in experts for flag in ("--expert", expert)]
    done = run("plan", tmp_path / "out", "--method", "linear", *flags, "--no-measure")
    assert done.code == 0, done.err
    name = models.name
    assert all(f"{name}/base+{place}/best" in done.out for place in ("run1", "run2"))


@pytest.mark.parametrize("command", ["plan", "merge"])
def test_an_adapter_in_a_models_place_is_refused_with_the_way_out(
    command: str, models: Path, tmp_path: Path, run: Run
) -> None:
    flags = ("--method", "ties", "--base", models / "base", "--expert", models / "one", "--density", "0.5")
    done = run(command, tmp_path / "out", *flags)
    assert done.code == 3
    assert "is a LoRA adapter, not a whole model" in done.err
    assert "name it behind its base: `tiny/base+one`" in done.err


def test_an_output_in_an_adapters_folder_is_refused(models: Path, run: Run) -> None:
    flags = ("--method", "linear", "--expert", adapted(models, "one"), "--expert", models / "base")
    done = run("merge", models / "one" / "out", *flags)
    assert done.code == 2, done.err


def test_init_writes_a_recipe_of_adapted_models_that_plans(
    models: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(models)
    file = tmp_path / "r.yml"
    done = run("init", "--base", "base", "--expert", "base+one", "--expert", "base+two", "-o", file)
    assert done.code == 0, done.err
    assert run("plan", file, tmp_path / "out", "--no-measure").code == 0


def test_slices_take_layers_of_adapted_models(models: Path, tmp_path: Path) -> None:
    def job(name: Callable[[str], str]) -> Recipe:
        ranges = (("one", [0, 2]), ("two", [1, 3]), ("one", [1, 2]))
        slices = [{"sources": [{"model": name(model), "layer_range": layers}]} for model, layers in ranges]
        return read_recipe(applied_table({"merge_method": "passthrough", "slices": slices}))

    merge(job(lambda name: adapted(models, name)), tmp_path / "out")
    merge(job(lambda name: str(models / f"whole-{name}")), tmp_path / "whole")
    assert shards(tmp_path / "out") == shards(tmp_path / "whole")
