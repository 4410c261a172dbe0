"""Every option of mergekit's is taken by `merge` and `plan`, in each form: it acts, is not needed, or is refused."""

from __future__ import annotations

import os
from pathlib import Path

import click
import mergekit_options
import pytest
import torch
from conftest import Place, Run
from hub.server import OLD, Hub

from lowmem_aim.cli import mergekit_flags
from lowmem_aim.cli.commands import cli

NOTICE = "warning: mergekit's flags that are not needed here: "
LINEAR = ("--no-measure", "--method", "linear", "--expert")
SHORT = 20  # lines of help, of more than a hundred


def parsed(command: str, *words: str) -> click.Context:
    return cli.commands[command].make_context(command, list(words))


@pytest.mark.parametrize("command", ["merge", "plan"])
@pytest.mark.parametrize("words", mergekit_options.words(), ids=" ".join)
def test_every_option_is_taken_and_swallows_no_argument(command: str, words: tuple[str, ...]) -> None:
    for line in ((*words, "r.yml", "out"), ("r.yml", *words, "out"), ("r.yml", "out", *words)):
        assert parsed(command, *line).params["paths"] == (Path("r.yml"), Path("out"))


def test_what_is_told_of_is_every_option_that_does_not_act() -> None:
    named = {*mergekit_flags.UNNEEDED, *mergekit_flags.ACTING, "--quiet", "--random-seed", "--device", "--num-threads"}
    options = {*mergekit_options.SWITCHES, *mergekit_options.ALONE, *mergekit_options.VALUES} - {"-j"}
    assert named == options | {"--no-cuda"}


UNNEEDED = [
    words
    for words in mergekit_options.words()
    if words[0].replace("--no-", "--") in mergekit_flags.UNNEEDED and words[0] not in mergekit_flags.REFUSED
]


def test_those_that_are_not_needed_change_nothing_and_are_told_of_in_one_line(place: Place) -> None:
    assert place.merge().code == 0
    plain = (place.out / "model.safetensors").read_bytes()
    out = place.folder / "again"
    words = [word for flag in UNNEEDED if not flag[0].startswith("--no-") for word in flag]
    models = ("--base", place.folder / "base", "--expert", place.folder / "math", "--expert", place.folder / "code")
    done = place.run("merge", *words, out, "--method", "ties", *models)
    assert done.code == 0, done.err
    assert (out / "model.safetensors").read_bytes() == plain
    told = [line for line in done.err.splitlines() if line.startswith(NOTICE)]
    assert len(told) == 1
    assert all(f"`{flag[0]}`" in told[0] for flag in UNNEEDED if not flag[0].startswith("--no-"))
    assert "`--trust-remote-code` (no code of a model is ever run)" in told[0]


def test_so_are_their_no_forms_by_plan(place: Place) -> None:
    words = [flag[0] for flag in UNNEEDED if flag[0].startswith("--no-")]
    assert "--no-unsafe-truncate-embeddings" in words
    done = place.run("plan", *words, place.out, *LINEAR, place.folder / "math")
    assert done.code == 0, done.err
    (told,) = [line for line in done.err.splitlines() if line.startswith(NOTICE)]
    assert all(f"`{word}`" in told for word in words)


def test_without_them_nothing_is_told(place: Place) -> None:
    assert "mergekit" not in place.merge("-j", "1", "--random-seed", "3", "--no-quiet", "--no-cuda").err


@pytest.mark.parametrize("command", ["merge", "plan"])
def test_what_cannot_be_done_is_refused_all_at_once_with_a_way_out(place: Place, command: str) -> None:
    flags = (*mergekit_flags.REFUSED, "--shard-size", "1GB", "--out-shard-size", "1B")
    done = place.run(command, place.out, "--method", "linear", "--expert", place.folder / "math", *flags)
    place.refused(done, 2, "`--no-safe-serialization`: the output is always safetensors", "leave it out: whatever")
    place.refused(done, 2, "`--unsafe-truncate-embeddings`: rows", "`--tokenizer-source base`, which matches rows by")
    place.refused(done, 2, "`--shard-size` and `--out-shard-size` are", "leave only one of them")


