"""Merges of quantised models: the bytes of a merge of the same models decoded, for any slices, budget and stop."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from adapters import factors, shapes_of, write
from calibrating import activations_of, same
from conftest import Run
from long_cases import others_long
from merge_cases import digests
from quantising import FORMATS, is_packed, quantised
from safetensors.torch import load_file, save_file
from stopping import SHARDS, stop
from torch import Tensor

from lowmem_aim.errors import MemoryBudgetError
from lowmem_aim.jobs.merge import merge
from lowmem_aim.recipe.from_flags import applied, empty_recipe
from lowmem_aim.recipe.reader import read_recipe
from lowmem_aim.recipe.recipe import Recipe
from lowmem_aim.recipe.yaml_tree import tree_of
from lowmem_aim.relaxing.activations import Activations
from lowmem_aim.system.options import Options

# Of each way to read a slice one: rows with scales, columns of what is stored, blocks that know no rows.
SOME = ("fp8 in partial blocks", "mxfp4", "nf4, double", "gptq, 8 bits, shuffled")
BY_FORMAT = others_long(FORMATS, ("fp8 in partial blocks", "nf4, double"))
Decoded = dict[str, Tensor]


@pytest.fixture
def models(tmp_path: Path) -> Callable[[str], tuple[Path, Decoded]]:
    """A folder with a quantised `base` of a format, an expert `one` that is not, and the base's weights.

    `whole` is the base with its weights decoded: float32 where they are quantised.
    """

    def made(name: str) -> tuple[Path, Decoded]:
        form = FORMATS[name]
        plain = tiny.build(form.architecture, tmp_path / "plain", dtype=torch.bfloat16, **form.changes)
        weights = quantised(form, plain, tmp_path / "base")
        tiny.perturbed(plain, tmp_path / "whole", scale=0.0)
        save_file(weights, tmp_path / "whole" / "model.safetensors", metadata={"format": "pt"})
        tiny.perturbed(plain, tmp_path / "one", scale=0.05)
        return tmp_path, weights

    return made


def recipe(folder: Path, base: str = "base", method: str = "task_arithmetic", **flags: Any) -> Recipe:
    given = {"method": method, "base": str(folder / base), "expert": (str(folder / "one"),), "weight": ("0.5",)}
    return read_recipe(applied(empty_recipe(), given | flags))


def tensors(folder: Path) -> Decoded:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


@pytest.mark.parametrize("name", BY_FORMAT)
def test_a_merge_is_that_of_the_decoded_models(name: str, models: Any, tmp_path: Path) -> None:
    folder, _ = models(name)
    merged = tensors(merge(recipe(folder), tmp_path / "out"))
    expected = tensors(merge(recipe(folder, "whole", dtype="bfloat16"), tmp_path / "expected"))
    assert merged.keys() == expected.keys()
    assert {value.dtype for value in merged.values()} == {torch.bfloat16}
    assert all(torch.equal(merged[key], value) for key, value in expected.items())


def test_a_quantised_model_alone_comes_out_as_bfloat16_that_says_nothing_of_it(models: Any, tmp_path: Path) -> None:
    folder, weights = models("fp8 in blocks")
    out = merge(
        read_recipe(applied(empty_recipe(), {"method": "linear", "expert": (str(folder / "base"),)})), tmp_path / "o"
    )
    merged = tensors(out)
    assert merged.keys() == weights.keys()
    assert all(torch.equal(merged[key], value.bfloat16()) for key, value in weights.items())
    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    assert "quantization_config" not in (out / "lowmem_aim.json").read_text()


@pytest.mark.parametrize("name", others_long(SOME, ("mxfp4",)))
def test_the_bytes_are_the_same_for_any_slices_reads_and_budget(name: str, models: Any, tmp_path: Path) -> None:
    folder, _ = models(name)
    made = recipe(folder, method="ties", density=("0.4",))
    expected = digests(merge(made, tmp_path / "expected"))
    with pytest.raises(MemoryBudgetError) as refused:
        merge(made, tmp_path / "small", Options(ram=1))
    smallest = int(re.findall(r"--ram (\d+)MB", refused.value.hint)[0]) * 10**6
    tight = smallest + smallest // 10  # this process grows from merge to merge
    ways = (Options(ram=tight), Options(slice_rows=1), Options(slice_rows=7, read="pread", threads=1))
    for number, options in enumerate(ways):
        assert digests(merge(made, tmp_path / f"{number}", options)) == expected, options


def test_a_stopped_merge_goes_on_to_the_same_bytes(models: Any, tmp_path: Path, each_tensor: None) -> None:
    folder, _ = models("nf4, double")
    expected = digests(merge(recipe(folder), tmp_path / "expected", SHARDS))
    stop(recipe(folder), tmp_path / "out", 9)
    assert digests(merge(recipe(folder), tmp_path / "out", SHARDS)) == expected


def test_a_changed_scale_is_another_input(models: Any, tmp_path: Path, run: Run) -> None:
    folder, _ = models("fbgemm")
    command = ("merge", tmp_path / "out", "--method", "linear", "--expert", folder / "base")
    assert run(*command).code == 0
    shard = next(file for file in (folder / "base").glob("*.safetensors") if _scales(file))
    stored = load_file(shard)
    stored[_scales(shard)[0]] *= 2
    save_file(stored, shard, metadata={"format": "pt"})
    assert run(*command).code == 7


def _scales(file: Path) -> list[str]:
    return [name for name in load_file(file) if name.endswith("_scale")]


@pytest.mark.parametrize("name", others_long([*FORMATS], ("fp8 in blocks", "mxfp4")))
def test_a_quantised_base_is_calibrated_as_its_decoded_weights_are(
    name: str, models: Any, tmp_path: Path, texts: Path
) -> None:
    folder, weights = models(name)
    rounded = {key: value.bfloat16() for key, value in weights.items()}
    save_file(rounded, folder / "whole" / "model.safetensors", metadata={"format": "pt"})
    found = [
        Activations.load(activations_of(folder / base, texts, tmp_path / f"{base}.safetensors"))
        for base in ("base", "whole")
    ]
    assert same(*found)


def test_aim_and_acm_take_a_quantised_base(models: Any, tmp_path: Path, texts: Path, run: Run) -> None:
    folder, _ = models("nf4")
    flags = ("--with", "both", "--calibration", texts, "--ram", "1GB")
    done = run("relax", folder / "one", tmp_path / "out", "--base", folder / "base", *flags)
    assert done.code == 0, done.err
    assert "`base` has 21 quantised weights (bitsandbytes), decoded as read" in done.err


def test_an_adapter_on_a_quantised_base_is_that_on_its_decoded_weights(models: Any, tmp_path: Path) -> None:
    folder, weights = models("nf4, double")
    write(folder / "adapter", factors(shapes_of(folder / "plain", "q_proj", "down_proj")))
    outs = []
    for base in ("base", "whole"):
        expert = f"{folder / base}+{folder / 'adapter'}"
        given = {"method": "linear", "expert": (expert,), "dtype": "float32"}
        outs.append(tensors(merge(read_recipe(applied(empty_recipe(), given)), tmp_path / f"out-{base}")))
    assert all(torch.equal(outs[0][key], value) for key, value in outs[1].items())
    changed = [key for key in weights if is_packed(FORMATS["nf4"], key) and not torch.equal(outs[0][key], weights[key])]
    assert len(changed) == 6


def test_the_plan_says_it(models: Any, tmp_path: Path, run: Run) -> None:
    folder, _ = models("awq")
    done = run("plan", tmp_path / "out", "--method", "linear", "--expert", folder / "base", "--no-measure")
    assert done.code == 0
    assert "has 21 quantised weights (awq), decoded as read" in done.err
    assert "bfloat16" in done.out


def test_slices_of_quantised_models_are_those_of_the_decoded_ones(models: Any, tmp_path: Path) -> None:
    """A layer twice, by a merge of one model and of two."""
    folder, _ = models("fp8 in partial blocks")
    outs = []
    for base in ("base", "whole"):
        sources = [{"model": str(folder / name), "layer_range": [0, 2]} for name in (base, "one")]
        again = [{"model": str(folder / name), "layer_range": [1, 3]} for name in ("one", base)]
        table = {
            "merge_method": "linear",
            "parameters": {"weight": 0.5},
            "dtype": "bfloat16",
            "slices": [{"sources": sources}, {"sources": again}],
        }
        outs.append(tensors(merge(read_recipe(tree_of(table, "recipe")), tmp_path / f"out-{base}")))
    assert outs[0].keys() == outs[1].keys()
    assert all(torch.equal(outs[0][key], value) for key, value in outs[1].items())
