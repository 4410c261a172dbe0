"""Each refusal that `merge` makes before it works, `plan` makes too: the same exit code, the same problems.

A case spoils the models, the disk or the recipe in one way, and gives what to type after the usual command. The cases
of a module that makes refusals stand together; those that take the same path as another are `long`.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import adapters
import pytest
import tiny
import torch
import yaml
from conftest import Place, Ran
from merge_cases import recipe as recipe_of
from stopping import SHARDS, stop

from lowmem_aim.jobs.merge import merge
from lowmem_aim.output.folder import PRIVATE, SMALL_FILES_BYTES
from lowmem_aim.output.journal import Journal
from lowmem_aim.output.records import VERSION, Schema
from lowmem_aim.recipe.reader import read_recipe
from lowmem_aim.recipe.yaml_tree import load_tree, one_of, tree_of
from lowmem_aim.relaxing.activations import Activations
from lowmem_aim.system import memory
from lowmem_aim.system.lock import locked

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@dataclass(frozen=True)
class Scene:
    """The models in a place, and the recipe that `plan` and `merge` are given."""

    place: Place
    texts: Path
    patch: pytest.MonkeyPatch
    stack: contextlib.ExitStack
    recipe: dict[str, Any]

    @property
    def math(self) -> Path:
        return self.place.folder / "math"

    @property
    def base(self) -> Path:
        return self.place.folder / "base"

    def job(self) -> Path:
        file = self.place.folder / "recipe.yml"
        file.write_text(yaml.safe_dump(self.recipe))
        return file

    def aim(self, calibration: object = None, **more: Any) -> None:
        self.recipe["aim"] = {"omega": 0.4, "calibration": str(calibration or self.texts), **more}

    def named(self, name: str, text: str) -> Path:
        file = self.place.folder / name
        file.write_text(text)
        return file


@pytest.fixture
def scene(place: Place, texts: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    models = [
        {"model": str(place.folder / name), "parameters": {"weight": 1.0, "density": 0.5}} for name in ("math", "code")
    ]
    recipe = {"merge_method": "ties", "base_model": str(place.folder / "base"), "models": models}
    with contextlib.ExitStack() as stack:
        yield Scene(place, texts, monkeypatch, stack, recipe)


Spoil = Callable[[Scene], tuple[object, ...] | None]
CASES: dict[str, tuple[int, str, Spoil]] = {}
QUICK: set[str] = set()


def refusal(code: int, said: str, *, quick: bool = False) -> Callable[[Spoil], Spoil]:
    """Add a case: the exit code, a part of what is said, and whether `make test` has it."""

    def add(spoil: Spoil) -> Spoil:
        CASES[spoil.__name__] = code, said, spoil
        if quick:
            QUICK.add(spoil.__name__)
        return spoil

    return add


# --- the output folder ------------------------------------------------------------------------------------------------


@refusal(2, "is a file")
def out_is_a_file(scene: Scene) -> None:
    scene.place.out.write_text("mine")


@refusal(2, "is not empty", quick=True)
def out_is_taken(scene: Scene) -> None:
    scene.place.out.mkdir()
    (scene.place.out / "mine.txt").write_text("mine")


@refusal(2, "lies inside an input model")
def out_is_in_an_input(scene: Scene) -> None:
    scene.place.out.symlink_to(scene.math / "out", target_is_directory=True)
    (scene.math / "out").mkdir()


@refusal(2, "each of several outputs needs a folder in it")
def out_has_one_merge_and_several_are_asked_for(scene: Scene) -> None:
    merge(read_recipe(load_tree(scene.job())), scene.place.out)
    scene.aim()
    scene.recipe["aim"]["omega"] = [0.2, 0.6]


@refusal(4, "cannot be written", quick=True)
def out_cannot_be_written(scene: Scene) -> None:
    def fails(**given: Any) -> None:
        raise PermissionError(13, "Permission denied")

    scene.patch.setattr("lowmem_aim.output.folder.tempfile", SimpleNamespace(TemporaryFile=fails))


@refusal(6, "another run", quick=True)
def a_run_is_at_work(scene: Scene) -> None:
    (scene.place.out / PRIVATE).mkdir(parents=True)
    scene.stack.enter_context(locked(scene.place.out / PRIVATE / "lock"))


@refusal(7, "merge_method: linear then, ties now", quick=True)
def out_has_another_jobs_interrupted_run(scene: Scene) -> None:
    stop(recipe_of(scene.place.folder, "linear", ("math", "code")), scene.place.out, 9)


@refusal(7, "stage `first`: the recipe no longer has it")
def out_has_the_stages_of_another_recipe(scene: Scene) -> None:
    stage = {**scene.recipe, "name": "first"}
    last = {"merge_method": "passthrough", "models": [{"model": "first"}]}
    stop(read_recipe(one_of([tree_of(stage, "stage"), tree_of(last, "last")])), scene.place.out, 9)


@refusal(7, "the calibration of AIM has changed")
def an_interrupted_runs_texts_are_others(scene: Scene) -> tuple[object, ...]:
    scene.aim()
    stop(read_recipe(load_tree(scene.job())), scene.place.out, 9)
    scene.texts.write_text('{"text": "another text of the same name"}\n')
    return ("--shard-size", SHARDS.shard_bytes)


@refusal(7, "no longer has the same tensors or files")
def an_interrupted_runs_input_has_another_size(scene: Scene) -> tuple[object, ...]:
    stop(read_recipe(load_tree(scene.job())), scene.place.out, 9)
    tiny.edit_tensors(scene.math, lambda tensors: tensors.update({"v": torch.ones(3)}))
    return ("--shard-size", SHARDS.shard_bytes)


@refusal(7, f"records of version {VERSION + 1}")
def out_has_another_versions_run(scene: Scene) -> tuple[object, ...]:
    stop(read_recipe(load_tree(scene.job())), scene.place.out, 9)
    with Journal(scene.place.out / PRIVATE) as journal:
        journal.keep(Schema(VERSION + 1))
    return ("--shard-size", SHARDS.shard_bytes)


@refusal(2, "it holds another merge")
def out_has_another_finished_merge(scene: Scene) -> tuple[object, ...]:
    merge(read_recipe(load_tree(scene.job())), scene.place.out)
    return ("--density", "0.3")


@refusal(7, "its inputs have changed since", quick=True)
def the_base_of_a_finished_merge_has_another_config(scene: Scene) -> None:
    merge(read_recipe(load_tree(scene.job())), scene.place.out)
    tiny.edit_config(scene.base, an_addition=1)


@refusal(2, "its journal is damaged")
def the_journal_of_a_finished_merge_is_lost(scene: Scene) -> None:
    merge(read_recipe(load_tree(scene.job())), scene.place.out)
    (scene.place.out / PRIVATE / "journal.sqlite").write_bytes(b"")


# --- models -----------------------------------------------------------------------------------------------------------


@refusal(3, "no model folder", quick=True)
def a_model_is_missing(scene: Scene) -> None:
    scene.recipe["models"][1]["model"] = str(scene.place.folder / "none")


@refusal(3, "is a file, not a model folder")
def a_model_is_a_file(scene: Scene) -> None:
    scene.recipe["models"][1]["model"] = str(scene.named("a.txt", ""))


@refusal(3, "there is no adapter folder `./lora`")
def an_adapter_is_missing(scene: Scene) -> None:
    scene.recipe["models"][1]["model"] += "+./lora"


@refusal(3, "`use_qalora`")
def an_adapter_is_of_another_kind(scene: Scene) -> None:
    adapter = adapters.write(scene.place.folder / "lora", {}, use_qalora=True)
    scene.recipe["models"][1]["model"] += f"+{adapter}"


@refusal(3, "is a LoRA adapter, not a whole model")
def an_adapter_is_given_as_a_model(scene: Scene) -> None:
    scene.recipe["models"][1]["model"] = str(adapters.write(scene.place.folder / "lora", {}))


@refusal(3, "has no config.json", quick=True)
def there_is_no_config(scene: Scene) -> None:
    (scene.math / "config.json").unlink()


@refusal(3, "is not valid JSON")
def a_config_is_no_json(scene: Scene) -> None:
    (scene.math / "config.json").write_text("{")


@refusal(3, "not a whole number from 1 to 1000")
def a_config_has_too_many_layers(scene: Scene) -> None:
    tiny.edit_config(scene.math, num_hidden_layers=10**6)


@refusal(3, "weights of 3 bits are not read")
def a_model_is_quantised_in_a_way_that_is_not_read(scene: Scene) -> None:
    tiny.edit_config(scene.math, quantization_config={"quant_method": "gptq", "bits": 3})


@refusal(3, "transformers does not accept the config")
def a_base_is_of_no_known_type(scene: Scene) -> None:
    for name in ("base", "math", "code"):
        tiny.edit_config(scene.place.folder / name, model_type="unheard_of")


@refusal(3, "only pickle")
def there_is_only_pickle(scene: Scene) -> None:
    (scene.math / "model.safetensors").rename(scene.math / "pytorch_model.bin")


@refusal(3, "is a Git LFS pointer", quick=True)
def a_shard_is_a_pointer(scene: Scene) -> None:
    (scene.math / "model.safetensors").write_text(POINTER)


@refusal(3, "is not a valid safetensors file")
def a_shard_is_cut_off(scene: Scene) -> None:
    os.truncate(scene.math / "model.safetensors", 9000)


@refusal(3, "no `weight_map`")
def an_index_is_none(scene: Scene) -> None:
    (scene.math / "model.safetensors").rename(scene.math / "a.safetensors")
    (scene.math / "model.safetensors.index.json").write_text("{}")


@refusal(3, "which is missing")
def a_shard_is_missing(scene: Scene) -> None:
    (scene.math / "model.safetensors").rename(scene.math / "a.safetensors")
    (scene.math / "model.safetensors.index.json").write_text('{"weight_map": {"x": "b.safetensors"}}')


@refusal(3, "leads out of its model folder")
def a_file_is_a_link_to_elsewhere(scene: Scene) -> None:
    (scene.math / "vocab.json").symlink_to("/etc/hostname")


@refusal(3, "DeepSpeed ZeRO-3")
def weights_are_empty(scene: Scene) -> None:
    tiny.edit_tensors(scene.math, lambda tensors: tensors.update(dict.fromkeys(tensors, torch.empty(0))))


@refusal(3, "does not fit `base`: `num_attention_heads` 2, not 4", quick=True)
def configs_differ(scene: Scene) -> None:
    tiny.edit_config(scene.math, num_attention_heads=2)


@refusal(3, "lacks the tensor")
def a_tensor_is_missing(scene: Scene) -> None:
    tiny.edit_tensors(scene.math, lambda tensors: tensors.pop("model.norm.weight"))


@refusal(3, "lacks 1 tensors of its model")
def a_tensor_of_the_base_is_missing(scene: Scene) -> None:
    tiny.edit_tensors(scene.base, lambda tensors: tensors.pop("model.norm.weight"))


@refusal(3, "the vocabulary differs")
def vocabularies_differ(scene: Scene) -> None:
    tiny.edit_tensors(scene.math, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(9, 32)}))


@refusal(3, "has no tokenizer")
def tokens_cannot_be_matched(scene: Scene) -> tuple[object, ...]:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (scene.math / name).unlink()
    return ("--tokenizer-source", "base")


@refusal(2, "`math` has no token `<none>`")
def a_token_takes_its_row_from_a_model_that_lacks_it(scene: Scene) -> None:
    source = {"kind": "model_token", "model": str(scene.math), "token": "<none>"}
    scene.recipe["tokenizer"] = {"source": "base", "tokens": {"<s>": {"source": source}}}


@refusal(3, "there is no model folder")
def the_model_of_the_tokenizer_is_missing(scene: Scene) -> None:
    scene.recipe["tokenizer_source"] = str(scene.math / "nowhere")


@refusal(3, "has no tokenizer")
def the_model_of_the_tokenizer_has_none(scene: Scene) -> None:
    (scene.math / "empty").mkdir()
    scene.recipe["tokenizer_source"] = str(scene.math / "empty")


@refusal(3, "should be tied to", quick=True)
def a_tied_head_differs(scene: Scene) -> None:
    for name in ("base", "math", "code"):
        tiny.edit_config(scene.place.folder / name, tie_word_embeddings=True)


# --- small files ------------------------------------------------------------------------------------------------------


@refusal(3, "is a Git LFS pointer")
def a_tokenizer_is_a_pointer(scene: Scene) -> None:
    (scene.base / "tokenizer.json").write_text(POINTER)


@refusal(3, "is not valid JSON", quick=True)
def a_processors_config_is_no_json(scene: Scene) -> None:
    (scene.base / "preprocessor_config.json").write_text("{")


@refusal(3, "`the output`")
def layers_make_no_model(scene: Scene) -> None:
    """A layer without experts after one that has some, which DeepSeek's config cannot say."""
    model = str(tiny.build("deepseek_v3", scene.place.folder / "mixture"))
    sources = [{"model": model, "layer_range": [first, first + 1]} for first in (1, 0)]
    scene.recipe.clear()
    scene.recipe.update(merge_method="passthrough", slices=[{"sources": [source]} for source in sources])


