"""Wrong words on the command line, and bugs: what happened, what was meant, what to do; where tracebacks are."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import click
import pytest
from conftest import Place, Ran, Run

from lowmem_aim.cli.commands import cli
from lowmem_aim.cli.mergekit_flags import UNNEEDED
from lowmem_aim.cli.usage import command_line, program

COMMANDS = sorted(cli.commands)
ARGUMENTS = {  # that are enough for a command to be understood
    "merge": ["out"],
    "relax": ["merged", "out", "--base", "base"],
    "calibrate": ["base", "-o", "a.safetensors"],
    "status": ["out"],
    "verify": ["out"],
    "methods": ["tie"],
    "convert": ["old", "new"],
    "completion": ["bash"],
}
NEEDED = {
    "merge": "the argument `OUT`",
    "relax": "the argument `MERGED`",
    "calibrate": "the argument `BASE`",
    "status": "the argument `OUT`",
    "verify": "the argument `OUT`",
    "convert": "the argument `FOLDER`",
    "completion": "the argument `SHELL`",
}


def refused(done: Ran, *messages: str) -> None:
    """One error, a blank line, one hint."""
    assert done.code == 2
    assert done.out == ""
    told, blank, hint = done.err.rstrip("\n").rpartition("\n\n")
    assert blank
    assert told.startswith("error: ")
    assert hint.startswith("hint: ")
    assert "\n" not in hint
    assert "Traceback" not in done.err
    for message in messages:
        assert message in done.err


class TestWords:
    def test_nothing_at_all_shows_what_there_is(self, run: Run) -> None:
        done = run()
        assert done.code == 2
        assert done.out == ""
        assert done.err == run("--help").out
        assert all(f"\n  {name} " in done.err for name in COMMANDS)

    @pytest.mark.parametrize(("word", "meant"), [("merg", "merge"), ("Verfy", "verify"), ("stats", "status")])
    def test_a_command_that_does_not_exist(self, run: Run, word: str, meant: str) -> None:
        refused(run(word), f"error: there is no command `{word}`; did you mean `{meant}`?", "see `lowmem-aim --help`")

    def test_nothing_is_guessed_from_afar(self, run: Run) -> None:
        refused(run("xyzzy"), "error: there is no command `xyzzy`\n")
        refused(run("merge", "out", "--xyzzy"), "error: `lowmem-aim merge` has no flag `--xyzzy`\n")

    @pytest.mark.parametrize("name", COMMANDS)
    def test_a_flag_that_does_not_exist(self, run: Run, name: str) -> None:
        refused(
            run(name, "--debgu"),
            f"error: `lowmem-aim {name}` has no flag `--debgu`; did you mean `--debug`?",
            f"hint: see `lowmem-aim {name} --help`",
        )

    @pytest.mark.parametrize("name", COMMANDS)
    def test_what_is_missing(self, run: Run, name: str) -> None:
        if name in NEEDED:
            refused(run(name), f"error: {NEEDED[name]} is missing", f"; see `lowmem-aim {name} --help`")

    def test_a_flag_that_is_missing(self, run: Run) -> None:
        done = run("calibrate", "base")
        refused(done, "the flag `--output` / `-o` is missing", "hint: write `lowmem-aim calibrate BASE --output FILE`;")
        refused(run("relax", "a", "b"), "hint: write `lowmem-aim relax MERGED OUT --base MODEL`;")
        refused(run("merge"), "hint: write `lowmem-aim merge [RECIPE] OUT`;")

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (("merge", "out", "--expret", "a"), "has no flag `--expret`; did you mean `--expert`?"),
            (
                ("relax", "m", "out", "--base", "b", "--with", "amm"),
                "`--with`: `amm` is not one of aim, acm, both; d",
            ),
            (("merge", "out", "--read", "mmpa"), "`--read`: `mmpa` is not one of mmap, pread; did you mean `mmap`?"),
            (("completion", "fsh"), "`SHELL`: `fsh` is not one of bash, zsh, fish; did you mean `fish`?"),
            (("merge", "out", "--threads", "0"), "`--threads` / `--num-threads` / `-j`: must be 1 or more, not 0\n"),
            (("merge", "out", "--samples", "x"), "`--samples`: `x` is not a valid integer\n"),
            (("merge", "out", "--ram", "lots"), "`--ram`: `lots` is not a size"),
            (("merge", "out", "--weight"), "option `--weight` requires an argument\n\nhint: see `lowmem-aim merge"),
            (("merge", "out", "--fresh=1"), "option `--fresh` does not take a value\n\nhint: see `lowmem-aim merge"),
            (("methods", "ties", "more"), "`more` is more than `lowmem-aim methods` takes"),
            (("methods", "tie"), "unknown merge method `tie`; did you mean `ties`?"),
            (("merge", "out", "--method", "TIES"), "unknown merge_method `TIES`; did you mean `ties`?"),
        ],
    )
    def test_what_was_meant(self, run: Run, words: tuple[str, ...], message: str) -> None:
        refused(run(*words), message)

    @pytest.mark.parametrize(
        ("flags", "meant"),
        [
            (("--scaling", "sqr"), "sqrt"),
            (("--dtype", "bf16"), "bfloat16"),
            (("--calibration-dtype", "Float16"), "float16"),
            (("-p", "rescale=densty"), "density"),
            (("-p", "lamda=1"), "lambda"),
        ],
    )
    def test_words_of_the_recipe(self, place: Place, flags: tuple[str, str], meant: str) -> None:
        refused(place.merge("--omega", "0.4", *flags, method="dare_ties"), f"did you mean `{meant}`?")

    @pytest.mark.parametrize(
        ("line", "meant"),
        [
            ("aim: {omga: 0.4}", "omega"),
            ("aim: {tied: relx}", "relax"),
            ("acm: {normalise: sample}", "samples"),
            ("parameters: {weight: [{filtre: mlp, value: 1}]}", "filter"),
        ],
    )
    def test_words_of_a_recipe_file(self, place: Place, line: str, meant: str) -> None:
        recipe = f"merge_method: linear\nbase_model: {place.folder}/base\nmodels: [{{model: a}}]\n{line}\n"
        (place.folder / "r.yml").write_text(recipe)
        refused(place.run("merge", place.folder / "r.yml", place.out), "r.yml:4:", f"did you mean `{meant}`?")


@pytest.mark.skipif(os.name == "nt", reason="a current folder cannot be removed")
def test_a_current_folder_that_has_been_removed(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    done = run("merge", "out", "--method", "linear", "--expert", tmp_path)
    assert done.code == 2
    assert "the current folder cannot be used: there is no such file or folder" in done.err


GROUPS = {
    "merge": ["Recipe", "AIM", "Calibration", "Output", "Machine", "Run", "mergekit's flags", "Other flags"],
    "plan": ["Recipe", "AIM", "Calibration", "Output", "Machine", "Run", "mergekit's flags", "Other flags"],
    "relax": ["Relaxation", "AIM", "Calibration", "Output", "Machine", "Run", "Other flags"],
    "calibrate": ["Output", "Calibration", "Machine", "Run", "Other flags"],
}
OTHER_NAMES = ("--random-seed", "--num-threads", "--verbose")  # mergekit's, of flags that are shown by another
OFF_UNLESS_GIVEN = ("--help", "--version", "--debug")


class TestSeveralWrongFlags:
    """All wrong values are told at once: those of flags alone, and those that the recipe's reader finds."""

    def test_of_a_recipe(self, place: Place) -> None:
        done = place.merge(
            *("--dtype", "bf16", "--shard-size", "1X", "--threads", "0", "--tied", "x", "--weight", "1,2,x"),
            *("-p", "foo=1", "-p", "lambda", "--theta", "2"),
        )
        assert done.code == 2
        assert "has no flag `--theta`" in done.err, "beside that, nothing else is known for sure"
        (place.out).mkdir()
        (place.out / "mine.txt").write_text("mine")
        done = place.merge(
            *("--dtype", "bf16", "--shard-size", "1X", "--threads", "0", "--tied", "x"),
            *("-p", "foo=1", "-p", "lambda", "--scaling", "rank"),
        )
        assert done.code == 2
        for said in (
            *("did you mean `bfloat16`", "`1X` is not a size", "must be 1 or more", "not one of relax, keep"),
            *("unknown parameter `foo`", "`lambda` is not NAME=VALUE", "--scaling has no meaning", "is not empty"),
        ):
            assert said in done.err, said

    def test_of_commands_without_a_recipe(self, run: Run) -> None:
        done = run("calibrate", "base", "-o", "a.safetensors", "--threads", "0", "--ram", "1X")
        assert done.code == 2
        assert done.err.count("hint: ") == 1
        assert "must be 1 or more" in done.err
        assert "`1X` is not a size" in done.err

    def test_a_number_of_values_that_fits_no_experts_has_no_consequences(self, place: Place) -> None:
        done = place.merge("--weight", "1", "--weight", "2", "--weight", "3", method="task_arithmetic")
        assert (done.code, done.err.count("error: ")) == (2, 1)
        assert "--weight: 3 values for 2 experts" in done.err


