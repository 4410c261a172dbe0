"""What an error suggests: the word that was meant, or nothing; the hint of each problem, and no other's."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import Place, Run

from lowmem_aim.cli.commands import cli
from lowmem_aim.errors import ModelError, UsageError, joined, nearest
from lowmem_aim.methods.registry import names
from lowmem_aim.recipe.reader import TOP_KEYS

FLAGS = sorted({flag for command in cli.commands.values() for param in command.params for flag in param.opts})
OTHERS = [flag for flag in FLAGS if flag != "--cuda"]


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("--debgu", "--debug"),
        ("--shardsize", "--shard-size"),
        ("--shard_size", "--shard-size"),
        ("--CALIBRATION", "--calibration"),
        ("--calib", "--calibration"),
        ("--weigth", "--weight"),
        ("--wieght", "--weight"),
        ("--exlude", "--exclude"),
    ],
)
def test_a_slip_is_recognised(typed: str, meant: str) -> None:
    assert nearest(typed, [*FLAGS, "--debug"]) == meant


@pytest.mark.parametrize(
    ("typed", "known"),
    [
        ("--cuda", OTHERS),
        ("--lambda", FLAGS),
        ("--x", FLAGS),
        ("linux", names()),
        ("task", ["ties"]),
        ("services", TOP_KEYS),
        ("version", TOP_KEYS),
        ("", FLAGS),
    ],
)
def test_another_word_is_no_slip(typed: str, known: list[str]) -> None:
    assert nearest(typed, known) == ""


class TestHints:
    def test_problems_that_need_different_steps_have_a_hint_each(self, place: Place) -> None:
        done = place.merge("--expert", "/nowhere/a", "--density", "50", "--omega", "40")
        errors = done.err.strip().split("\n\nerror: ")
        assert len(errors) == 3
        assert errors[0].startswith(
            "error: --density: `density` must lie in [0, 1], not 50; did you mean 0.5?\n\nhint: `"
        )
        assert errors[1].startswith(
            "--omega: `aim.omega` must lie in [0, 1], not 40; did you mean 0.4?\n\nhint: 1 changes"
        )
        assert errors[2].startswith("there is no model folder `/nowhere/a`\n\nhint: check the path")

    def test_problems_that_need_the_same_step_have_one(self, place: Place) -> None:
        done = place.merge("--expert", "/nowhere/a", "--expert", "/nowhere/b")
        assert done.err.count("error: ") == done.err.count("hint: ") == 1
        assert "`/nowhere/a`\n       there is no model folder `/nowhere/b`\n\nhint: check the path" in done.err

    def test_errors_that_are_joined_keep_their_hints_and_say_nothing_twice(self) -> None:
        first, second = ModelError(["a", "b"], "mend a"), UsageError(["b", "c"], "mend c")
        error = joined([first, second])
        assert isinstance(error, ModelError)
        assert error.problems == ("a", "b", "c")
        assert error.hints == ("mend a", "mend a", "mend c")
        assert error.hint == "mend a\nmend c"

    @pytest.mark.parametrize(
        ("words", "problem", "hint"),
        [
            (("r.yml",), "the output folder is missing", "`lowmem-aim merge r.yml OUT`"),
            (("out", "r.yml"), "these are the wrong way round", "`lowmem-aim merge r.yml out`"),
            (("base", "out"), "`base` is a folder", "`lowmem-aim merge RECIPE out`"),
            (("a", "b", "out"), "3 paths are given", "each model has a flag, `--expert`"),
            (("nin.yml", "out"), "there is no such file or folder; did you mean `nine.yml`?", "check the path"),
            (("out",), "there is neither a recipe nor a `--method`", "give a recipe (`recipe.yml out/`)"),
            (("out", "--method", "ties"), "no models are listed", "add `--expert` for each model"),
            (("out", "--method", "ties"), "`ties` needs a `base_model`", "add `--base`"),
            (("out", "--expert", "base"), "`merge_method` is missing", "add `--method`"),
        ],
    )
    def test_what_is_wrong_with_the_words_of_a_merge(
        self, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], problem: str, hint: str
    ) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "base").mkdir()
        for name in ("r.yml", "nine.yml"):
            (tmp_path / name).write_text("merge_method: linear")
        done = run("merge", *words)
        assert done.code == 2
        told = next(part for part in done.err.split("error: ") if problem in part)
        assert hint in told.partition("\n\nhint: ")[2]
        assert run("plan", *words).err == done.err.replace("lowmem-aim merge", "lowmem-aim plan").replace(
            "merge takes", "plan takes"
        )