@refusal(3, "not a plain name")
def modules_lead_out(scene: Scene) -> None:
    (scene.base / "modules.json").write_text('[{"path": "../math"}]')


# --- the recipe against the models, and flags -------------------------------------------------------------------------


@refusal(2, "`weight` has no value for", quick=True)
def a_parameter_has_no_value(scene: Scene) -> None:
    scene.recipe["models"][0]["parameters"]["weight"] = [{"filter": "mlp", "value": 1.0}]


@refusal(2, "must lie between 0 and 1")
def a_method_refuses_its_parameters(scene: Scene) -> None:
    scene.recipe.update({"merge_method": "della", "parameters": {"epsilon": 0.9}})


@refusal(2, "the weights sum to zero", quick=True)
def weights_cancel_in_linear(scene: Scene) -> None:
    scene.recipe["merge_method"] = "linear"
    for model, weight in zip(scene.recipe["models"], (1.0, -1.0), strict=True):
        model["parameters"] = {"weight": weight}


@refusal(2, "all weights are zero")
def weights_are_zero_in_multislerp(scene: Scene) -> None:
    scene.recipe["merge_method"] = "multislerp"
    del scene.recipe["base_model"]
    for model in scene.recipe["models"]:
        model["parameters"] = {"weight": 0.0}


