"""Recipes with `modules`: each section of a model made of its own models, layers and parameters."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from conftest import Run
from long_cases import others_long
from merge_cases import digests, tensors_in
from parted import ENCODERS, PICTURES, pictured, saved
from stopping import stop
from transformers import AutoConfig, AutoModelForImageTextToText, AutoModelForSeq2SeqLM

from lowmem_aim.errors import LowmemAimError
from lowmem_aim.events import Event, Notice, Planned
from lowmem_aim.jobs.merge import merge
from lowmem_aim.recipe.reader import read_recipe
from lowmem_aim.recipe.recipe import Recipe
from lowmem_aim.recipe.yaml_tree import tree_of
from lowmem_aim.system.options import Options

Tensors = dict[str, torch.Tensor]
TEXT, VISION, PROJECTOR = "text_decoder", "vision_tower", "multi_modal_projector"
# What the names of a section's tensors begin with.
PARTS = {
    "mistral3": {TEXT: ("language_model.",), VISION: ("vision_tower.",), PROJECTOR: ("multi_modal_projector.",)},
    "gemma3": {TEXT: ("language_model.",), VISION: ("vision_tower.",), PROJECTOR: ("multi_modal_projector.",)},
    "llava": {TEXT: ("language_model.",), VISION: ("vision_tower.",), PROJECTOR: ("multi_modal_projector.",)},
    "llama4": {TEXT: ("language_model.",), "vision_model": ("vision_model.",), PROJECTOR: ("multi_modal_projector.",)},
    "qwen2_vl": {TEXT: ("model.", "lm_head."), PROJECTOR: ("visual.merger.",), VISION: ("visual.",)},
    "qwen2_5_vl": {TEXT: ("model.", "lm_head."), PROJECTOR: ("visual.merger.",), VISION: ("visual.",)},
    "t5": {"encoder": ("encoder.",), "decoder": ("decoder.",), "shared": ("",)},
    "bart": {"encoder": ("model.encoder.",), "decoder": ("model.decoder.",), "shared": ("",)},
}
BART = {"d_model": 32, "encoder_layers": 3, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
HALVES: dict[str, dict[str, Any]] = {
    "t5": {**ENCODERS["t5"][1], "num_layers": 3, "vocab_size": tiny.VOCAB},
    "bart": {**BART, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "vocab_size": tiny.VOCAB},
}


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder with a tiny `base` of an architecture and its experts `math` and `code`, float32. Read only."""
    built: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in built:
            built[kind] = tmp_path_factory.mktemp(kind)
            if kind in PICTURES:
                base = pictured(kind, built[kind] / "base")
            else:
                base = saved(AutoModelForSeq2SeqLM, AutoConfig.for_model(kind, **HALVES[kind]), built[kind] / "base")
            for seed, name in enumerate(("math", "code"), start=1):
                tiny.perturbed(base, built[kind] / name, scale=0.05, seed=seed)
        return built[kind]

    return folder


def recipe(method: str, modules: dict[str, Any], **keys: Any) -> Recipe:
    return read_recipe(tree_of({"merge_method": method, "modules": modules, "dtype": "float32", **keys}, "recipe"))


def models(folder: Path, *names: str, **parameters: Any) -> dict[str, Any]:
    own = {"parameters": parameters} if parameters else {}
    return {"models": [{"model": str(folder / name)} for name in names], **own}


def slices(folder: Path, *taken: tuple[str, int, int]) -> dict[str, Any]:
    """A slice for each (model, first layer, end)."""
    sources = [{"model": str(folder / name), "layer_range": [first, end]} for name, first, end in taken]
    return {"slices": [{"sources": [source]} for source in sources]}


def section_of(name: str, kind: str) -> str:
    return next(part for part, prefixes in PARTS[kind].items() if name.startswith(prefixes))


def check(found: Tensors, expected: Callable[[str], torch.Tensor]) -> None:
    """Check every tensor to 1e-6 of its largest magnitude."""
    for name, value in found.items():
        wanted = expected(name).double()
        assert (value.double() - wanted).abs().max() <= 1e-6 * wanted.abs().max(), name


