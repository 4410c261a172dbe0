"""The demo: its questions do not leak, its models are reused only while they are the same, its table is true."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import Run
from demo_settings import TINY
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowmem_aim.demo.evaluate import exact_matches
from lowmem_aim.demo.merges import write_recipe
from lowmem_aim.demo.models import MODELS, make
from lowmem_aim.demo.report import AIM_RECIPE, CONTROL, show_models, table, what_can_be_told
from lowmem_aim.demo.skills import SKILLS, draw, evaluation, is_held_out, mixture
from lowmem_aim.demo.tokenizer import build_tokenizer
from lowmem_aim.demo.train import IGNORED, as_batch, expert_shares
from lowmem_aim.errors import UsageError


class TestSkills:
    def test_the_answers_are_right(self) -> None:
        for example in mixture(dict.fromkeys(SKILLS, 1.0), 300, Random(1)):
            skill, _, question = example.prompt.removesuffix("=").partition(":")
            if skill == "add":
                assert int(example.answer) == sum(map(int, question.split("+")))
            else:
                assert example.answer == "".join(sorted(question) if skill == "sort" else reversed(question))

    def test_the_same_seed_gives_the_same_questions(self) -> None:
        for skill in SKILLS:
            assert evaluation(skill, 50, 0) == evaluation(skill, 50, 0) != evaluation(skill, 50, 1)

    def test_training_and_evaluation_share_no_question(self) -> None:
        for skill in SKILLS:
            held_out = {example.prompt for example in evaluation(skill, 200, 0)}
            assert len(held_out) == 200
            trained = {draw(skill, Random(seed)).prompt for seed in range(300)}
            assert not held_out & trained
            assert not any(is_held_out(draw(skill, Random(seed))) for seed in range(50))

    def test_an_expert_mostly_sees_its_skill_and_keeps_a_share_of_the_mixture(self) -> None:
        shares = expert_shares("sort", TINY)
        assert sum(shares.values()) == pytest.approx(1.0)
        assert shares["sort"] > 0.7
        assert all(share > 0 for share in shares.values())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's models, tiny. Read only."""
    folder = tmp_path_factory.mktemp("demo") / "run"
    make(folder, TINY, lambda line: None)
    return folder


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    """The demo's models, in a folder that a test may add to."""
    return shutil.copytree(made, tmp_path / "copy")