@refusal(2, "needs a method that builds on a base")
def values_that_are_not_finite_have_no_base(scene: Scene) -> tuple[object, ...]:
    scene.recipe["merge_method"] = "linear"
    for model in scene.recipe["models"]:
        model["parameters"] = {"weight": 1.0}
    return ("--nonfinite", "base")


@refusal(2, "a shard size of 5 bytes is too small")
def shards_are_too_small(scene: Scene) -> tuple[object, ...]:
    return ("--shard-size", "5")


@refusal(2, "cannot be used here")
def a_device_is_not_there(scene: Scene) -> tuple[object, ...]:
    return ("--device", "cuda:77")


@refusal(2, "--vram has no meaning")
def there_is_no_vram(scene: Scene) -> tuple[object, ...]:
    return ("--device", "cpu", "--vram", "1GB")


# --- calibration ------------------------------------------------------------------------------------------------------


@refusal(3, "no calibration file", quick=True)
def texts_and_a_model_are_missing(scene: Scene) -> None:
    scene.aim(scene.place.folder / "none.jsonl")
    a_model_is_missing(scene)


@refusal(3, "there is no calibration file")
def texts_are_missing(scene: Scene) -> None:
    scene.aim(scene.place.folder / "none.jsonl")


@refusal(3, "is not UTF-8 text")
def texts_are_bytes(scene: Scene) -> None:
    scene.aim(scene.named("a.txt", ""))
    (scene.place.folder / "a.txt").write_bytes(b"\xff")