class TestDevice:
    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    @pytest.mark.parametrize("flag", ["--cuda", "--gpu-rich"])
    def test_without_a_gpu_it_is_the_error_of_our_own_flag(self, place: Place, flag: str) -> None:
        ours = place.merge("--device", "cuda")
        place.refused(ours, 2, "the device `cuda` cannot be used here", "`--device cpu` works everywhere")
        assert place.merge(flag) == ours

    def test_no_cuda_is_the_cpu_and_the_device_counts_more(self, place: Place, own_defaults: Path) -> None:
        own_defaults.parent.mkdir(parents=True)
        own_defaults.write_text('device = "cuda:99"\nvram = "1GB"\n')
        assert "cuda:99" in place.merge().err
        assert place.run("plan", place.out, "--no-cuda", *LINEAR, place.folder / "math").code == 0
        assert "; on cpu" in place.merge("--cuda", "--device", "cpu").err


class TestShards:
    """The tiny Llama has 40,160 parameters; its largest tensor has 8,448."""

    def test_its_size_counts_parameters_of_any_dtype(self, place: Place) -> None:
        assert place.merge("--out-shard-size", "10k").code == 0
        files = sorted(file.name for file in place.out.glob("*.safetensors"))
        assert len(files) > 3
        other = place.folder / "half"
        models = ("--base", place.folder / "base", "--expert", place.folder / "math", "--expert", place.folder / "code")
        flags = ("--method", "ties", "--dtype", "bfloat16", "--out-shard-size", "10000")
        assert place.run("merge", other, *models, *flags).code == 0
        assert sorted(file.name for file in other.glob("*.safetensors")) == files
        assert max(os.path.getsize(other / name) for name in files) < 2 * 10_000 + 4_000
        assert max(os.path.getsize(place.out / name) for name in files) > 2 * 10_000 + 4_000

    def test_a_size_of_0_is_one_file_as_in_mergekit(self, place: Place) -> None:
        assert place.merge("--out-shard-size", "0").code == 0
        assert (place.out / "model.safetensors").is_file()

    @pytest.mark.parametrize("size", ["5GB", "2.5B", "-1", "many", ""])
    def test_what_is_no_count_is_refused(self, place: Place, size: str) -> None:
        place.refused(place.merge(f"--out-shard-size={size}"), 2, "is not a number of parameters; write 2B or 500M")

    def test_one_too_small_to_be_meant_is_refused(self, place: Place) -> None:
        place.refused(place.merge("--out-shard-size", "5"), 2, "5 parameters is too small", "2B")


def test_the_cache_of_models_is_where_it_says(
    hub: Hub, llama: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", "elsewhere")  # put back afterwards
    monkeypatch.chdir(tmp_path)
    hub.commits[OLD] = llama / "math"
    done = run("merge", "out", "--method", "linear", "--expert", "tiny/model", "--transformers-cache", "kept")
    assert done.code == 0, done.err
    assert (tmp_path / "kept/models--tiny--model/snapshots" / OLD / "model.safetensors").exists()
    assert not (tmp_path / "cache").exists()
    assert os.environ["HF_HUB_CACHE"] == str(tmp_path / "kept")


@pytest.mark.parametrize("command", ["merge", "plan"])
def test_their_help_is_short_and_comes_after_ours(run: Run, command: str) -> None:
    ours, _, theirs = run(command, "--help").out.partition("\nmergekit's flags:\n")
    theirs = theirs.partition("\nOther flags:\n")[0]
    assert len(theirs.splitlines()) < SHORT < len(ours.splitlines()) / 4
    for words in mergekit_options.words():
        forms = {words[0], words[0].replace("--no-", "--")}
        assert any(form in (ours + theirs).replace(",", " ").replace(".", " ").split() for form in forms), words


def test_commands_that_do_not_take_them_name_ours(run: Run) -> None:
    for words in mergekit_options.words():
        done = run("relax", "merged", "out", "--base", "base", *words)
        if "which is mergekit's" in done.err:
            assert done.code == 2
            assert f"has no flag `{words[0]}`, which is mergekit's\n\nhint: " in done.err
    done = run("calibrate", "base", "-o", "a.safetensors", "--gpu-rich", "--lora_merge_cache", "x")
    assert "`--gpu-rich`, which is mergekit's\n\nhint: use `--device cuda`" in done.err
    assert "`--lora_merge_cache`, which is mergekit's\n\nhint: leave it out: adapters are" in done.err
