"""Hostile model folders: refused by name before work, or harmless; nothing outside them is opened, nothing runs."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import re
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from cards import assert_card, assert_plain
from conftest import Place
from long_cases import others_long
from rich.console import Console
from safetensors.torch import load_file

from lowmem_aim.errors import ModelError, printable
from lowmem_aim.events import Notice, PhaseStarted, Planned, RunStarted, TensorDone
from lowmem_aim.models.checkpoint import Checkpoint
from lowmem_aim.models.config import config_of
from lowmem_aim.view.progress import Progress
from lowmem_aim.view.screen import screen


class TestConfig:
    @pytest.mark.parametrize("value", ["abc", -1, 0, 1e300, 10**30, 10**7, True, [3], {"a": 1}, 3.0])
    @pytest.mark.parametrize("key", ["num_hidden_layers", "n_layer"])
    def test_a_number_of_layers_that_no_model_has(self, place: Place, key: str, value: Any) -> None:
        tiny.edit_config(place.folder / "base", **{key: value})
        place.refused(place.merge(), 3, "base`: `" + key, "not a whole number from 1 to 1000")

    def test_every_wrong_value_of_every_model_is_listed(self, place: Place) -> None:
        tiny.edit_config(place.folder / "base", hidden_size=10**15, model_type=["x"], head_dim=-3)
        tiny.edit_config(place.folder / "math", num_attention_heads="4", tie_word_embeddings="yes")
        tiny.edit_config(place.folder / "code", text_config={"num_hidden_layers": 10**30}, num_local_experts=10**9)
        messages = (
            *("base`: `hidden_size` is 1000000000000000, not a whole", 'base`: `model_type` is ["x"], no text'),
            *(
                "base`: `head_dim` is -3,",
                "math`: `num_attention_heads` is '4',",
                "`tie_word_embeddings` is 'yes', nei",
            ),
            *("code`: `num_hidden_layers` is 1000", "code`: `num_local_experts` is 1000"),
        )
        place.refused(place.merge(), 3, *messages)

    def test_what_public_models_have_is_taken(self, tmp_path: Path) -> None:
        config = {"num_key_value_heads": [2, 4], "num_experts": 0, "head_dim": None, "num_hidden_layers": 126}
        config |= {"time_step_limit": [0.0, float("inf")], "text_config": {"vocab_size": 262_208}}
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert config_of(tmp_path) == config

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"{", "not valid JSON"),
            (b"\xff\xfe{", "not valid JSON"),
            (b'{"num_hidden_layers":' + b"9" * 5000 + b"}", "not valid JSON"),
            (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "not valid JSON"),
            (b'{"a":' + b"[" * 200 + b"]" * 200 + b"}", "nested more than 50 deep"),
            (b'{"a":"' + b"x" * 11_000_000 + b'"}', "more than 10000000 bytes"),
            (b'{"a":[' + b"[]," * 1_000_000 + b"1]}", "more than 500000 values"),
        ],
    )
    def test_files_that_are_no_config(self, place: Place, content: bytes, message: str) -> None:
        (place.folder / "math/config.json").write_bytes(content)
        place.refused(place.merge(), 3, "math/config.json`", message)

    def test_code_in_the_folder_never_runs_and_is_not_handed_on(self, place: Place, texts: Path) -> None:
        for name in ("base", "math", "code"):
            tiny.edit_config(place.folder / name, auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"})
            tokenizer = json.loads((place.folder / name / "tokenizer_config.json").read_text())
            tokenizer["auto_map"] = {"AutoTokenizer": ["evil.T", None]}
            (place.folder / name / "tokenizer_config.json").write_text(json.dumps(tokenizer))
            (place.folder / name / "evil.py").write_text(f"open({str(place.folder / 'ran')!r}, 'w')")
        assert place.merge("--omega", "0.4", "--calibration", texts, "--block-size", "16").code == 0
        assert not (place.folder / "ran").exists()
        for file in place.out.glob("*.json"):
            assert "auto_map" not in file.read_text()
        assert not (place.out / "evil.py").exists()

    def test_keys_that_make_a_loader_run_code_stay_behind_and_the_rest_comes_along(self, place: Place) -> None:
        mine = {"custom_generate": "evil/loop", "temperature": 0.5}
        (place.folder / "base/generation_config.json").write_text(json.dumps(mine))
        for name in ("base", "math", "code"):
            kernel = {
                "attn_implementation": "evil/kernel",
                "task_specific_params": {"x": {"custom_pipelines": {"y": {}}}},
            }
            tiny.edit_config(place.folder / name, _attn_implementation="sdpa", **kernel)
        done = place.merge()
        assert done.code == 0
        assert json.loads((place.out / "generation_config.json").read_text()) == {"temperature": 0.5}
        config = json.loads((place.out / "config.json").read_text())
        assert (config["_attn_implementation"], config["task_specific_params"]) == ("sdpa", {"x": {}})
        assert "attn_implementation" not in config
        assert "generation_config.json has no `custom_generate`" in done.err
        assert "config.json has no `attn_implementation`, `custom_pipelines`" in done.err

    @pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "model.safetensors", "tokenizer.model"])
    def test_a_git_lfs_pointer_is_named_as_one(self, name: str, place: Place) -> None:
        pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
        (place.folder / "base" / name).write_text(pointer)
        place.refused(place.merge(), 3, f"base/{name}` is a Git LFS pointer, not the file itself", "`git lfs pull`")

    def test_a_model_that_needs_its_code_is_refused(self, place: Place, texts: Path) -> None:
        for name in ("base", "math", "code"):
            tiny.edit_config(place.folder / name, model_type="evil", auto_map={"AutoConfig": "evil.C"})
            (place.folder / name / "evil.py").write_text(f"open({str(place.folder / 'ran')!r}, 'w')")
        done = place.merge("--omega", "0.4", "--calibration", texts)
        place.refused(done, 3, "only with Python code from its own folder (`auto_map`), which is never executed here")
        assert not (place.folder / "ran").exists()


class TestQuantised:
    @pytest.mark.parametrize("method", ["aqlm", "hqq", "quanto", "torchao"])
    def test_by_config(self, place: Place, method: str) -> None:
        tiny.edit_config(place.folder / "math", quantization_config={"quant_method": method, "bits": 4})
        message = f"math` is quantised (`quantization_config`: {method} in its config.json)"
        place.refused(place.merge(), 3, message, "hint: merge the unquantised models")

    @pytest.mark.parametrize(
        "suffix",
        ["qweight", "qzeros", "weight.absmax", "weight.quant_state.bitsandbytes__nf4", "SCB", "weight_scale_inv"],
    )
    def test_by_tensors(self, place: Place, suffix: str) -> None:
        name = f"model.layers.0.mlp.up_proj.{suffix}"
        tiny.edit_tensors(
            place.folder / "code", lambda tensors: tensors.update({name: torch.ones(2, dtype=torch.uint8)})
        )
        place.refused(place.merge(), 3, f"code` is quantised (it holds `{name}`)")


def test_what_is_wrong_with_several_models_is_listed_at_once(place: Place, known: None) -> None:
    """One quantised, one broken, one of another size and shape: a single run tells all."""
    for name in ("awq", "cut", "small"):
        tiny.perturbed(place.folder / "base", place.folder / name, scale=0.0)
    tiny.edit_config(place.folder / "awq", quantization_config={"quant_method": "hqq"})
    (place.folder / "cut/model.safetensors").write_bytes(b"\x80\x04" * 10)
    tiny.edit_config(place.folder / "small", num_hidden_layers=2, num_key_value_heads=4)
    tiny.edit_tensors(
        place.folder / "small", lambda t: t.update({"model.embed_tokens.weight": t["model.embed_tokens.weight"][1:]})
    )
    tiny.edit_tensors(place.folder / "small", lambda t: t.update({"model.norm.weight": t["model.norm.weight"].int()}))
    tiny.edit_tensors(place.folder / "math", lambda t: t.pop("model.layers.0.mlp.up_proj.weight"))
    experts = [f for name in ("awq", "cut", "small") for f in ("--expert", place.folder / name)]
    place.refused(
        place.merge(*experts),
        3,
        *("awq` is quantised", "cut/model.safetensors` is not a valid safetensors file"),
        "`small` does not fit `base`: `num_hidden_layers` 2, not 3; `num_key_value_heads` 4, not 2",
        "`math` lacks the tensor `model.layers.0.mlp.up_proj.weight`",
        *("hint: merge the unquantised models", "only models of one architecture"),
    )


def test_a_model_of_another_size_does_not_hide_the_others(place: Place) -> None:
    tiny.edit_tensors(place.folder / "math", lambda t: [t.update({n: torch.ones(3)}) for n in t])
    tiny.edit_tensors(place.folder / "code", lambda t: t.pop("model.norm.weight"))
    done = place.merge()
    place.refused(done, 3, "`math`: ", "(the same goes for", "`code` lacks the tensor `model.norm.weight`")
    assert done.err.count("\n") < 40


class TestIndex:
    @pytest.fixture
    def folder(self, llama: Path, tmp_path: Path) -> Path:
        """A model in one shard that its index names."""
        made = tiny.perturbed(llama / "base", tmp_path / "model", scale=0.0)
        (made / "model.safetensors").rename(made / "x-1.safetensors")
        self.index(made, dict.fromkeys(load_file(made / "x-1.safetensors"), "x-1.safetensors"))
        Checkpoint.open(made).close()
        return made

    def index(self, folder: Path, weight_map: Any) -> None:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    def refused(self, folder: Path, match: str) -> None:
        with pytest.raises(ModelError, match=match):
            Checkpoint.open(folder)

    @pytest.mark.parametrize(
        "name",
        [
            *("../base/model.safetensors", "/base/model.safetensors", "config.json", "pytorch_model.bin", "x-1"),
            *("sub\\x.safetensors", "C:x.safetensors", "a\0.safetensors", "a" * 1_000_000 + ".safetensors"),
        ],
    )
    def test_shards_that_are_no_plain_safetensors_name(self, folder: Path, name: str) -> None:
        self.index(folder, {"w": name})
        self.refused(folder, "not a plain file name that ends in .safetensors")

    @pytest.mark.parametrize("weight_map", [[], "x", 3, None, {}])
    def test_no_table(self, folder: Path, weight_map: Any) -> None:
        self.index(folder, weight_map)
        self.refused(folder, "has no `weight_map`")

    @pytest.mark.parametrize("value", [1, None, True, ["x-1.safetensors"], {"a": "b"}])
    def test_values_that_are_no_texts(self, folder: Path, value: Any) -> None:
        self.index(folder, {"w": value})
        self.refused(folder, "not a plain file name")

    def test_many_shards_that_are_not_there(self, folder: Path) -> None:
        self.index(folder, {f"w{i}": f"{i}.safetensors" for i in range(20_000)})
        self.refused(folder, "which is missing")

    def test_more_values_than_any_model_has(self, folder: Path) -> None:
        self.index(folder, [[]] * 600_000)
        self.refused(folder, "more than 500000 values")


class TestPickle:
    def test_whatever_it_is_called_it_is_never_loaded(self, place: Place) -> None:
        bomb = pickle.dumps(_Bomb(str(place.folder / "ran")))
        (place.folder / "math/model.safetensors").write_bytes(bomb)
        place.refused(place.merge(), 3, "math/model.safetensors` is not a valid safetensors file")
        (place.folder / "math/model.safetensors").unlink()
        for name in ("pytorch_model.bin", "adapter_model.bin", "consolidated.00.pth", "model.ckpt"):
            (place.folder / "math" / name).write_bytes(bomb)
            place.refused(place.merge(), 3, f"only pickle (`{name}`)")
            (place.folder / "math" / name).unlink()
        assert not (place.folder / "ran").exists()

    def test_beside_safetensors_it_is_left_alone(self, place: Place) -> None:
        (place.folder / "base/pytorch_model.bin").write_bytes(pickle.dumps(_Bomb(str(place.folder / "ran"))))
        assert place.merge().code == 0
        assert not (place.folder / "ran").exists()
        assert not (place.out / "pytorch_model.bin").exists()


class _Bomb:
    def __init__(self, file: str) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return open, (self.file, "w")


class TestRecipe:
    GOOD = "merge_method: ties\nbase_model: {0}/base\nmodels: [{{model: {0}/math}}]\nparameters: {{weight: 1.0}}\n"

    def refused(self, place: Place, text: str, *messages: str) -> None:
        (place.folder / "recipe.yml").write_text(text)
        place.refused(place.run("merge", place.folder / "recipe.yml", place.out), 2, *messages)

    @pytest.mark.parametrize(
        ("more", "message"),
        [
            ("dtype: !!python/object/apply:os.system ['false']", "python/object/apply:os.system` is not allowed"),
            ("dtype: !!python/name:os.system ''", "is not allowed"),
            ("dtype: !mine x", "the YAML tag `!mine` is not allowed"),
            ("? !!python/object:x.Y {}\n: 1", "a key must be a plain word"),
            ("dtype: !!binary aGVsbG8=", "is not allowed"),
            ("dtype: !!int ''", "is not a valid value"),
            ("dtype: !!bool maybe", "`maybe` is not a valid value"),
            ("dtype: !!float abc", "`abc` is not a valid value"),
            ("'merge_method': linear", "the key `merge_method` appears twice"),
            ("x: [" + "1," * 400_000 + "1]", "too large or too deep"),
            ("x: {" + "".join(f"a{i}: 1," for i in range(80_000)) + "}", "too large or too deep"),
            ("x: " + "[" * 400_000 + "]" * 400_000, "too large or too deep"),
            ("x:\n" + "".join(f"{' ' * i}a:\n" for i in range(1, 900)), "too large or too deep"),
            ("x: &a [*a]", "too large or too deep"),
            ("aim: {omega: 1" + ":59" * 100_000 + "}", "is not a valid value: too long"),
            ("aim: {omega: 0x" + "f" * 100_000 + "}", "is not a valid value: too long"),
            ('"dtyp\\e": 1', "unknown key `dtyp\\x1b`; did you mean `dtype`?"),
            ("x: \0", "not valid YAML"),
            ("---\nx: 1", "another document without a `name`"),
            ('aim: {omega: 0.4, calibration: "a\\0.txt"}', "`aim.calibration` must be a file"),
            ("aim: {omega: 0.4, calibration: " + "a" * 9000 + ".safetensors}", "`aim.calibration` must be a file"),
        ],
    )
    def test_yaml(self, place: Place, more: str, message: str) -> None:
        self.refused(place, self.GOOD.format(place.folder) + more + "\n", "recipe.yml:", message)

    @pytest.mark.parametrize(
        ("model", "message"),
        [
            ('"a\\0b"', "holds a NUL character"),
            ('"\\ud800/x"', "is not Unicode"),
            ("/" + "a" * 300, "is too long for a path"),
            ("a/" * 5000, "is too long for a path"),
            ("~no-such-user/x", "is of a user who is not known here"),
        ],
    )
    def test_a_model_that_no_path_can_name(self, place: Place, model: str, message: str) -> None:
        self.refused(place, self.GOOD.format(place.folder).replace(f"{place.folder}/math", model), message)

    @pytest.mark.parametrize("model", ["../../there-is-none", "a/b@../../x", "a/..@main", "/dev/zero", "a/b@x/../y"])
    def test_a_reference_that_leads_elsewhere_is_no_hub_id(self, place: Place, model: str) -> None:
        place.refused(place.merge("--expert", model), 3, f"`{model}`")

    def test_a_recipe_without_end(self, place: Place) -> None:
        if not Path("/dev/zero").exists():
            pytest.skip("needs /dev/zero")
        place.refused(
            place.run("merge", "/dev/zero", place.out), 2, "this is not a recipe: it has more than 1000000 bytes"
        )


class TestTokenizer:
    def hostile(self, place: Place, file: str, content: bytes) -> None:
        for name in ("base", "math", "code"):
            (place.folder / name / file).write_bytes(content)

    @pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
    @pytest.mark.parametrize(
        "content",
        [
            *(b"{", b"[]", b"\xff\xfe", b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
            b'{"model":{"type":"BPE","merges":[],"vocab":{"a":1' + b"0" * 30 + b"}}" + b"}",
        ],
    )
    def test_files_that_are_none(self, place: Place, texts: Path, file: str, content: bytes) -> None:
        if file == "tokenizer_config.json" and content.startswith(b'{"model"'):
            pytest.skip("a table that the library does not look at")
        self.hostile(place, file, content)
        parses = content.startswith((b"[]", b'{"model"'))
        messages = {
            "tokenizer.json": (
                "the tokenizer of `base` has no vocabulary",
                "`base` has no tokenizer that transformers can load" if parses else "base/tokenizer.json` is not",
            ),
            "tokenizer_config.json": ("base/tokenizer_config.json` is not", "base/tokenizer_config.json` is not"),
        }[file]
        place.refused(place.merge("--tokenizer-source", "base"), 3, messages[0])
        place.refused(place.merge("--omega", "0.4", "--calibration", texts), 3, messages[1])

    def test_one_that_panics_at_the_text(self, place: Place, texts: Path) -> None:
        tokenizer = json.loads((place.folder / "base/tokenizer.json").read_text())
        pattern = {"Regex": "(a+)+$|(((((.*)*)*)*)*)*!"}
        tokenizer["pre_tokenizer"] = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
        self.hostile(place, "tokenizer.json", json.dumps(tokenizer).encode())
        texts.write_text(json.dumps({"text": "The quick brown fox jumps over the lazy dog, again and again."}))
        done = place.merge("--omega", "0.4", "--calibration", texts)
        place.refused(done, 3, "the tokenizer of `base` fails at the calibration text")

    def test_a_chat_template_is_copied_and_never_rendered(self, place: Place, texts: Path) -> None:
        bomb = b"{% for i in range(10**9) %}{% for j in range(10**9) %}{{ i }}{% endfor %}{% endfor %}{{"
        self.hostile(place, "chat_template.jinja", bomb)
        done = place.merge("--omega", "0.4", "--calibration", texts, "--tokenizer-source", "base")
        assert done.code == 0, done.err
        assert (place.out / "chat_template.jinja").read_bytes() == bomb


@pytest.fixture
def in_time() -> Iterator[None]:
    """The test does not wait for a pipe for ever."""

    def late(number: int, frame: object) -> None:
        raise AssertionError("it waits for a pipe")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


ODD = ("link", "pipe")
PRIVATE_FILES = (
    *("owner.json", "run.log", "run.json", "lock", "journal.sqlite", "journal.sqlite-journal"),
    *("journal.sqlite-wal", "publishing.json", "staging", "staging/model.safetensors"),
    *("activations.safetensors", "calibration-1.bin", "sha256.txt"),
)


def put(odd: str, file: Path, target: Path) -> None:
    """A link to `target`, or a pipe that nobody writes to, in place of a file."""
    file.unlink(missing_ok=True)
    file.symlink_to(target) if odd == "link" else os.mkfifo(file)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
@pytest.mark.usefixtures("in_time")
class TestPipesAndLinks:
    @pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "vocab.txt", "x.jinja"])
    def test_a_pipe_in_a_model_folder_is_refused(self, place: Place, name: str) -> None:
        put("pipe", place.folder / "base" / name, place.folder)
        place.refused(place.merge("--tokenizer-source", "base"), 3, f"base/{name}` cannot be read: it is not a regular")

    @pytest.mark.parametrize("name", ["texts.jsonl", "activations.safetensors"])
    def test_a_pipe_as_calibration_is_refused(self, place: Place, name: str) -> None:
        put("pipe", place.folder / name, place.folder)
        done = place.merge("--omega", "0.4", "--calibration", place.folder / name)
        place.refused(done, 3, f"{name}` cannot be read: it is not a regular file")

    def test_a_pipe_as_recipe_is_read(self, place: Place) -> None:
        """As `<(...)` in a shell makes it."""
        put("pipe", place.folder / "recipe", place.folder)
        text = TestRecipe.GOOD.format(place.folder)
        writer = threading.Thread(target=(place.folder / "recipe").write_text, args=(text,))
        writer.start()
        assert place.run("merge", place.folder / "recipe", place.out).code == 0
        writer.join()

    @pytest.mark.parametrize(
        ("name", "odd"),
        others_long(
            itertools.product(PRIVATE_FILES, ODD),
            [("owner.json", "link"), ("journal.sqlite-wal", "pipe"), ("staging", "link"), ("lock", "pipe")],
        ),
    )
    def test_in_the_private_folder_nothing_is_written_or_read_through_them(
        self, place: Place, name: str, odd: str
    ) -> None:
        victim = place.folder / "victim"
        victim.write_text("precious")
        file = place.out / ".lowmem_aim" / name
        file.parent.mkdir(parents=True)
        put(odd, file, victim)
        recipe = place.folder / "recipe.yml"
        recipe.write_text(TestRecipe.GOOD.format(place.folder))
        for words in (("plan", recipe, place.out, "--no-measure"), ("merge", recipe, place.out), ("status", place.out)):
            done = place.run(*words)
            assert done.code == 4, (words, done)
            assert f"`{file}` is a link, a pipe or a device" in done.err
        assert place.run("merge", recipe, place.out, "--fresh").code == 4
        assert victim.read_text() == "precious"
        assert os.path.lexists(file)

    @pytest.mark.parametrize("name", ["lock", "journal.sqlite-journal", "owner.json", "staging"])
    def test_a_folder_in_the_place_of_a_file_is_refused_before_work(self, place: Place, name: str) -> None:
        file = place.out / ".lowmem_aim" / name
        file.parent.mkdir(parents=True)
        file.write_text("") if name == "staging" else file.mkdir()
        recipe = place.folder / "recipe.yml"
        recipe.write_text(TestRecipe.GOOD.format(place.folder))
        for words in (("plan", recipe, place.out, "--no-measure"), ("merge", recipe, place.out, "--fresh")):
            done = place.run(*words)
            assert done.code == 4, (words, done)
            assert f"`{file}` is a link, a pipe or a device, or a folder where this tool has a file" in done.err

    def test_the_private_folder_itself_is_no_link(self, place: Place) -> None:
        (place.folder / "elsewhere").mkdir()
        place.out.mkdir()
        (place.out / ".lowmem_aim").symlink_to(place.folder / "elsewhere")
        done = place.merge()
        assert done.code == 4
        assert f"`{place.out / '.lowmem_aim'}` is a link" in done.err
        assert list((place.folder / "elsewhere").iterdir()) == []

    def test_links_that_appear_after_the_check_are_not_followed_either(
        self, place: Place, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        victim, private = place.folder / "victim", place.out / ".lowmem_aim"
        victim.write_text("precious")
        private.mkdir(parents=True)
        for name in ("owner.json", "run.log"):
            (private / name).symlink_to(victim)
        for module in ("folder", "workspace"):
            monkeypatch.setattr(f"lowmem_aim.output.{module}.check_private", lambda out: None)
        monkeypatch.setattr("lowmem_aim.jobs.checks.check_private", lambda out: None)
        assert place.merge().code == 0
        assert victim.read_text() == "precious"

    @pytest.mark.parametrize("odd", ODD)
    def test_replay_and_verify_end(self, place: Place, odd: str) -> None:
        assert place.merge().code == 0
        put(odd, place.out / ".lowmem_aim" / "run.log", Path("/dev/zero"))
        assert "holds no recorded run" in place.run("replay", place.out).err
        put("pipe", place.out / "model.safetensors", place.folder)
        assert place.run("verify", place.out).code == 8
        put("pipe", place.out / ".lowmem_aim" / "sha256.txt", place.folder)
        assert place.run("verify", place.out).code in (2, 8)


class TestFlags:
    def test_sizes_and_paths_beyond_reason(self, place: Place) -> None:
        for flag in ("--ram", "--vram", "--shard-size"):
            place.refused(place.merge(flag, "9" * 400), 2, f"`{flag}`", "is not a size")
        long = place.folder / ("n" * 300)
        for command in (("merge", long), ("merge", long, place.out), ("status", long), ("verify", long)):
            place.refused(place.run(*command), 2, "is too long for a path")
        done = place.run("calibrate", place.folder / "base", "-o", f"{long}.safetensors")
        place.refused(done, 2, "is too long for a path")


NAMES = [
    *("\x1b[2J\x1b]0;title\x07", "[bold red]x[/bold red]", "a\0b", "\u202eevil", "x\n---\nlicense: evil\n---\n"),
    *("../../etc/x", "|<script>alert(1)</script>`", "", "n" * 1_000_000),
]


class TestNames:
    @pytest.mark.parametrize("name", NAMES)
    def test_of_tensors(self, place: Place, name: str) -> None:
        """Merged and copied as any other; escaped in messages, on the card, and not taken for a path."""
        for model in ("base", "math", "code"):
            tiny.edit_tensors(
                place.folder / model, lambda t: t.update({name: torch.ones(2), name + "#": torch.ones(2).int()})
            )
        tiny.edit_tensors(
            place.folder / "math", lambda t: t.update({name: torch.tensor([float("nan"), 1.0]), name + "!": t[name]})
        )
        before = sorted(place.folder.rglob("*"))
        done = place.merge("--nonfinite", "base")
        assert done.code == 0, done.err
        assert [file for file in sorted(place.folder.rglob("*")) if place.out not in (file, *file.parents)] == before
        assert set(load_file(place.out / "model.safetensors")) >= {name, name + "#"}
        facts = json.loads((place.out / "lowmem_aim.json").read_text())
        assert name + "#" in facts["tensors"]["copied"]
        assert [item["tensor"] for item in facts["nonfinite"]] == [name]
        assert_plain(done.err)
        assert_plain((place.out / "lowmem_aim.json").read_text())
        assert_card((place.out / "README.md").read_text())

    @pytest.mark.parametrize(
        "name", ["a\x1b[2J", "x`|<b>", "y\n---\nlicense: evil", "[red]r", "\u202ex", "- !!x &a *b"]
    )
    def test_of_folders(self, place: Place, name: str) -> None:
        (place.folder / "math").rename(place.folder / name)
        command = ("--method", "ties", "--base", place.folder / "base", "--expert", place.folder / name)
        done = place.run("merge", place.out, *command)
        assert done.code == 0, done.err
        assert_plain(done.err)
        assert_card((place.out / "README.md").read_text())
        portable = yaml.safe_load((place.out / "mergekit_config.yml").read_text())
        assert portable["models"][0]["model"] == printable(name).replace("`", "'")

    def test_of_a_filter(self, place: Place) -> None:
        """A recipe of another's: what it says stands on the card, and can neither close its block nor turn the line."""
        pattern = "\u202e```\n---\nlicense: evil\n```\ud800"
        weight = [{"filter": pattern, "value": 0.5}, {"value": 1.0}]
        table = {"merge_method": "ties", "base_model": str(place.folder / "base"), "parameters": {"weight": weight}}
        table["models"] = [{"model": str(place.folder / "math")}]
        (place.folder / "recipe.yml").write_text(json.dumps(table))
        assert place.run("merge", place.folder / "recipe.yml", place.out).code == 0
        assert_card((place.out / "README.md").read_text())
        portable = yaml.safe_load((place.out / "mergekit_config.yml").read_text())
        assert portable["parameters"]["weight"] == weight

    def test_of_a_config(self, place: Place) -> None:
        """What a config says of itself is no part of the card, and comes out as it went in."""
        said = {"license": "mit\n---\n# owned", "x": "\u202e\ud800", "tags": ["<script>"]}
        for model in ("base", "math", "code"):
            tiny.edit_config(place.folder / model, **said)
        assert place.merge().code == 0
        card = (place.out / "README.md").read_text()
        assert_card(card)
        assert "owned" not in card
        assert said.items() <= json.loads((place.out / "config.json").read_text()).items()

    def test_on_a_terminal_they_stand_as_they_are(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("FORCE_COLOR", "1")
        run = Progress()
        run.see(0.0, RunStarted("merge", "out", "lowmem-aim merge <[/]> out", "1", 1, ""))
        names = [
            "[/]",
            "[bold red]x[/bold red]",
            "a\\",
            "\\[/",
            ":smile:",
            "{task}",
            "[link=file:///x]y",
            "\x1b[2J\u202e",
        ]
        run.see(1.0, Planned(f"<{names[0]}>", ("merge",), "cpu", 1, 100, layers={"0": 9, "1": 9}))
        run.see(1.0, PhaseStarted("merge", 100, "bytes"))
        console = Console(stderr=True, width=100)
        for done, name in enumerate(names):
            run.see(2.0, Notice(f"<{name}>", "warning"))
            run.see(2.0, TensorDone(f"<{name}>", (2, 2), "float32", "merge", 0, f"<{name}>", done, (2.0, 1.0)))
            console.print(screen(run, 99, 40))
        shown = re.sub(r"\x1b\[(\?25[lh]|2K|[0-9;]*[mAG])|\r", "", capsys.readouterr().err)
        for name in names:
            assert shown.count(f"<{printable(name)}>") >= 2
        assert_plain(shown)