@refusal(3, "not a JSON object with a text")
def texts_are_no_json(scene: Scene) -> None:
    scene.aim(scene.named("a.jsonl", "{}"))


@refusal(3, "at least 16 are needed", quick=True)
def texts_are_too_short(scene: Scene) -> None:
    scene.aim(scene.named("a.txt", "short"))


@refusal(2, "a calibration file ends in")
def texts_are_of_another_kind(scene: Scene) -> None:
    scene.aim(scene.named("a.csv", "a,b"))


@refusal(3, "is a folder", quick=True)
def texts_are_a_folder(scene: Scene) -> None:
    scene.aim(scene.base)


@refusal(3, "its tokenizer gives a calibration text the id 100000", quick=True)
def a_tokenizer_has_tokens_without_rows(scene: Scene) -> None:
    scene.aim()
    tokens = json.loads((scene.base / "tokenizer.json").read_text())
    tokens["model"]["vocab"]["e"] = 100_000
    (scene.base / "tokenizer.json").write_text(json.dumps(tokens))


@refusal(3, "has no tokenizer")
def texts_have_no_tokenizer(scene: Scene) -> None:
    scene.aim()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (scene.base / name).unlink()


@refusal(3, "there is no calibration file")
def activations_are_missing(scene: Scene) -> None:
    scene.aim(scene.place.folder / "none.safetensors")


@refusal(3, "is a safetensors file, but not of activations")
def activations_are_a_model(scene: Scene) -> None:
    scene.aim(scene.base / "model.safetensors")


@refusal(3, "the activations name no weight of", quick=True)
def activations_are_of_another_model(scene: Scene) -> None:
    file = scene.place.folder / "a.safetensors"
    Activations({"h.0.weight": torch.ones(1, 4)}).save(file)
    scene.aim(file)


