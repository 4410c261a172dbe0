"""The origin of a model: relaxed or not, a merge has the same parent; a relaxed model's is what was relaxed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny

from lowmem_aim.evaluating.origin import digest_of_model, origin_of
from lowmem_aim.events import silent
from lowmem_aim.models.opening import open_model


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, two experts, and a text."""
    folder = tmp_path_factory.mktemp("origin")
    tiny.build("llama", folder / "base")
    for seed, name in enumerate(("math", "code"), 1):
        tiny.perturbed(folder / "base", folder / name, seed=seed)
    (folder / "texts.txt").write_text("A text to run. " * 20)
    return folder


def made(run: Any, place: Path, out: Path, method: str, *more: object) -> dict[str, Any]:
    """The origin of a merge of the two experts."""
    experts = ("--expert", place / "math", "--expert", place / "code", "--weight", 0.5)
    done = run("merge", out, "--method", method, "--base", place / "base", *experts, *more)
    assert done.code == 0, done.err
    with open_model(out, "out") as checkpoint:
        return origin_of(checkpoint)


@pytest.mark.parametrize("method", ["task_arithmetic", "linear"])
def test_a_merge_has_the_same_parent_relaxed_or_not(method: str, place: Path, tmp_path: Path, run: Any) -> None:
    texts = ("--calibration", place / "texts.txt")
    plain = made(run, place, tmp_path / "plain", method)
    relaxed = made(run, place, tmp_path / "relaxed", method, "--omega", 0.4, *texts)
    other = made(run, place, tmp_path / "other", method, "--weight", 0.25)
    assert (plain["method"], plain["aim"], relaxed["aim"]["omega"]) == (method, None, 0.4)
    assert set(plain["models"]) == {"math", "code"}
    assert relaxed["parent"] == plain["parent"] != other["parent"]


def test_the_parent_of_a_relaxed_model_is_what_was_relaxed(place: Path, tmp_path: Path, run: Any) -> None:
    made(run, place, tmp_path / "merged", "linear")
    (tmp_path / "merged" / "lowmem_aim.json").unlink()  # as if another tool had merged it
    flags = ("--base", place / "base", "--omega", 0.4, "--calibration", place / "texts.txt")
    assert run("relax", tmp_path / "merged", tmp_path / "relaxed", *flags).code == 0
    with open_model(tmp_path / "merged", "merged") as merged, open_model(tmp_path / "relaxed", "relaxed") as relaxed:
        assert origin_of(merged) == {}
        assert origin_of(relaxed)["parent"] == digest_of_model(merged, silent)
        assert digest_of_model(merged, silent) == digest_of_model(merged, silent) != digest_of_model(relaxed, silent)