@pytest.mark.parametrize("kind", others_long(PARTS, ("mistral3", "qwen2_5_vl", "t5")))
def test_each_module_has_models_and_parameters_of_its_own(
    kind: str, family: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = family(kind)
    first, second, third = PARTS[kind]
    modules = {
        first: models(folder, "math", "code", weight=0.25),
        second: models(folder, "code"),
        third: {"models": [{"model": str(folder / "math"), "parameters": {"weight": 3.0}}]},
    }
    made = recipe("task_arithmetic", modules, base_model=str(folder / "base"), parameters={"weight": 0.5})
    base, math, code = (tensors_in(folder / name) for name in ("base", "math", "code"))
    weights = {first: (0.25, 0.25), second: (0.0, 0.5), third: (3.0, 0.0)}

    def expected(name: str) -> torch.Tensor:
        (a, b), start = weights[section_of(name, kind)], base[name].double()
        return start + a * (math[name].double() - start) + b * (code[name].double() - start)

    found = tensors_in(merge(made, tmp_path / "out"))
    assert found.keys() == base.keys()
    check({name: value for name, value in found.items() if name != "final_logits_bias"}, expected)  # BART's buffer


def test_lists_of_layers_are_modules_by_their_paths_beside_a_default_one(
    family: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = family("llava")
    modules = {"default": models(folder, "math"), "model.language_model.layers": models(folder, "code")}
    found = tensors_in(merge(recipe("passthrough", modules), tmp_path / "out"))
    sources = {"language_model.model.layers.": "code", "vision_tower.encoder.layers.": "math"}
    # Without a base the first model is the one whose config the output has, and whose layers are left as they are.
    for name, value in found.items():
        source = next((source for prefix, source in sources.items() if name.startswith(prefix)), "math")
        assert torch.equal(value, tensors_in(folder / source)[name]), name


def test_a_module_that_is_not_named_is_the_bases_and_is_told(family: Callable[[str], Path], tmp_path: Path) -> None:
    folder, told = family("mistral3"), list[Event]()
    made = recipe("linear", {TEXT: models(folder, "base", "math", weight=1.0)}, base_model=str(folder / "base"))
    found = tensors_in(merge(made, tmp_path / "out", emit=told.append))
    base = tensors_in(folder / "base")
    left = {name for name in base if section_of(name, "mistral3") != TEXT}
    assert all(torch.equal(found[name], base[name]) for name in left)
    assert not any(torch.equal(found[name], base[name]) for name in base.keys() - left)
    notices = [event.text for event in told if isinstance(event, Notice)]
    for part in (VISION, PROJECTOR):
        text = f"the recipe does not name the module `{part}`: the output has that of `base`, as it is"
        assert notices.count(text) == 1
    assert set(next(event for event in told if isinstance(event, Planned)).about["left_out"].popitem()[1]) == left


def _number_of_layers(out: Path, key: str) -> int:
    value = json.loads((out / "config.json").read_text())
    for part in key.split("."):
        value = value[part]
    return int(value)


@pytest.mark.parametrize(
    ("kind", "part", "layers", "key"),
    others_long(
        [
            ("qwen2_5_vl", TEXT, "model.layers.", "text_config.num_hidden_layers"),
            ("qwen2_5_vl", VISION, "visual.blocks.", "vision_config.depth"),
            ("qwen2_vl", VISION, "visual.blocks.", "vision_config.depth"),
            ("mistral3", VISION, "vision_tower.transformer.layers.", "vision_config.num_hidden_layers"),
            ("llava", VISION, "vision_tower.encoder.layers.", "vision_config.num_hidden_layers"),
            ("gemma3", TEXT, "language_model.model.layers.", "text_config.num_hidden_layers"),
            ("gemma3", VISION, "vision_tower.encoder.layers.", "vision_config.num_hidden_layers"),
            ("llama4", TEXT, "language_model.model.layers.", "text_config.num_hidden_layers"),
            ("llama4", "vision_model", "vision_model.model.layers.", "vision_config.num_hidden_layers"),
            ("t5", "encoder", "encoder.block.", "num_layers"),
            ("t5", "decoder", "decoder.block.", "num_decoder_layers"),
            ("bart", "encoder", "model.encoder.layers.", "encoder_layers"),
            ("bart", "decoder", "model.decoder.layers.", "decoder_layers"),
        ],
        (
            ("qwen2_5_vl", VISION, "visual.blocks.", "vision_config.depth"),
            ("llama4", TEXT, "language_model.model.layers.", "text_config.num_hidden_layers"),
            ("t5", "encoder", "encoder.block.", "num_layers"),
            ("bart", "decoder", "model.decoder.layers.", "decoder_layers"),
        ),
    ),
)
def test_layers_of_a_module_are_stacked_and_its_part_of_the_config_follows(
    kind: str, part: str, layers: str, key: str, family: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = family(kind)
    end = _number_of_layers(folder / "base", key)
    others = {name: models(folder, "base") for name in PARTS[kind] if name != part}
    out = merge(
        recipe("passthrough", {part: slices(folder, ("math", 0, end), ("code", end - 1, end)), **others}),
        tmp_path / "out",
    )
    base, math, code, found = (tensors_in(place) for place in (folder / "base", folder / "math", folder / "code", out))
    inside = [name.removeprefix(f"{layers}0.") for name in base if name.startswith(f"{layers}0.")]
    stacked = [(math, number) for number in range(end)] + [(code, end - 1)]
    for number, (model, own) in enumerate(stacked):
        for name in (name for name in inside if f"{layers}{own}.{name}" in model):  # T5's first alone has positions
            assert torch.equal(found[f"{layers}{number}.{name}"], model[f"{layers}{own}.{name}"])
    elsewhere = {name for name in base if section_of(name, kind) != part and name != "final_logits_bias"}  # math's
    assert all(torch.equal(found[name], base[name]) for name in elsewhere)
    assert _number_of_layers(out, key) == end + 1
    auto = AutoModelForSeq2SeqLM if kind in HALVES else AutoModelForImageTextToText
    _, info = auto.from_pretrained(out, output_loading_info=True)
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_a_gradient_runs_over_the_layers_of_each_list_alone(family: Callable[[str], Path], tmp_path: Path) -> None:
    folder = family("mistral3")
    table = {"merge_method": "passthrough", "models": [{"model": str(folder / "math")}], "dtype": "float32"}
    table["parameters"] = {"scale": [1.0, 5.0]}
    found, math = (
        tensors_in(merge(read_recipe(tree_of(table, "recipe")), tmp_path / "out")),
        tensors_in(folder / "math"),
    )
    for prefix, scales in (("language_model.model.layers.", (1, 3, 5)), ("vision_tower.transformer.layers.", (1, 5))):
        for number, scale in enumerate(scales):
            for name in (name for name in math if name.startswith(f"{prefix}{number}.")):
                assert torch.equal(found[name], math[name] * scale), name


def test_a_text_model_joins_the_text_and_leaves_the_tower_to_others(
    family: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = family("llava")
    text = tiny.build("llama", tmp_path / "text")
    modules = {
        TEXT: {"models": [{"model": str(text)}], "parameters": {"weight": 1.0}},
        VISION: {**slices(folder, ("math", 0, 2)), "parameters": {"weight": 1.0}},
    }
    found = tensors_in(merge(recipe("task_arithmetic", modules, base_model=str(folder / "base")), tmp_path / "out"))
    words, math, base = tensors_in(text), tensors_in(folder / "math"), tensors_in(folder / "base")
    sources = {"language_model.": words, "vision_tower.": math, "multi_modal_projector.": base}
    for name, value in found.items():
        prefix = next(prefix for prefix in sources if name.startswith(prefix))
        wanted = sources[prefix][name.removeprefix("language_model.")]
        assert (value - wanted).abs().max() <= 1e-6 * wanted.abs().max(), name


def stacked(folder: Path, **keys: Any) -> Recipe:
    """Text and vision layers of two experts, by task arithmetic."""
    modules = {
        VISION: slices(folder, ("math", 0, 2), ("code", 1, 2)),
        TEXT: slices(folder, ("math", 0, 2), ("code", 1, 3)),
    }
    return recipe("task_arithmetic", modules, base_model=str(folder / "base"), parameters={"weight": 0.5}, **keys)


def test_aim_and_acm_relax_the_layers_of_the_text_as_without_modules(
    family: Callable[[str], Path], tmp_path: Path, texts: Path
) -> None:
    folder = family("mistral3")
    keys = {"aim": {"calibration": str(texts)}, "acm": {"calibration": str(texts), "theta": 0.3}}
    found = tensors_in(merge(stacked(folder, **keys), tmp_path / "out"))
    plain = tensors_in(merge(stacked(folder), tmp_path / "plain"))
    table = {"merge_method": "task_arithmetic", "base_model": str(folder / "base"), "parameters": {"weight": 0.5}}
    table |= slices(folder, ("math", 0, 2), ("code", 1, 3)) | {"dtype": "float32"} | keys
    alone = tensors_in(merge(read_recipe(tree_of(table, "recipe")), tmp_path / "alone"))
    for name, value in found.items():
        inside = name.startswith("language_model.")
        assert torch.equal(value, (alone if inside else plain)[name]), name
        assert not (name.startswith("language_model.model.layers.") and torch.equal(value, plain[name])), name


def test_acm_leaves_a_vision_towers_layers_as_merged(
    family: Callable[[str], Path], tmp_path: Path, texts: Path
) -> None:
    folder = family("mistral3")
    table = {"merge_method": "linear", "base_model": str(folder / "base"), "parameters": {"weight": 1.0}}
    table |= models(folder, "math", "code")
    acm = {"acm": {"calibration": str(texts), "theta": 0.3}}
    plain, found = (
        tensors_in(merge(read_recipe(tree_of(table | keys, "recipe")), tmp_path / name))
        for name, keys in (("plain", {}), ("out", acm))
    )
    changed = {name for name in plain if not torch.equal(plain[name], found[name])}
    assert any(name.startswith("language_model.model.layers.0.") for name in changed)
    assert not any(name.startswith("vision_tower.") for name in changed)


def test_the_map_of_layers_counts_those_of_the_text_alone(family: Callable[[str], Path], tmp_path: Path) -> None:
    folder, told = family("mistral3"), list[Event]()
    out = merge(stacked(folder), tmp_path / "out", emit=told.append)
    planned = next(event for event in told if isinstance(event, Planned))
    text = [name for name in tensors_in(out) if name.startswith("language_model.model.layers.")]
    assert sorted(filter(None, planned.layers)) == ["0", "1", "2", "3"]
    assert sum(count for layer, count in planned.layers.items() if layer) == len(text)


def test_modules_stopped_or_in_small_pieces_give_the_same_bytes(family: Callable[[str], Path], tmp_path: Path) -> None:
    made = stacked(family("mistral3"))
    whole = digests(merge(made, tmp_path / "whole"))
    assert digests(merge(made, tmp_path / "rows", Options(slice_rows=1))) == whole
    stop(made, tmp_path / "stopped", 19, Options())
    assert digests(merge(made, tmp_path / "stopped")) == whole


def test_the_recipe_of_an_output_of_modules_makes_it_again(
    family: Callable[[str], Path], tmp_path: Path, run: Run
) -> None:
    folder = family("mistral3")
    modules = {
        TEXT: {**slices(folder, ("math", 0, 2), ("code", 1, 3)), "parameters": {"weight": [0.2, 0.9]}},
        PROJECTOR: models(folder, "math", "code"),
    }
    made = recipe("task_arithmetic", modules, base_model=str(folder / "base"), parameters={"weight": 0.5})
    out = merge(made, tmp_path / "out")
    table = yaml.safe_load((out / "mergekit_config.yml").read_text())
    (folder / "again.yml").write_text(yaml.safe_dump(table))
    assert run("merge", folder / "again.yml", tmp_path / "again").code == 0
    assert digests(tmp_path / "again")["model.safetensors"] == digests(out)["model.safetensors"]


def test_a_stage_made_of_modules_is_a_model_for_the_next(
    family: Callable[[str], Path], tmp_path: Path, run: Run
) -> None:
    folder = family("mistral3")
    first = {"merge_method": "passthrough", "dtype": "float32"}
    first["modules"] = {VISION: slices(folder, ("math", 0, 2), ("code", 1, 2)), TEXT: models(folder, "math")}
    last = {"merge_method": "passthrough", "dtype": "float32"}
    last["modules"] = {
        VISION: slices(Path(), ("tall", 1, 3)),
        TEXT: models(Path(), "tall"),
        PROJECTOR: models(Path(), "tall"),
    }
    file = tmp_path / "stages.yml"
    file.write_text(yaml.safe_dump_all([{"name": "tall", **first}, last]))
    assert run("plan", file, tmp_path / "out").code == 0
    assert run("merge", file, tmp_path / "out").code == 0
    found, math, code = (tensors_in(place) for place in (tmp_path / "out", folder / "math", folder / "code"))
    prefix = "vision_tower.transformer.layers."
    for number, (model, own) in enumerate([(math, 1), (code, 1)]):
        name = "attention.q_proj.weight"
        assert torch.equal(found[f"{prefix}{number}.{name}"], model[f"{prefix}{own}.{name}"])
    assert f"{prefix}2.{name}" not in found


def test_layers_of_a_module_without_layers_are_not_asked_for(family: Callable[[str], Path], tmp_path: Path) -> None:
    folder = family("t5")
    modules = {
        "shared": slices(folder, ("math", 0, 0)),
        "encoder": models(folder, "base"),
        "decoder": models(folder, "base"),
    }
    found = tensors_in(merge(recipe("passthrough", modules), tmp_path / "out"))
    assert torch.equal(found["shared.weight"], tensors_in(folder / "math")["shared.weight"])


@pytest.mark.parametrize(
    ("modules", "told"),
    [
        (
            {"text_decodr": None, "nonsense": None, PROJECTOR: None},
            [
                "recipe: modules: text_decodr: `math` has no module `text_decodr`; did you mean `text_decoder`?",
                "recipe: modules: nonsense: `math` has no module `nonsense`",
            ],
        ),
        ({TEXT: None, VISION: None, "default": None}, ["`math` has no module `default` beside the others"]),
        ({TEXT: (0, 2), VISION: (1, 3)}, ["`layer_range` ends at 3, but `math` has 2 layers in `vision_tower`"]),
        ({TEXT: (0, 0)}, ["`layer_range` takes no layer of"]),
    ],
)
def test_modules_and_layers_that_a_model_lacks_are_refused_before_work(
    modules: dict[str, Any], told: list[str], family: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = family("mistral3")
    given = {
        name: slices(folder, ("math", *taken)) if taken else models(folder, "math") for name, taken in modules.items()
    }
    with pytest.raises(LowmemAimError) as caught:
        merge(recipe("passthrough", given), tmp_path / "out")
    assert len(caught.value.problems) == len(told), caught.value.problems
    for problem, text in zip(caught.value.problems, told, strict=True):
        assert text in problem
    assert caught.value.exit_code == 2
    assert not (tmp_path / "out").exists()


def test_the_modules_that_a_model_has_are_listed(family: Callable[[str], Path], llama: Path, tmp_path: Path) -> None:
    for folder, listed in (
        (llama, "its modules are `default`"),
        (family("mistral3"), f"`{TEXT}`, `{VISION}`, `{PROJECTOR}`"),
    ):
        with pytest.raises(LowmemAimError) as caught:
            merge(recipe("passthrough", {"nonsense": models(folder, "math")}), tmp_path / "out")
        assert listed in (caught.value.hint or "")


def test_what_is_wrong_in_each_module_is_told_at_once(llama: Path) -> None:
    both = {**models(llama, "math"), **slices(llama, ("math", 0, 1))}
    modules = {"a": both, "b": {"models": []}, "c": slices(llama, ("math", 2, 1)), "d": models(llama, "math")}
    with pytest.raises(LowmemAimError) as caught:
        recipe("linear", modules)
    told = ["`models` and `slices` exclude each other", "at least one model", "two rising", "needs a `weight`"]
    for text in told:
        assert any(text in problem for problem in caught.value.problems), (text, caught.value.problems)


def test_a_text_model_with_several_lists_of_layers_is_one_module_or_its_lists(tmp_path: Path) -> None:
    base = tiny.build("xlm", tmp_path / "base", emb_dim=32, n_layers=2, n_heads=4, max_position_embeddings=128)
    other = tiny.perturbed(base, tmp_path / "other")
    whole = {"default": models(tmp_path, "other")}
    theirs, ours = tensors_in(other), tensors_in(base)
    found = tensors_in(merge(recipe("passthrough", whole, base_model=str(base)), tmp_path / "whole"))
    assert all(torch.equal(found[name], theirs[name]) for name in found)
    lists = {"transformer.attentions": models(tmp_path, "base"), "default": models(tmp_path, "other")}
    found = tensors_in(merge(recipe("passthrough", lists), tmp_path / "lists"))
    assert torch.equal(found["transformer.attentions.1.q_lin.weight"], ours["transformer.attentions.1.q_lin.weight"])
    assert torch.equal(found["transformer.embeddings.weight"], theirs["transformer.embeddings.weight"])


def test_a_model_is_of_the_class_that_has_a_place_for_all_of_its_tensors(
    family: Callable[[str], Path], tmp_path: Path
) -> None:
    # With an embedding of its own, the decoder alone is a model too, in whose class the encoder has no place.
    base = tiny.perturbed(family("bart") / "base", tmp_path / "base")
    shared = {f"model.{part}.embed_tokens.weight": "model.shared.weight" for part in ("encoder", "decoder")}
    tiny.edit_tensors(base, lambda tensors: tensors.update({to: tensors[name].clone() for to, name in shared.items()}))
    modules = {part: models(tmp_path, "base") for part in PARTS["bart"]}
    found = tensors_in(merge(recipe("passthrough", modules), tmp_path / "out"))
    assert found.keys() == tensors_in(base).keys()
