"""Oddities of models and recipes that stop nothing are told by `plan` and `merge` alike; empty tensors stop both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from conftest import Place
from safetensors.torch import load_file, save_file

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def warned(place: Place, *more: object, recipe: dict[str, Any] | None = None) -> list[str]:
    """What `plan` warns of; the merge is checked to warn of the same."""
    if recipe:
        (place.folder / "recipe.yml").write_text(yaml.safe_dump(recipe))
        job: tuple[object, ...] = (place.folder / "recipe.yml", place.out)
    else:
        models = ("--base", place.folder / "base", "--expert", place.folder / "math", "--expert", place.folder / "code")
        job = (place.out, "--method", "ties", *models)
    foreseen = place.run("plan", *job, "--no-measure", "--json", *more)
    done = place.run("merge", *job, *more)
    assert foreseen.code == done.code == 0, done.err
    found: list[str] = json.loads(foreseen.out)["warnings"]
    shown = place.run("plan", *job, "--no-measure", *more).err
    assert all(text in done.err and text in shown for text in found)
    return found


def in_two_shards(folder: Path) -> dict[str, torch.Tensor]:
    """Cut a model into two shards; returns its tensors."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = (names[: len(names) // 2], names[len(names) // 2 :])
    for file, part in zip(SHARDS, parts, strict=True):
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, part in zip(SHARDS, parts, strict=True) for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "model.safetensors").unlink()
    return tensors


def test_what_is_in_order_is_not_warned_of(place: Place) -> None:
    in_two_shards(place.folder / "math")
    assert warned(place) == []


def test_a_tensor_that_stands_in_two_shards(place: Place) -> None:
    folder = place.folder / "math"
    tensors = in_two_shards(folder)
    second = load_file(folder / SHARDS[1])
    first_name = sorted(tensors)[0]
    save_file(second | {first_name: torch.zeros(1)}, folder / SHARDS[1], metadata={"format": "pt"})
    assert warned(place) == [f"`{folder}`: read where the index says: in two shards: 1 tensor, such as `{first_name}`"]


def test_a_tensor_that_the_index_does_not_name(place: Place) -> None:
    folder = place.folder / "math"
    in_two_shards(folder)
    save_file(load_file(folder / SHARDS[1]) | {"v": torch.zeros(1)}, folder / SHARDS[1], metadata={"format": "pt"})
    assert warned(place) == [f"`{folder}`: not read: in a shard, but not in the index: 1 tensor, such as `v`"]


@pytest.mark.parametrize("index", ["of shards", "of the file", "broken"])
def test_a_single_file_beside_an_index(index: str, place: Place) -> None:
    folder = place.folder / "math"
    if index == "of shards":
        tensors = in_two_shards(folder)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        names = load_file(folder / "model.safetensors")
        text = json.dumps({"weight_map": dict.fromkeys(names, "model.safetensors")})
        (folder / "model.safetensors.index.json").write_text(text[: None if index == "of the file" else -5])
    found = warned(place)
    assert bool(found) == (index == "of shards")
    for text in found:
        assert f"`{folder}` has both model.safetensors and model.safetensors.index.json" in text


@pytest.mark.parametrize("place_of_it", ["model", "top level", "aim"])
def test_a_filter_that_is_part_of_no_tensors_name(place_of_it: str, place: Place, texts: Path) -> None:
    idle = [{"filter": "mpl", "value": 0.5}, {"filter": "mlp", "value": 0.5}, {"filter": "*", "value": 0.5}]
    own: dict[str, Any] = {"weight": idle if place_of_it == "model" else 1.0}
    models = [{"model": str(place.folder / name), "parameters": own} for name in ("math", "code")]
    recipe = {"merge_method": "ties", "base_model": str(place.folder / "base"), "models": models}
    key = "weight"
    if place_of_it == "top level":
        key = "density"
        recipe["parameters"] = {"density": idle}
    elif place_of_it == "aim":
        key = "aim.omega"
        recipe["aim"] = {"omega": idle, "calibration": str(texts), "samples": 1}
    found = warned(place, recipe=recipe)
    assert [text for text in found if "the filter" in text] == [
        f"`{key}`: the filter `mpl` matches no name of a merged tensor"
    ]


def test_a_base_without_a_tokenizer(place: Place) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (place.folder / "base" / name).unlink()
    assert warned(place) == ["`base` has no tokenizer, and the output will have none"]


def test_an_expert_that_has_few_of_the_tokens(place: Place) -> None:
    file = place.folder / "math" / "tokenizer.json"
    table = json.loads(file.read_text())
    vocabulary = table["model"]["vocab"]
    kept = list(vocabulary)[:2]
    table["model"]["vocab"] = {name if name in kept else f"other{id}": id for name, id in vocabulary.items()}
    table["added_tokens"] = []
    file.write_text(json.dumps(table))
    (place.folder / "math" / "tokenizer_config.json").unlink()
    [told] = warned(place, "--tokenizer-source", "base")
    assert told == "only 2 of the 259 tokens of `base` are tokens of `math` too: is that the right model?"


@pytest.mark.parametrize("who", ["base", "math"])
@pytest.mark.parametrize("flags", [(), ("--tokenizer-source", "base")])
def test_weights_that_were_not_gathered_are_told_as_that(who: str, flags: tuple[str, ...], place: Place) -> None:
    tiny.edit_tensors(place.folder / who, lambda tensors: tensors.update(dict.fromkeys(tensors, torch.empty(0))))
    done = place.merge(*flags)
    place.refused(done, 3, "empty tensors", "has the shape [0]", "DeepSpeed ZeRO-3", "zero_to_fp32.py")
    assert "vocabulary" not in done.err
    models = ("--base", place.folder / "base", "--expert", place.folder / "math", "--expert", place.folder / "code")
    foreseen = place.run("plan", place.out, "--method", "ties", *models, *flags, "--no-measure")
    assert foreseen.code == 3
    assert [line for line in foreseen.err.splitlines() if "error: " in line] == [
        line for line in done.err.splitlines() if "error: " in line
    ]