class TestHelp:
    @pytest.mark.parametrize("name", COMMANDS)
    def test_every_flag_has_a_sentence_and_its_default(self, name: str) -> None:
        context = click.Context(cli.commands[name], help_option_names=["-h", "--help"])  # click keeps them for later
        for flag in cli.commands[name].get_params(context):
            if not isinstance(flag, click.Option) or flag.opts[-1] in OFF_UNLESS_GIVEN:
                continue
            sentence, _, default = (flag.help or "").partition(" [default: ")
            assert re.fullmatch(r"[A-Z].*\.", sentence), flag.opts
            switch = flag.is_flag and not flag.secondary_opts
            assert bool(default) + bool(flag.show_default) + flag.required + switch == 1, flag.opts

    @pytest.mark.parametrize("name", GROUPS)
    def test_flags_are_in_groups(self, run: Run, name: str) -> None:
        told = run(name, "--help").out
        assert re.findall(r"^([\w' ]+):$", told, re.M) == GROUPS[name]
        flags = {flag for p in cli.commands[name].params for flag in p.opts if flag.startswith("--")}
        shown = re.findall(r"^  (?:-\w, )?(--[\w-]+)", told, re.M)
        assert {*shown, "--normalize", *OTHER_NAMES, *(flag for flag in UNNEEDED if flag in told)} >= flags
        assert len(shown) == len(set(shown))

    def test_the_first_line_of_every_command_is_shown_whole(self, run: Run) -> None:
        assert "..." not in run("--help").out.partition("Commands:")[2]


