"""Bad input: one clear error with every problem, the documented exit code, and nothing written."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from conftest import Place

UP = "model.layers.1.mlp.up_proj.weight"


class TestModels:
    def test_missing_folders_are_all_named(self, place: Place) -> None:
        done = place.merge("--expert", "/nowhere/a", "--expert", "./nowhere-b")
        place.refused(done, 3, "no model folder `/nowhere/a`", "no model folder `./nowhere-b`")

    def test_a_hub_id_without_network(self, place: Place) -> None:
        done = place.merge("--expert", "someone/some-model@main")
        assert done.code == 9
        assert "hint: give a local folder" in done.err
        assert "`someone/some-model@main` is neither a folder here nor downloaded" in done.err
        assert not place.out.exists()

    def test_pickle_only(self, place: Place) -> None:
        (place.folder / "math/model.safetensors").unlink()
        (place.folder / "math/pytorch_model.bin").write_bytes(b"\x80\x04.")
        place.refused(
            place.merge(), 3, "only pickle (`pytorch_model.bin`)", "hint: pickle can run code", "lowmem-aim convert"
        )

    def test_a_truncated_shard_and_a_bad_header_are_both_named(self, place: Place) -> None:
        os.truncate(place.folder / "math/model.safetensors", 5000)
        (place.folder / "code/model.safetensors").write_bytes(b"\xff" * 100)
        done = place.merge()
        place.refused(done, 3, "math/model.safetensors", "truncated", "code/model.safetensors", "its header claims")

    @pytest.mark.parametrize("shard", ["missing.safetensors", "../base/model.safetensors", "/etc/passwd"])
    def test_an_index_that_names_a_missing_or_an_outside_shard(self, place: Place, shard: str) -> None:
        (place.folder / "math/model.safetensors").unlink()
        index = place.folder / "math/model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": {"lm_head.weight": shard}}))
        place.refused(place.merge(), 3, f"'{shard}'", "model.safetensors.index.json")

    def test_a_link_out_of_the_folder(self, place: Place) -> None:
        (place.folder / "math/config.json").rename(place.folder / "elsewhere.json")
        (place.folder / "math/config.json").symlink_to(place.folder / "elsewhere.json")
        place.refused(place.merge(), 3, "link that leads out")

    def test_a_shape_that_differs(self, place: Place) -> None:
        tiny.edit_tensors(place.folder / "math", lambda t: t.update({UP: t[UP][:-1].clone()}))
        place.refused(place.merge(), 3, f"`math`: `{UP}` has the shape [47, 32], but [48, 32] in `base`")

    def test_a_tensor_that_is_missing_in_one_expert(self, place: Place) -> None:
        tiny.edit_tensors(place.folder / "math", lambda t: t.pop(UP))
        tiny.edit_tensors(place.folder / "code", lambda t: t.pop("lm_head.weight"))
        place.refused(place.merge(), 3, f"`math` lacks the tensor `{UP}`", "`code` lacks the tensor `lm_head.weight`")

    def test_a_dtype_of_another_kind(self, place: Place) -> None:
        tiny.edit_tensors(place.folder / "math", lambda t: t.update({UP: t[UP].to(torch.int8)}))
        place.refused(place.merge(), 3, f"`math`: `{UP}` is int8, but float32 in `base`")

    def test_other_float_dtypes_are_ordinary(self, place: Place) -> None:
        tiny.edit_tensors(place.folder / "math", lambda t: t.update({n: v.bfloat16() for n, v in t.items()}))
        assert place.merge().code == 0

    def test_a_vocabulary_that_differs(self, place: Place) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tiny.edit_tensors(place.folder / "math", lambda t, n=name: t.update({n: torch.cat([t[n], t[n][:1]])}))
        place.refused(
            place.merge(), 3, "the vocabulary differs", "hint: tokens differ: `tokenizer_source: base` or `union`"
        )

    def test_another_architecture_and_another_number_of_layers(self, place: Place) -> None:
        tiny.edit_config(place.folder / "math", model_type="mistral")
        tiny.edit_config(place.folder / "code", num_hidden_layers=2, num_attention_heads=8)
        done = place.merge()
        place.refused(
            done,
            3,
            "`math` does not fit `base`: `model_type` mistral, not llama",
            "`code` does not fit `base`: `num_hidden_layers` 2, not 3; `num_attention_heads` 8, not 4",
            "hint: only models of one architecture and size can be merged: use models that were tuned from `base`",
        )

    def test_a_model_of_another_size_is_one_line_with_both_sizes(self, place: Place) -> None:
        tiny.build("llama", place.folder / "math", hidden_size=48, intermediate_size=96)
        done = place.merge()
        place.refused(
            done, 3, "error: `math` does not fit `base`: `hidden_size` 48, not 32; ", "tensors differ in shape)"
        )
        assert done.err.count("\n") == 3

    def test_a_size_that_need_not_agree_is_told_where_tensors_have_other_shapes(self, place: Place) -> None:
        tiny.build("llama", place.folder / "math", intermediate_size=96)
        done = place.merge()
        place.refused(
            done, 3, "error: `math` does not fit `base`: `intermediate_size` 96, not 48 (and 9 tensors differ"
        )
        assert done.err.count("\n") == 3

    def test_a_base_of_another_size_than_all_the_others_is_suspected(self, place: Place) -> None:
        tiny.build("llama", place.folder / "base", hidden_size=48)
        place.refused(place.merge(), 3, "hint: all others differ from `base` in the same way: is it their base?")

    def test_tensors_that_differ_in_the_same_way_are_one_line(self, place: Place) -> None:
        tiny.edit_tensors(place.folder / "math", lambda t: [t.pop(n) for n in [*t] if "mlp" in n])
        done = place.merge()
        place.refused(done, 3, "`math` lacks the tensor `model.layers.0.mlp.", "(the same goes for 8 more tensors)")
        assert done.err.count("\n") == 3

    def test_a_model_type_that_transformers_does_not_know(self, place: Place) -> None:
        for name in ("base", "math", "code"):
            tiny.edit_config(place.folder / name, model_type="mine", auto_map={"AutoConfig": "x.Y"})
        place.refused(place.merge(), 3, "mine")

    def test_a_head_that_should_be_tied_but_differs(self, place: Place) -> None:
        for name in ("base", "math", "code"):
            tiny.edit_config(place.folder / name, tie_word_embeddings=True)
        place.refused(place.merge(), 3, "`base`: `lm_head.weight` should be tied to `model.embed_tokens.weight`")

    def test_names_are_escaped_on_the_screen(self, place: Place) -> None:
        for name, length in (("base", 2), ("math", 3), ("code", 2)):
            tensors = {"\x1b[2J[/bold]": torch.ones(length)}
            tiny.edit_tensors(place.folder / name, lambda t, new=tensors: t.update(new))
        done = place.merge()
        place.refused(done, 3, "`math`: `\\x1b[2J[/bold]` has the shape [3], but [2] in `base`")
        assert "\x1b" not in done.err


class TestRecipes:
    @pytest.mark.parametrize(
        "flags", [("--omega", "1.01"), ("--omega", "-0.1"), ("--density", "1.5"), ("--density", "-1")]
    )
    def test_numbers_out_of_range(self, place: Place, flags: tuple[str, str]) -> None:
        place.refused(place.merge(*flags), 2, flags[0], "[0, 1]")

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("merge_method: ties\nbaze_model: x\n", "recipe.yml:2:1: unknown key `baze_model`; did you mean `base"),
            ("merge_method: ties\nmerge_method: ties\n", "recipe.yml:2:1: the key `merge_method` appears twice"),
            ("a: &a [x,x]\nb: &b [*a,*a]\n" + "".join(
                f"c{i}: &c{i} [{','.join([f'*c{i - 1}' if i else '*b'] * 8)}]\n" for i in range(9)
            ), "too large or too deep"),
        ],
    )  # fmt: skip
    def test_yaml(self, place: Place, text: str, message: str) -> None:
        (place.folder / "recipe.yml").write_text(text)
        place.refused(place.run("merge", place.folder / "recipe.yml", place.out), 2, message)

    def test_a_recipe_that_is_not_there(self, place: Place) -> None:
        place.refused(place.run("merge", place.folder / "none.yml", place.out), 2, "none.yml: cannot be read")

    @pytest.mark.parametrize(
        "flags", [("--nonsense",), ("--shard-size", "many"), ("--read", "mapp"), ("--samples", "x")]
    )
    def test_flags_that_do_not_exist_or_parse(self, place: Place, flags: tuple[str, ...]) -> None:
        done = place.merge(*flags)
        assert done.code == 2
        assert flags[0] in done.err
        assert not place.out.exists()

    @pytest.mark.parametrize("device", ["cuda:99", "warp", "meta:x"])
    def test_a_device_that_is_not_there(self, place: Place, device: str) -> None:
        place.refused(place.merge("--device", device), 2, f"the device `{device}` cannot be used here")

    def test_a_forgotten_output_folder_and_swapped_arguments(self, place: Place) -> None:
        (place.folder / "r.yml").write_text("merge_method: linear")
        for wrong in (("r.yml",), ("base", "r.yml"), ("r.yml", "out", "more")):
            done = place.run("merge", *(place.folder / name for name in wrong))
            place.refused(done, 2, "merge takes a recipe and then an output folder")

    def test_a_shard_size_that_is_too_small(self, place: Place) -> None:
        place.refused(place.merge("--shard-size", "10"), 2, "too small")


class TestCalibrationInput:
    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("t.txt", "", "has only 0 tokens; at least 16 are needed"),
            ("t.txt", "\n \n\n", "has only 0 tokens"),
            ("t.txt", "too short", "has only 9 tokens; at least 16"),
            ("t.jsonl", '{"text": "a long enough line"}\n{"txt": "b"}\n', "t.jsonl:2: not a JSON object with a text"),
            ("t.jsonl", "[1]\n", "t.jsonl:1: not a JSON object"),
            ("t.jsonl", '{"text": 3}\n', "t.jsonl:1: not a JSON object"),
            ("t.safetensors", "junk", "is not an activations file"),
        ],
    )
    def test_files(self, place: Place, name: str, content: str, message: str) -> None:
        (place.folder / name).write_text(content)
        place.refused(place.merge("--omega", "0.4", "--calibration", place.folder / name), 3, message)

    def test_a_missing_file(self, place: Place) -> None:
        place.refused(
            place.merge("--omega", "0.4", "--calibration", place.folder / "no.txt"), 3, "no calibration file", "no.txt`"
        )

    def test_text_that_is_not_utf8(self, place: Place) -> None:
        (place.folder / "t.txt").write_bytes(b"\xff\xfe" * 40)
        place.refused(place.merge("--omega", "0.4", "--calibration", place.folder / "t.txt"), 3, "not UTF-8")

    def test_a_file_of_another_kind(self, place: Place) -> None:
        (place.folder / "t.pdf").write_text("x")
        place.refused(place.merge("--omega", "0.4", "--calibration", place.folder / "t.pdf"), 2, "ends in .jsonl, .txt")

    @pytest.mark.parametrize(
        ("name", "message"),
        [("base", "base` is a folder"), ("none", "no calibration file"), ("none.parquet", "no calibration file")],
    )
    def test_a_path_is_no_dataset_of_the_hub(self, place: Place, name: str, message: str) -> None:
        place.refused(place.merge("--omega", "0.4", "--calibration", place.folder / name), 3, message)

    def test_a_weights_file_instead_of_activations(self, place: Place) -> None:
        done = place.merge("--omega", "0.4", "--calibration", place.folder / "base/model.safetensors")
        place.refused(done, 3, "not of activations", "hint: make one with `lowmem-aim calibrate`")

    def test_the_default_set_without_network_says_what_to_pass(self, place: Place) -> None:
        done = place.merge("--omega", "0.4")
        assert done.code in (2, 9)  # 2 where the `datasets` package is not installed
        assert "`file.jsonl|file.txt|builtin`" in done.err
        assert not place.out.exists()


class TestOutput:
    def test_not_empty(self, place: Place) -> None:
        place.out.mkdir()
        (place.out / "mine.txt").write_text("x")
        done = place.merge()
        assert done.code == 2
        assert "is not empty" in done.err
        assert [f.name for f in place.out.iterdir()] == ["mine.txt"]

    def test_a_file(self, place: Place) -> None:
        place.out.write_text("x")
        done = place.merge()
        assert (done.code, place.out.read_text()) == (2, "x")

    @pytest.mark.parametrize("inside", ["math", "base/merged", "code/a/b"])
    def test_inside_an_input(self, place: Place, inside: str) -> None:
        before = sorted(place.folder.rglob("*"))
        command = ("--method", "ties", "--base", place.folder / "base", "--expert", place.folder / "math")
        done = place.run("merge", place.folder / inside, *command, "--expert", place.folder / "code")
        assert done.code == 2
        assert "inside an input" in done.err or "not empty" in done.err
        assert sorted(place.folder.rglob("*")) == before

    def test_read_only(self, place: Place) -> None:
        target = Path("/proc/lowmem-aim-out")  # nobody can make a folder there, root included
        if not target.parent.is_dir():
            pytest.skip("needs /proc")
        done = place.run("merge", target, "--method", "linear", "--expert", place.folder / "math")
        assert done.code == 4
        assert "cannot be written" in done.err

    def test_a_disk_that_is_too_small_is_seen_before_work(self, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
        disk = shutil.disk_usage("/")._replace(free=10**6)
        monkeypatch.setattr("shutil.disk_usage", lambda path: disk)
        place.refused(place.merge(), 4, "the output needs 50.2 MB", "has 1.0 MB free")

    def test_a_second_run_at_one_output_is_refused_and_the_first_goes_on(self, place: Place) -> None:
        from lowmem_aim.output.workspace import workspace

        with workspace(place.out) as space:
            space.take_back()
            (space.staging / "half").write_text("x")
            done = place.merge()
            assert done.code == 6
            assert f"another run (process {os.getpid()} on " in done.err
            assert (space.staging / "half").read_text() == "x"

    def test_what_a_killed_run_left_behind_is_cleared(self, place: Place) -> None:
        (place.out / ".lowmem_aim/staging").mkdir(parents=True)
        (place.out / ".lowmem_aim/staging/model.safetensors").write_bytes(b"half")
        assert place.merge().code == 0
        assert not (place.out / ".lowmem_aim/staging").exists()
        assert (place.out / "model.safetensors").stat().st_size > 1000