class TestModels:
    def test_they_are_sharded_checkpoints_that_transformers_loads(self, made: Path) -> None:
        for name in (MODELS.base, *MODELS.experts.values()):
            assert len(list((made / name).glob("model-*.safetensors"))) > 1
            assert (made / name / "model.safetensors.index.json").is_file()
            AutoModelForCausalLM.from_pretrained(made / name)
            tokenizer = AutoTokenizer.from_pretrained(made / name)
            for text in ("sort:HGFA=AFGH", "Größe: 1+2 ✓"):
                assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text

    def test_experts_differ_from_the_base_and_from_each_other(self, made: Path) -> None:
        name = "model.layers.0.self_attn.q_proj.weight"
        found = []
        for folder in (MODELS.base, *MODELS.experts.values()):
            tensors = {k: v for f in (made / folder).glob("*.safetensors") for k, v in load_file(f).items()}
            found.append(tensors[name])
        assert all(not torch.equal(a, b) for i, a in enumerate(found) for b in found[:i])

    def test_a_second_run_reuses_them_and_other_settings_train_again(self, made: Path, tmp_path: Path) -> None:
        weights = sorted(made.rglob("*.safetensors"))
        before = {file: file.stat().st_mtime_ns for file in weights}
        said: list[str] = []
        make(made, TINY, said.append)
        assert any("reused" in line for line in said)
        assert {file: file.stat().st_mtime_ns for file in weights} == before
        make(tmp_path / "a", replace(TINY, seed=1), said.append)
        digest = json.loads((tmp_path / "a/models.json").read_text())
        make(tmp_path / "a", replace(TINY, seed=2), said.append)
        assert json.loads((tmp_path / "a/models.json").read_text()) != digest

    def test_a_half_finished_training_starts_over(self, made: Path, tmp_path: Path) -> None:
        make(tmp_path / "a", TINY, lambda line: None)
        (tmp_path / "a/models.json").unlink()
        said: list[str] = []
        make(tmp_path / "a", TINY, said.append)
        assert any("training the base" in line for line in said)
        for file in made.rglob("*.safetensors"):  # seeded: the same models again
            assert file.read_bytes() == (tmp_path / "a" / file.relative_to(made)).read_bytes()

    def test_a_folder_of_someone_else_is_left_alone(self, tmp_path: Path, run: Run) -> None:
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "thesis.txt").write_text("x")
        with pytest.raises(UsageError, match="not empty"):
            make(tmp_path / "mine", TINY, lambda line: None)
        done = run("demo", tmp_path / "mine")
        assert done.code == 2
        assert [file.name for file in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


class _Knowing:
    """A model that gives every answer of the batch it is asked, or, `wrong_at` one place, not quite."""

    def __init__(self, labels: torch.Tensor, vocabulary: int, wrong_at: int | None = None) -> None:
        self.labels, self.vocabulary, self.wrong_at = labels, vocabulary, wrong_at

    def __call__(self, *, input_ids: torch.Tensor) -> Any:
        wanted = self.labels.masked_fill(self.labels == IGNORED, 0)
        logits = torch.nn.functional.one_hot(wanted.roll(-1, 1), self.vocabulary).float()
        if self.wrong_at is not None:
            logits[self.wrong_at] = 0.0
            logits[self.wrong_at, :, 0] = 1.0
        return SimpleNamespace(logits=logits)


def test_the_evaluation_counts_whole_right_answers() -> None:
    tokenizer = build_tokenizer(SKILLS)
    examples = evaluation("sort", 20, 0)
    labels = as_batch(examples, tokenizer)[1]
    assert exact_matches(_Knowing(labels, len(tokenizer)), tokenizer, examples) == 20
    assert exact_matches(_Knowing(labels, len(tokenizer), wrong_at=3), tokenizer, examples) == 19
    assert exact_matches(_Knowing(torch.zeros_like(labels), len(tokenizer)), tokenizer, examples) == 0


def test_its_recipes_merge_from_wherever_one_is(
    copy: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    texts = ("--calibration", "copy/calibration.jsonl", "--no-pack")
    assert run("calibrate", "copy/base", "-o", "copy/activations.safetensors", *texts).code == 0
    write_recipe(copy, AIM_RECIPE, MODELS, aim=True)
    write_recipe(copy, "ties-control.yml", MODELS, aim=True, control=CONTROL)
    for recipe, out in ((AIM_RECIPE, "out"), ("ties-control.yml", "control")):
        done = run("merge", f"copy/{recipe}", out, "--omega", "0.2")
        assert done.code == 0, done.err
        AutoModelForCausalLM.from_pretrained(tmp_path / out)
    aim, control = (json.loads((tmp_path / out / "lowmem_aim.json").read_text()) for out in ("out", "control"))
    assert control["control"]["name"] == CONTROL
    assert control["kept"]["delta"] == pytest.approx(aim["kept"]["delta"], abs=0.02) != 1.0


def test_it_ends_with_commands_that_run_where_the_user_is(
    copy: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "merged").mkdir()  # a name that is taken is not proposed
    said: list[str] = []
    show_models(Path("copy"), TINY, said.append, "lowmem-aim")
    commands = [line.split()[1:] for line in "\n".join(said).splitlines() if line.startswith("    lowmem-aim")]
    assert [words[0] for words in commands] == ["init", "plan", "merge"]
    for words in commands:
        done = run(*words)
        assert done.code == 0, done.err
    assert (tmp_path / "merged-2" / "config.json").is_file()


def test_what_its_numbers_can_tell_apart_is_computed() -> None:
    half = {"add": 0.5, "sort": 0.5}
    told = what_can_be_told(half, {"add": 0.5, "sort": 0.53}, 400)
    assert "7.1 points in a skill, 5.0 in the mean" in told  # 2 sqrt(2 p (1 - p) / n), and that over the root of 2
    assert "by +1.5 points: no more than chance" in told
    assert "by -25.0 points: more than chance" in what_can_be_told(half, {"add": 0.25, "sort": 0.25}, 400)
    assert "by +0.0 points: no more than chance" in what_can_be_told({"add": 1.0}, {"add": 1.0}, 400)


def test_the_table_shows_the_scores_that_it_is_given() -> None:
    text = table({"base": {"add": 0.125, "sort": 0.5}, "merge": {"add": 1.0, "sort": 0.0}})
    rows = [[cell.strip() for cell in line.strip("│┃").split("│")] for line in text.splitlines() if "│" in line]
    assert ["base", "12.5", "50.0", "31.2"] in rows
    assert ["merge", "100.0", "0.0", "50.0"] in rows