class TestDebug:
    @pytest.mark.parametrize("name", COMMANDS)
    def test_every_command_takes_it_before_and_after_its_name(self, run: Run, name: str) -> None:
        for words in (("--debug", name, "--xyzzy"), (name, "--debug", "--xyzzy")):
            done = run(*words)
            assert done.code == 2
            assert done.err.startswith(f"error: `lowmem-aim {name}` has no flag `--xyzzy`\n\nhint: ")
            assert "\n\nTraceback (most recent call last):\n" in done.err

    @pytest.mark.parametrize("name", ["merge", "relax", "calibrate", "status", "verify", "methods"])
    def test_it_is_understood_and_shows_where_an_error_comes_from(
        self, run: Run, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        done = run(name, *ARGUMENTS[name], "--debug")
        assert done.code in (2, 3, 9), done.err
        assert "has no flag" not in done.err
        assert "lowmem_aim.errors." in done.err
        plain = run(name, *ARGUMENTS[name])
        assert "Traceback" not in plain.err
        assert done.err.startswith(plain.err.rstrip("\n") + "\n\nTraceback")


def broken(*arguments: object, **more: object) -> None:
    raise RuntimeError("all wrong\x1b[2J")


LAST = "lowmem_aim/last-error.log"


class TestBugs:
    def test_before_anything_is_finished(self, place: Place, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("lowmem_aim.jobs.merge.merge_tensors", broken)
        done = place.merge()
        place.refused(done, 1, "error: RuntimeError: all wrong\\x1b[2J\n\nhint: this is a bug", f"`{own_cache / LAST}`")
        kept = (own_cache / LAST).read_text()
        assert "lowmem-aim 0." in kept
        assert f"\nlowmem-aim merge {place.out} --method ties" in kept
        assert "in broken" in kept

    def test_after_something_is_finished(self, place: Place, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("lowmem_aim.jobs.merge.finish", broken)
        done = place.merge()
        log = place.out / ".lowmem_aim/run.log"
        assert done.code == 1
        assert f"which is in `{log}`" in done.err
        assert "Traceback" not in done.err
        last = json.loads(log.read_text().splitlines()[-1])
        assert last["event"] == "run_ended"
        assert "in broken" in last["traceback"]
        assert not (own_cache / LAST).exists()

    def test_in_a_command_without_an_output_folder(
        self, run: Run, own_cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("lowmem_aim.cli.catalogue.summary", broken)
        done = run("methods")
        assert done.code == 1
        assert f"`{own_cache / LAST}`" in done.err
        assert "in broken" in (own_cache / LAST).read_text()

    def test_where_nothing_can_be_written_the_error_is_told_all_the_same(
        self, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "file").write_text("x")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        monkeypatch.setattr("lowmem_aim.cli.catalogue.summary", broken)
        done = run("methods")
        assert done.code == 1
        assert done.err.startswith("error: RuntimeError: all wrong")
        assert "hint: this is a bug: run again with `--debug`" in done.err

    @pytest.mark.parametrize("words", [("--debug", "methods"), ("methods", "--debug")])
    def test_with_debug_it_is_shown_with_nothing_that_a_terminal_obeys(
        self, run: Run, own_cache: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
    ) -> None:
        monkeypatch.setattr("lowmem_aim.cli.catalogue.summary", broken)
        done = run(*words)
        assert "hint: this is a bug: report it with the traceback below\n\nTraceback" in done.err
        assert "in broken" in done.err
        assert "\x1b" not in done.err
        assert not (own_cache / LAST).exists()


def test_each_of_several_models_has_the_hint_of_its_own_error(place: Place) -> None:
    (place.folder / "math/config.json").unlink()
    done = place.merge("--expert", "./none")
    first, second = done.err.split("\n\nerror: ")
    assert "config.json" in first
    assert "hint: name the folder that holds config.json" in first
    assert "there is no model folder `./none`" in second
    assert "hint: check the path" in second


def test_the_hub_is_not_asked_beside_a_wrong_model(place: Place) -> None:
    (place.folder / "math/config.json").unlink()
    done = place.merge("--expert", "someone/some-model")
    place.refused(done, 3, "config.json")
    assert "some-model" not in done.err


def test_the_command_that_resumes_a_run_does_not_start_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["lowmem-aim", "merge", "my recipe.yml", "out", "--fresh", "--quiet"])
    assert command_line() == "lowmem-aim merge 'my recipe.yml' out --quiet"


def test_next_commands_start_the_program_as_the_user_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "lowmem-aim"
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    for called, folders, expected in [
        ("lowmem-aim", "", "lowmem-aim"),
        (str(script), str(tmp_path), "lowmem-aim"),
        (str(script), "/nowhere", str(script)),
        (".venv/bin/lowmem-aim", "/nowhere", ".venv/bin/lowmem-aim"),
        ("/site/lowmem_aim/__main__.py", str(tmp_path), f"{sys.executable} -m lowmem_aim"),
    ]:
        monkeypatch.setattr(sys, "argv", [called])
        monkeypatch.setenv("PATH", folders)
        assert program() == expected
