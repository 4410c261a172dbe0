"""The main job end to end: what comes out loads, is right, the same however computed, and whole or absent."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import signal
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
import references as ref
import tiny
import torch
import yaml
from conftest import Run
from long_cases import others_long
from merge_cases import BY_METHOD, FLAGS, digests, recipe, tensors_in
from safetensors.torch import load_file, save_file
from stopping import held
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowmem_aim.errors import DiskError
from lowmem_aim.jobs.merge import merge
from lowmem_aim.methods import kernels
from lowmem_aim.recipe.reader import read_recipe
from lowmem_aim.system.options import Options


class TestOutput:
    def test_it_loads_without_a_warning_and_generates(self, llama: Path, tmp_path: Path, caplog: Any) -> None:
        out = merge(recipe(llama, density=("0.5",), dtype="bfloat16"), tmp_path / "out")
        with caplog.at_level(logging.WARNING):
            model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
        assert not caplog.records
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert model.dtype == torch.bfloat16
        tokenizer = AutoTokenizer.from_pretrained(out)
        ids = model.generate(**tokenizer("ab", return_tensors="pt"), max_new_tokens=3, min_new_tokens=3)
        assert ids.shape[1] >= 5

    def test_shards_are_what_save_file_would_write(self, llama: Path, tmp_path: Path) -> None:
        out = merge(recipe(llama), tmp_path / "out")
        save_file(tensors_in(out), tmp_path / "theirs.safetensors", metadata={"format": "pt"})
        assert (out / "model.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()

    def test_mixed_dtypes_are_laid_out_as_save_file_does(self, llama: Path, tmp_path: Path) -> None:
        for name in ("base", "math"):
            changed = tmp_path / name
            tiny.perturbed(llama / name, changed, scale=0.0)
            tensors = load_file(changed / "model.safetensors")
            tensors = {n: t.half() if "mlp" in n else t.bfloat16() if "norm" in n else t for n, t in tensors.items()}
            tensors["model.rotary_emb.steps"] = torch.arange(3)
            save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
        out = merge(recipe(tmp_path, "linear", ("math",)), tmp_path / "out")
        save_file(tensors_in(out), tmp_path / "theirs.safetensors", metadata={"format": "pt"})
        assert (out / "model.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()
        assert torch.equal(tensors_in(out)["model.rotary_emb.steps"], torch.arange(3))

    def test_shards_respect_their_size_and_the_index_names_them(self, llama: Path, tmp_path: Path) -> None:
        one = merge(recipe(llama), tmp_path / "one")
        many = merge(recipe(llama), tmp_path / "many", Options(shard_bytes=40_000))
        shards = sorted(many.glob("model-*.safetensors"))
        assert len(shards) > 2
        assert all(sum(t.nbytes for t in load_file(shard).values()) <= 40_000 for shard in shards)
        index = json.loads((many / "model.safetensors.index.json").read_text())
        assert index["weight_map"] == {name: shard.name for shard in shards for name in load_file(shard)}
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors_in(one).values())
        assert all(torch.equal(tensors_in(one)[n], t) for n, t in tensors_in(many).items())
        assert not (one / "model.safetensors.index.json").exists()
        AutoModelForCausalLM.from_pretrained(many)

    def test_config_has_the_outputs_dtype(self, llama: Path, tmp_path: Path) -> None:
        out = merge(recipe(llama, dtype="float16"), tmp_path / "out")
        assert json.loads((out / "config.json").read_text())["dtype"] == "float16"
        assert {t.dtype for t in tensors_in(out).values()} == {torch.float16}

    def test_the_card_names_no_local_path_and_has_hub_front_matter(
        self, llama: Path, texts: Path, tmp_path: Path
    ) -> None:
        out = merge(recipe(llama, omega=0.3, calibration=str(texts)), tmp_path / "out")
        written = {name: (out / name).read_text() for name in ("README.md", "mergekit_config.yml", "lowmem_aim.json")}
        assert all(str(llama) not in text and str(tmp_path) not in text for text in written.values())
        _, front, body = written["README.md"].split("---\n", 2)
        assert yaml.safe_load(front) == {
            "base_model": ["base", "math", "code", "chat"],
            "library_name": "transformers",
            "tags": ["merge", "lowmem-aim", "ties", "aim"],
        }
        assert "omega 0.3" in body
        sha = hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()
        assert sha in body
        assert json.loads(written["lowmem_aim.json"])["outputs"] == [{"file": "model.safetensors", "sha256": sha}]
        config = yaml.safe_load(written["mergekit_config.yml"])
        assert config["aim"]["calibration"] == "texts.jsonl"
        assert [m["model"] for m in config["models"]] == ["math", "code", "chat"]

    def test_its_own_recipe_makes_the_same_model_again(
        self, llama: Path, texts: Path, tmp_path: Path, monkeypatch: Any
    ) -> None:
        flags = {"density": ("0.5",), "omega": 0.3, "calibration": str(texts), "parameter": ("lambda=0.7",)}
        first = merge(recipe(llama, "dare_ties", **flags), tmp_path / "first")
        from lowmem_aim.recipe.yaml_tree import load_tree

        again = read_recipe(load_tree(first / "mergekit_config.yml"))
        for name in ("base", "math", "code", "chat"):
            (tmp_path / name).symlink_to(llama / name)
        monkeypatch.chdir(tmp_path)
        assert digests(merge(again, tmp_path / "second")) == digests(first)

    def test_its_own_recipe_says_what_to_fill_in_and_then_runs_from_its_folder(
        self, llama: Path, texts: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        job = recipe(llama, "dare_linear", omega=0.3, density=("0.5",), calibration=str(texts))
        out = merge(job, tmp_path / "first", Options(seed=5))
        monkeypatch.chdir(out)
        text = (out / "mergekit_config.yml").read_text()
        filled = ["base", "math", "code", "chat", "texts.jsonl"]
        assert re.findall(r"^#   (.+)$", text, re.M) == filled
        early = run("merge", "mergekit_config.yml", "../early")
        assert early.code == 3
        assert all(f"`{name}`" in early.err for name in filled)
        assert re.findall("hint: .+", early.err) == [
            "hint: fill in the paths in `mergekit_config.yml`, as the comments at its top say"
        ]
        for name in filled:
            text = re.sub(rf": {name}$", f": {texts if name == texts.name else llama / name}", text, flags=re.M)
        (tmp_path / "mergekit_config.yml").write_text(text)
        command = re.search(r"lowmem-aim (merge .*)", text)
        assert command is not None
        words = command[1].replace("mergekit_config.yml", "../mergekit_config.yml").replace("NEW-FOLDER", "../again")
        done = run(*words.split())
        assert done.code == 0, done.err
        assert digests(tmp_path / "again") == digests(out)

    def test_files_respect_the_umask(self, llama: Path, tmp_path: Path) -> None:
        before = os.umask(0o027)
        try:
            out = merge(recipe(llama), tmp_path / "out")
        finally:
            os.umask(before)
        assert {stat.S_IMODE(f.stat().st_mode) for f in out.iterdir() if f.is_file()} == {0o640}

    def test_nothing_but_the_model_is_left_in_the_folder(self, llama: Path, tmp_path: Path) -> None:
        out = merge(recipe(llama), tmp_path / "out")
        assert {f.name for f in out.iterdir()} == {
            "README.md",
            "config.json",
            "generation_config.json",
            "lowmem_aim.json",
            "mergekit_config.yml",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
            ".lowmem_aim",
        }
        assert {f.name for f in (out / ".lowmem_aim").iterdir()} == {
            "journal.sqlite",
            "sha256.txt",
            "lock",
            "run.log",
            "run.json",
        }

    def test_inputs_are_untouched(self, llama: Path, texts: Path, tmp_path: Path) -> None:
        before = digests(llama)
        merge(recipe(llama, omega=0.4, calibration=str(texts)), tmp_path / "out")
        assert digests(llama) == before


class TestSameBytes:
    @pytest.mark.parametrize("method", BY_METHOD)
    def test_slices_threads_and_read_mode_change_no_byte(
        self, method: str, llama: Path, measured: Path, tmp_path: Path
    ) -> None:
        """With one set of activations: the matrix products behind them are promised for one thread count only."""
        chosen = recipe(llama, method, **FLAGS[method], omega=0.4, calibration=str(measured), dtype="bfloat16")
        before = torch.get_num_threads()
        try:
            made = [
                digests(
                    merge(
                        chosen,
                        tmp_path / f"{rows}-{threads}-{read}",
                        Options(slice_rows=rows, threads=threads, read=read),
                    )
                )
                for rows, threads, read in [(1, 1, "mmap"), (7, 2, "pread"), (None, 2, "mmap")]
            ]
        finally:
            torch.set_num_threads(before)
        assert all(other == made[0] for other in made[1:])

    def test_the_seed_decides_the_random_masks(self, llama: Path, tmp_path: Path) -> None:
        made = [
            tensors_in(merge(recipe(llama, "dare_ties", density=("0.5",)), tmp_path / str(i), Options(seed=seed)))
            for i, seed in enumerate((0, 0, 1))
        ]
        name = "model.layers.0.mlp.up_proj.weight"
        assert torch.equal(made[0][name], made[1][name])
        assert not torch.equal(made[0][name], made[2][name])


class TestFidelity:
    def test_a_merge_with_aim_equals_a_plain_full_model_implementation(
        self, llama: Path, texts: Path, tmp_path: Path
    ) -> None:
        omega = 0.3
        flags = {"weight": ("0.6",), "omega": omega, "calibration": str(texts), "samples": 3, "pack": False}
        ours = tensors_in(merge(recipe(llama, "task_arithmetic", **flags), tmp_path / "out"))
        base, *experts = (tensors_in(llama / name) for name in ("base", "math", "code", "chat"))
        means = _means_by_hooks(llama / "base", texts)
        assert set(means) == {name for name in base if "embed_tokens" not in name}
        for name, weight in base.items():
            sparse = ref.deltas(weight, [expert[name] for expert in experts])
            truth = ref.task_arithmetic_tail(weight, sparse, [0.6] * 3, elect=False, normalize=False, scale=1.0)
            if name in means:
                truth = ref.aim(weight, truth, means[name], omega)
            assert float((ours[name].double() - truth).abs().max()) <= 1e-5 * float(truth.abs().max()), name

    def test_omega_one_changes_no_byte_of_the_weights(self, llama: Path, texts: Path, tmp_path: Path) -> None:
        plain = merge(recipe(llama, density=("0.5",)), tmp_path / "plain")
        aim = merge(recipe(llama, density=("0.5",), omega=1.0, calibration=str(texts)), tmp_path / "aim")
        assert (plain / "model.safetensors").read_bytes() == (aim / "model.safetensors").read_bytes()

    def test_omega_zero_freezes_the_most_active_channel(self, llama: Path, texts: Path, tmp_path: Path) -> None:
        out = merge(recipe(llama, omega=0.0, calibration=str(texts), pack=False), tmp_path / "out")
        means = _means_by_hooks(llama / "base", texts)
        name = "model.layers.1.mlp.down_proj.weight"
        top = int(means[name].argmax())
        merged, base = tensors_in(out)[name], tensors_in(llama / "base")[name]
        assert torch.equal(merged[:, top], base[:, top])
        assert not torch.equal(merged[:, top - 1], base[:, top - 1])

    def test_relax_does_to_a_finished_merge_what_a_merge_with_aim_does(
        self, llama: Path, texts: Path, tmp_path: Path, run: Run
    ) -> None:
        plain = merge(recipe(llama, density=("0.5",)), tmp_path / "plain")
        aim = merge(recipe(llama, density=("0.5",), omega=0.2, calibration=str(texts)), tmp_path / "aim")
        done = run(
            "relax", plain, tmp_path / "relaxed", "--base", llama / "base", "--omega", 0.2, "--calibration", texts
        )
        assert (done.code, done.out.strip()) == (0, str(tmp_path / "relaxed"))
        assert (tmp_path / "relaxed/model.safetensors").read_bytes() == (aim / "model.safetensors").read_bytes()


def _means_by_hooks(folder: Path, texts: Path) -> dict[str, torch.Tensor]:
    """Mean |x| per input channel by a plain forward of the whole model; one text after the other."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    sums: dict[str, torch.Tensor] = {}
    lines = [json.loads(line)["text"] for line in texts.read_text().splitlines()]

    def watch(name: str, module: Any) -> None:
        def hook(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            x = inputs[0].detach().double().abs()
            sums[name] = sums.get(name, 0) + x.reshape(-1, x.shape[-1]).mean(0) / len(lines)

        module.register_forward_pre_hook(hook)

    for name, module in model.named_modules():
        if hasattr(module, "weight") and not isinstance(module, torch.nn.Embedding):
            watch(f"{name}.weight", module)
    with torch.no_grad():
        for line in lines:
            model(**tokenizer(line, return_tensors="pt"))
    return sums


class TestFailure:
    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
    def test_a_weight_that_is_not_finite_stops_the_merge_and_leaves_nothing(
        self, bad: float, llama: Path, tmp_path: Path, run: Run
    ) -> None:
        broken = tiny.perturbed(llama / "math", tmp_path / "broken", scale=0.0)
        tensors = load_file(broken / "model.safetensors")
        tensors["model.layers.1.mlp.up_proj.weight"][3, 2:5] = bad
        save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
        for method in ("ties", "task_arithmetic", "dare_ties"):
            done = run(
                *("merge", tmp_path / "out", "--method", method, "--base", llama / "base", "--density", 0.5),
                *("--expert", llama / "code", "--expert", broken),
            )
            assert done.code == 3
            assert (
                "`model.layers.1.mlp.up_proj.weight` of `broken` holds 3 values that cannot be merged (NaN, Inf"
                in done.err
            )
            assert not (tmp_path / "out").exists()

    def test_a_float64_weight_beyond_float32_is_named(self, llama: Path, tmp_path: Path, run: Run) -> None:
        broken = tiny.perturbed(llama / "math", tmp_path / "broken", scale=0.0)
        tensors = {name: value.double() for name, value in load_file(broken / "model.safetensors").items()}
        tensors["model.norm.weight"][3] = 1e300
        save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
        done = run("merge", tmp_path / "out", "--method", "linear", "--expert", broken)
        assert done.code == 3
        assert "`model.norm.weight` of `broken` holds 1 value" in done.err

    def test_a_result_beyond_float16_is_an_error(self, llama: Path, tmp_path: Path, run: Run) -> None:
        done = run(
            *("merge", tmp_path / "out", "--method", "linear", "--expert", llama / "math", "--weight", "1e6"),
            *("-p", "normalize=false", "--dtype", "float16"),
        )
        assert done.code == 3
        assert "leaves the range of float16" in done.err
        assert not (tmp_path / "out").exists()

    def test_an_exception_half_way_leaves_nothing(self, llama: Path, tmp_path: Path, monkeypatch: Any) -> None:
        from lowmem_aim.output import writer as write

        def full(self: Any, data: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(write.ShardWriter, "append", full)
        with pytest.raises(OSError, match="No space"):
            merge(recipe(llama), tmp_path / "a" / "b" / "out")
        assert not (tmp_path / "a").exists()

    def test_activations_of_another_base_are_refused(self, llama: Path, texts: Path, tmp_path: Path, run: Run) -> None:
        activations = tmp_path / "a.safetensors"
        assert run("calibrate", llama / "math", "-o", activations, "--calibration", texts).code == 0
        done = run(
            *("merge", tmp_path / "out", "--method", "ties", "--base", llama / "base", "--expert", llama / "code"),
            *("--omega", 0.4, "--calibration", activations),
        )
        assert done.code == 3
        assert "measured on another base" in done.err
        assert not (tmp_path / "out").exists()


class TestTokenizers:
    def test_an_expert_with_an_added_token_and_permuted_rows_merges(
        self, llama: Path, tmp_path: Path, run: Run
    ) -> None:
        expert = _with_shuffled_vocabulary(llama / "math", tmp_path / "shuffled")
        command = (
            "merge",
            tmp_path / "out",
            "--method",
            "task_arithmetic",
            "--base",
            llama / "base",
            "--expert",
            expert,
        )
        refused = run(*command)
        assert refused.code == 3
        assert "the vocabulary differs" in refused.err
        assert "tokenizer_source: base" in refused.err
        assert run(*command, "--tokenizer-source", "base").code == 0
        ours, theirs, base = (tensors_in(f) for f in (tmp_path / "out", llama / "math", llama / "base"))
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            used = 259  # the tokenizer's tokens; the padding rows keep the base's values
            assert float((ours[name][:used] - theirs[name][:used]).abs().max()) < 1e-6
            assert torch.equal(ours[name][used:], base[name][used:])


def _with_shuffled_vocabulary(source: Path, folder: Path) -> Path:
    """The same model, its tokens in another order, with one more token at the front and fewer padding rows."""
    tiny.perturbed(source, folder, scale=0.0)
    data = json.loads((folder / "tokenizer.json").read_text())
    order = {token: index + 1 for index, token in enumerate(reversed(list(data["model"]["vocab"])))}
    ids = {data["model"]["vocab"][token]: place for token, place in order.items()}
    added = {token["id"] for token in data["added_tokens"]}
    ids |= {number: number + 1 for number in added}
    data["model"]["vocab"] = (
        {"<new>": 0}
        | order
        | {t["content"]: t["id"] + 1 for t in data["added_tokens"] if t["content"] in data["model"]["vocab"]}
    )
    for token in data["added_tokens"]:
        token["id"] = ids[token["id"]]
    (folder / "tokenizer.json").write_text(json.dumps(data))
    tensors = load_file(folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        old = tensors[name]
        new = torch.zeros(max(ids.values()) + 1, old.shape[1])
        for before, after in ids.items():
            new[after] = old[before]
        tensors[name] = new
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": max(ids.values()) + 1}))
    return folder


class TestReference:
    """Whose names, shapes and small files the output has."""

    def test_the_base_under_another_spelling_is_still_the_base(self, llama: Path, tmp_path: Path, run: Run) -> None:
        (tmp_path / "alias").symlink_to(llama / "base")
        text = (
            f"{{merge_method: task_arithmetic, base_model: {llama / 'base'}, models: [{{model: {tmp_path / 'alias'}}}, "
            f"{{model: {llama / 'math'}}}], parameters: {{weight: 1, normalize: true}}}}"
        )
        (tmp_path / "r.yml").write_text(text)
        assert run("merge", tmp_path / "r.yml", tmp_path / "out").code == 0
        ours, theirs = tensors_in(tmp_path / "out"), tensors_in(llama / "math")
        assert all(float((ours[n] - theirs[n]).abs().max()) < 1e-6 for n in theirs)

    def test_relax_keeps_the_models_own_tokenizer_and_chat_template(
        self, llama: Path, texts: Path, tmp_path: Path, run: Run
    ) -> None:
        chat = tiny.perturbed(llama / "chat", tmp_path / "chat", scale=0.0)
        (chat / "chat_template.jinja").write_text("{{ messages }}")
        (chat / "generation_config.json").write_text('{"temperature": 0.5}')
        done = run("relax", chat, tmp_path / "out", "--base", llama / "base", "--calibration", texts)
        assert done.code == 0, done.err
        assert (tmp_path / "out/chat_template.jinja").read_text() == "{{ messages }}"
        assert (tmp_path / "out/generation_config.json").read_text() == '{"temperature": 0.5}'

    def test_rows_of_new_vocabulary_are_not_relaxed(self, llama: Path, texts: Path, tmp_path: Path, run: Run) -> None:
        chat = tiny.perturbed(llama / "chat", tmp_path / "chat", scale=0.0)
        tensors = load_file(chat / "model.safetensors")
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = torch.cat([tensors[name], torch.full((3, tensors[name].shape[1]), 0.5)])
        save_file(tensors, chat / "model.safetensors", metadata={"format": "pt"})
        tiny.edit_config(chat, vocab_size=267)
        done = run("relax", chat, tmp_path / "out", "--base", llama / "base", "--omega", 0, "--calibration", texts)
        assert done.code == 0, done.err
        assert "not relaxed: 3 rows of the vocabulary" in done.err
        ours = tensors_in(tmp_path / "out")["lm_head.weight"]
        assert torch.equal(ours[-3:], tensors["lm_head.weight"][-3:])
        assert not torch.equal(ours[:-3], tensors["lm_head.weight"][:-3])
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")

    def test_models_of_one_folder_name_are_told_apart(self, llama: Path, tmp_path: Path, run: Run) -> None:
        for name in ("math", "code"):
            tiny.perturbed(llama / name, tmp_path / name / "checkpoint-5", scale=0.0)
        experts = ("--expert", tmp_path / "math/checkpoint-5", "--expert", tmp_path / "code/checkpoint-5")
        assert run("merge", tmp_path / "out", "--method", "linear", *experts).code == 0
        config = yaml.safe_load((tmp_path / "out/mergekit_config.yml").read_text())
        assert [m["model"] for m in config["models"]] == ["math/checkpoint-5", "code/checkpoint-5"]

    def test_a_folders_name_cannot_break_out_of_the_card(self, llama: Path, tmp_path: Path, run: Run) -> None:
        evil = tiny.perturbed(llama / "math", tmp_path / "ev\n```\n# Hello <b>", scale=0.0)
        assert run("merge", tmp_path / "out", "--method", "linear", "--expert", evil).code == 0
        assert not [
            line
            for line in (tmp_path / "out/README.md").read_text().splitlines()
            if line.lstrip().startswith("# Hello")
        ]


class TestTied:
    @pytest.mark.parametrize("head_only", [False, True])
    def test_a_tied_embedding_is_relaxed_as_the_head_or_kept(
        self, head_only: bool, texts: Path, tmp_path: Path, run: Run
    ) -> None:
        base = tiny.build("qwen2", tmp_path / "base")
        expert = tiny.perturbed(base, tmp_path / "expert", scale=0.05)
        name = "model.embed_tokens.weight"
        if head_only:  # some checkpoints keep the shared tensor under the head's name
            for folder in (base, expert):
                tiny.rename(folder, lambda n: "lm_head.weight" if n == "model.embed_tokens.weight" else n)
            name = "lm_head.weight"
        made = {}
        for tied in ("relax", "keep"):
            more = ("--omega", 0, "--tied", tied, "--calibration", texts)
            done = run("relax", expert, tmp_path / tied, "--base", base, *more)
            assert done.code == 0, done.err
            made[tied] = tensors_in(tmp_path / tied)[name]
        merged = tensors_in(expert)[name]
        assert torch.equal(made["keep"], merged)
        assert not torch.equal(made["relax"], merged)


def test_positions_are_no_vocabulary_even_where_they_are_as_many(tmp_path: Path, run: Run) -> None:
    base = tiny.build("gpt2", tmp_path / "base", n_positions=tiny.VOCAB)
    expert = tiny.perturbed(base, tmp_path / "expert", scale=0.05)
    data = json.loads((expert / "tokenizer.json").read_text())
    vocabulary = data["model"]["vocab"]
    first, second = list(vocabulary)[:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (expert / "tokenizer.json").write_text(json.dumps(data))
    command = ("--method", "task_arithmetic", "--base", base, "--expert", expert, "--tokenizer-source", "base")
    assert run("merge", tmp_path / "out", *command).code == 0
    ours, theirs = tensors_in(tmp_path / "out"), tensors_in(expert)
    assert float((ours["transformer.wpe.weight"] - theirs["transformer.wpe.weight"]).abs().max()) < 1e-6
    swapped = theirs["transformer.wte.weight"][[1, 0]]
    assert float((ours["transformer.wte.weight"][:2] - swapped).abs().max()) < 1e-6


class TestKilled:
    """The whole program, ended from outside."""

    def start(self, llama: Path, out: Path, hold: str) -> subprocess.Popen[str]:
        return held(hold, "merge", out, "--method", "linear", "--expert", llama / "math", "--shard-size", "40KB")

    @pytest.mark.parametrize(
        ("name", "code"),
        others_long([("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)], (("SIGINT", 130),)),
    )
    def test_a_signal_before_anything_is_finished_takes_everything_back(
        self, name: str, code: int, llama: Path, tmp_path: Path, known: None
    ) -> None:
        process = self.start(llama, tmp_path / "out", "lowmem_aim.output.shards.raw")
        process.send_signal(getattr(signal, name))
        _, err = process.communicate(timeout=60)
        assert process.returncode == code
        assert "interrupted before anything was kept: the same command starts from the beginning" in err
        assert "Traceback" not in err
        assert not (tmp_path / "out").exists()

    def test_a_list_that_no_run_wrote_makes_nothing_ours(self, llama: Path, tmp_path: Path, run: Run) -> None:
        (tmp_path / "out/.lowmem_aim").mkdir(parents=True)
        (tmp_path / "out/mine.txt").write_text("x")
        for content in ("7", '{"mine.txt": 1}', "junk", '["../math", 3]'):
            (tmp_path / "out/.lowmem_aim/publishing.json").write_text(content)
            assert run("merge", tmp_path / "out", "--method", "linear", "--expert", llama / "math").code == 2
            assert (tmp_path / "out/mine.txt").exists()

    @pytest.mark.parametrize(
        "hold",
        others_long(
            ["lowmem_aim.output.shards.raw", "lowmem_aim.output.workspace.sync_folder"],
            ("lowmem_aim.output.workspace.sync_folder",),
        ),
    )
    def test_after_a_kill_the_same_command_does_the_job(
        self, hold: str, llama: Path, tmp_path: Path, run: Run, known: None
    ) -> None:
        process = self.start(llama, tmp_path / "out", hold)
        process.kill()
        process.communicate(timeout=60)
        assert not (tmp_path / "out/config.json").exists()
        command = ("--method", "linear", "--expert", llama / "math", "--shard-size", "40KB")
        assert run("merge", tmp_path / "out", *command).code == 0
        assert run("merge", tmp_path / "fresh", *command).code == 0
        assert digests(tmp_path / "out") == digests(tmp_path / "fresh")

    def test_a_finish_that_fails_is_no_model_and_is_done_again(
        self, llama: Path, tmp_path: Path, monkeypatch: Any
    ) -> None:
        def fail(folder: Path) -> None:
            raise OSError(5, "Input/output error")

        monkeypatch.setattr("lowmem_aim.output.workspace.sync_folder", fail)
        with pytest.raises(DiskError, match="the disk, or the connection to it, failed"):
            merge(recipe(llama), tmp_path / "out")
        assert not (tmp_path / "out" / "config.json").exists()
        monkeypatch.undo()
        merge(recipe(llama), tmp_path / "out")
        assert digests(tmp_path / "out") == digests(merge(recipe(llama), tmp_path / "whole"))


def test_a_merge_without_numba_gives_the_same_bytes_and_says_so_once(
    llama: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = ("--method", "ties", "--base", llama / "base", "--expert", llama / "math", "--expert", llama / "code")
    assert run("merge", tmp_path / "compiled", *models).code == 0
    monkeypatch.setattr(kernels, "_found", lambda: (None, "numba is not installed"))
    done = run("merge", tmp_path / "torch", *models)
    assert done.err.count("compiled loops are not used (numba is not installed): torch does the same") == 1
    weights = [(tmp_path / out / "model.safetensors").read_bytes() for out in ("compiled", "torch")]
    assert weights[0] == weights[1]