@refusal(2, "`acm.calibration` must be texts", quick=True)
def acm_is_given_activations(scene: Scene) -> None:
    scene.recipe["acm"] = {"calibration": "a.safetensors"}


@refusal(3, "there is no calibration file")
def acm_has_no_texts(scene: Scene) -> None:
    scene.recipe["acm"] = {"calibration": str(scene.place.folder / "none.jsonl")}


@refusal(3, "at least 16 are needed", quick=True)
def an_experts_texts_are_too_short(scene: Scene) -> None:
    scene.recipe["merge_method"] = "regmean"
    for model in scene.recipe["models"]:
        model |= {"parameters": {}, "calibration": str(scene.named("short.txt", "too short"))}


# --- memory and disk --------------------------------------------------------------------------------------------------


@refusal(5, "hint: ", quick=True)
def the_program_itself_takes_more(scene: Scene) -> tuple[object, ...]:
    scene.patch.setattr(memory, "anonymous_bytes", lambda: 400_000_000)
    return ("--ram", "1MB")


@refusal(5, "besides the program itself", quick=True)
def rows_do_not_fit(scene: Scene) -> tuple[object, ...]:
    scene.patch.setattr(memory, "anonymous_bytes", lambda: 400_000_000)
    return ("--ram", "400001000B")


@refusal(5, "running the model block by block")
def a_forward_does_not_fit(scene: Scene) -> tuple[object, ...]:
    scene.patch.setattr(memory, "anonymous_bytes", lambda: 100_000_000)
    scene.recipe["acm"] = {"calibration": str(scene.texts)}
    return ("--ram", "200MB")


@refusal(4, "free", quick=True)
def the_disk_is_full(scene: Scene) -> None:
    real = shutil.disk_usage
    scene.patch.setattr(shutil, "disk_usage", lambda path: real(path)._replace(free=1000))


@refusal(4, "running the model, for hidden states, needs")
def the_disk_has_no_room_for_hidden_states(scene: Scene) -> None:
    scene.aim("builtin", samples=8, block_size=128)
    scene.recipe["dtype"] = "bfloat16"
    real = shutil.disk_usage
    scene.patch.setattr(shutil, "disk_usage", lambda path: real(path)._replace(free=SMALL_FILES_BYTES + 300_000))


# --- the comparison ---------------------------------------------------------------------------------------------------


def problems_in(done: Ran) -> list[str]:
    """The problems on the screen, without the hint."""
    lines = done.err.partition("error: ")[2].partition("\n\nhint: ")[0].splitlines()
    return sorted(line.strip() for line in lines)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.long) for name in CASES]
)
def test_plan_refuses_what_merge_refuses(name: str, scene: Scene, each_tensor: None) -> None:
    code, said, spoil = CASES[name]
    more = spoil(scene) or ()
    job = scene.job()
    before = sorted(scene.place.folder.rglob("*"))
    foreseen = scene.place.run("plan", job, scene.place.out, "--no-measure", *more)
    assert sorted(scene.place.folder.rglob("*")) == before, "`plan` writes nothing"
    done = scene.place.run("merge", job, scene.place.out, *more)
    assert (foreseen.code, done.code) == (code, code), (foreseen.err, done.err)
    assert said in done.err
    assert problems_in(foreseen) == problems_in(done) != []
    assert "Traceback" not in done.err


def test_every_check_has_a_case() -> None:
    """Each check raises in at least one of the cases above; this list says in which."""
    from lowmem_aim.jobs.checks import AT_ONCE, LATER

    cases = {
        "check_place": "out_cannot_be_written",
        "check_at_work": "a_run_is_at_work",
        "check_small_files": "a_processors_config_is_no_json",
        "check_layers": "layers_make_no_model",
        "check_stages": "out_has_the_stages_of_another_recipe",
        "check_begun": "out_has_another_jobs_interrupted_run",
        "check_disk_space": "the_disk_is_full",
        "check_device": "a_device_is_not_there",
        "check_calibration": "activations_are_of_another_model",
        "check_experts": "an_experts_texts_are_too_short",
        "check_comparison": "acm_is_given_activations",
        "check_merge_memory": "rows_do_not_fit",
        "check_begun_with": "an_interrupted_runs_texts_are_others",
        "check_model_runs": "a_forward_does_not_fit",
    }
    assert [check.__name__ for check in (*AT_ONCE, *LATER) if check.__name__ != "tell_oddities"] == list(cases)
    assert set(cases.values()) <= CASES.keys()
