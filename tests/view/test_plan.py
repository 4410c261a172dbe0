"""`plan`: what it says is what the merge does; it reads headers only, leaves nothing, finds all problems at once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from conftest import Place, Run
from hub.server import OLD, Hub, weights
from merge_cases import recipe as merge_recipe
from safetensors.torch import load_file, save_file
from stopping import Stopped, stopping_after

from lowmem_aim.errors import ResumeError, UsageError
from lowmem_aim.events import Planned, RunStarted
from lowmem_aim.jobs import plan
from lowmem_aim.jobs.merge import merge
from lowmem_aim.merging import shares
from lowmem_aim.models import checkpoint
from lowmem_aim.models.headers import read_header
from lowmem_aim.models.stand_in import FIRST_BYTES
from lowmem_aim.output.folder import ACTIVATIONS, LOG, PRIVATE, SMALL_FILES_BYTES
from lowmem_aim.recipe.reader import read_recipe
from lowmem_aim.recipe.yaml_tree import load_tree
from lowmem_aim.system import memory
from lowmem_aim.system.files import cache_folder
from lowmem_aim.system.lock import locked
from lowmem_aim.system.options import Options
from lowmem_aim.view.record import runs_in


def written(recipe: dict[str, Any], folder: Path) -> Path:
    (folder / "recipe.yml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yml"


def ties(llama: Path, **more: Any) -> dict[str, Any]:
    models = [{"model": str(llama / name), "parameters": {"density": 0.5, "weight": 1.0}} for name in ("math", "code")]
    return {"merge_method": "ties", "base_model": str(llama / "base"), "models": models, **more}


def planned(run: Run, *arguments: object, code: int = 0) -> dict[str, Any]:
    done = run("plan", *arguments, "--json", "--no-measure")
    assert done.code == code, done.err
    found: dict[str, Any] = json.loads(done.out)
    assert found["plan"] == 1
    assert found["fits"] == (code == 0)
    return found


def everything_in(*folders: Path) -> dict[Path, tuple[int, int]]:
    files = [file for folder in folders for file in folder.rglob("*")]
    return {file: (file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()}


class TestWhatItSays:
    def test_models(self, place: Place) -> None:
        (place.folder / "math" / "README.md").write_text("---\nlicense: apache-2.0\ntags: [x]\n---\n# license: none\n")
        tensors = load_file(place.folder / "base/model.safetensors")
        found = planned(place.run, written(ties(place.folder), place.folder), place.out)["survey"]
        base, expert, _ = found["models"]
        assert (base["role"], base["label"], base["licence"]) == ("base", "base", "")
        assert (expert["role"], expert["label"], expert["licence"]) == ("expert", "math", "apache-2.0")
        assert base["parameters"] == sum(tensor.numel() for tensor in tensors.values())
        assert base["nbytes"] == sum(tensor.nbytes for tensor in tensors.values())
        facts = {key: base[key] for key in ("layers", "vocabulary", "tied", "dtypes", "missing_bytes")}
        assert facts == {
            "layers": tiny.LAYERS,
            "vocabulary": tiny.VOCAB,
            "tied": False,
            "dtypes": ["float32"],
            "missing_bytes": 0,
        }

    def test_parameters_by_kind_where_they_differ(self, llama: Path, tmp_path: Path, run: Run) -> None:
        recipe = ties(llama, parameters={"lambda": 0.9})
        recipe["models"][0]["parameters"]["weight"] = [{"filter": "mlp", "value": 0.3}, {"value": [0.0, 1.0]}]
        found = planned(run, written(recipe, tmp_path), tmp_path / "out")["survey"]
        assert found["settings"]["lambda"] == "0.9"
        assert "weight" not in found["settings"]
        settings = {kind["kind"]: kind["settings"] for kind in found["kinds"]}
        assert settings["mlp.up_proj"] == {"weight": "0.3/1"}
        assert settings["self_attn.q_proj"] == {"weight": "0/1 ... 1"}
        told = run("plan", tmp_path / "recipe.yml", tmp_path / "out", "--no-measure").out
        assert "weight 0/1 ... 1" in told

    def test_what_is_not_merged_and_why(self, tmp_path: Path, run: Run) -> None:
        """GPT-2's files of old hold masks, which are no weights."""
        tiny.build("gpt2", tmp_path / "base")
        file = tmp_path / "base" / "model.safetensors"
        mask = {"transformer.h.0.attn.bias": torch.ones(1, 1, 128, 128).tril()}
        save_file(load_file(file) | mask, file, metadata={"format": "pt"})
        for name in ("math", "code"):
            tiny.perturbed(tmp_path / "base", tmp_path / name, scale=0.0)
        recipe = written(ties(tmp_path), tmp_path)
        found = planned(run, recipe, tmp_path / "out")["survey"]
        [(why, names)] = found["left_out"].items()
        assert why == "copied: state of the model that is not a weight"
        assert names == list(mask)
        assert f"{why}: transformer.h.0.attn.bias" in run("plan", recipe, tmp_path / "out", "--no-measure").out

    def test_bytes_are_those_that_the_merge_moves(self, llama: Path, texts: Path, tmp_path: Path, run: Run) -> None:
        recipe = written(ties(llama, aim={"omega": 0.4, "calibration": str(texts)}), tmp_path)
        found = planned(run, recipe, tmp_path / "out")["survey"]
        assert run("merge", recipe, tmp_path / "out").code == 0
        assert found["write_bytes"] == (tmp_path / "out/model.safetensors").stat().st_size
        models = [llama / name / "model.safetensors" for name in ("base", "math", "code")]
        assert found["read_bytes"] == sum(info.nbytes for model in models for info in read_header(model).values())

    def test_the_first_screen_of_a_merge_is_the_same(self, llama: Path, tmp_path: Path, run: Run) -> None:
        recipe = written(ties(llama), tmp_path)
        told = run("plan", recipe, tmp_path / "out", "--no-measure").out.splitlines()
        done = run("merge", recipe, tmp_path / "out")
        survey = told[: next(number for number, line in enumerate(told) if line.startswith("bytes")) + 1]
        assert len(survey) > 10
        assert done.err.splitlines()[: len(survey)] == survey
        [events] = runs_in(tmp_path / "out" / PRIVATE / LOG)
        [about] = [event.about for _, event in events if isinstance(event, Planned)]
        assert about == planned(run, recipe, tmp_path / "other")["survey"]

    def test_several_omegas_are_several_outputs(self, llama: Path, texts: Path, tmp_path: Path, run: Run) -> None:
        one = planned(run, written(ties(llama), tmp_path), tmp_path / "out")["survey"]
        recipe = written(ties(llama, aim={"omega": [0.2, 0.6], "calibration": str(texts)}), tmp_path)
        found = planned(run, recipe, tmp_path / "out")["survey"]
        assert found["outputs"] == ["omega-0.2", "omega-0.6"]
        assert found["write_bytes"] == 2 * one["write_bytes"]
        assert found["read_bytes"] == one["read_bytes"], "inputs are read once"

    def test_times_where_it_may_measure(
        self, llama: Path, texts: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(plan, "MEASURED_SECONDS", 0.05)
        aim = {"omega": 0.4, "calibration": str(texts)}
        recipe = written(ties(llama, aim=aim, acm={"calibration": str(texts)}), tmp_path)
        done = run("plan", recipe, tmp_path / "out", "--json")
        assert done.code == 0, done.err
        found = json.loads(done.out)
        assert [step["phase"] for step in found["steps"]] == ["calibrate", "compare", "merge"]
        for step in found["steps"]:
            assert step["seconds"] == max(step["limits"].values()) > 0
        assert all(value > 0 for value in found["speeds"].values())
        assert not planned(run, recipe, tmp_path / "out")["steps"], "nothing is measured, nothing is told"
        assert "time      about " in run("plan", recipe, tmp_path / "out").out

    def test_activations_that_were_measured_cost_nothing(
        self, llama: Path, texts: Path, tmp_path: Path, run: Run
    ) -> None:
        recipe = written(ties(llama, aim={"omega": 0.4, "calibration": str(texts)}), tmp_path)
        assert not planned(run, recipe, tmp_path / "out")["notes"]
        assert run("merge", recipe, tmp_path / "out").code == 0
        assert planned(run, recipe, tmp_path / "new")["notes"] == [
            "the activations were measured before, and are reused"
        ]


class TestItsVerdictIsTheMerges:
    """Each of these merges ends with the exit code and the problems that `plan` foresaw."""

    def same(self, run: Run, recipe: Path, out: Path, code: int, *more: object) -> str:
        foreseen = run("plan", recipe, out, "--no-measure", *more)
        done = run("merge", recipe, out, *more)
        assert foreseen.code == done.code == code, (foreseen.err, done.err)
        problems = [line for line in foreseen.err.splitlines() if line.startswith("error: ")]
        assert problems
        assert problems[0] in done.err
        return foreseen.err

    def test_too_little_memory(self, llama: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(memory, "anonymous_bytes", lambda: 400_000_000)  # both messages name it
        wrong = self.same(run, written(ties(llama), tmp_path), tmp_path / "out", 5, "--ram", "1MB")
        assert "hint: " in wrong

    def test_a_full_disk(self, llama: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        real = shutil.disk_usage
        monkeypatch.setattr(shutil, "disk_usage", lambda path: real(path)._replace(free=1000))
        self.same(run, written(ties(llama), tmp_path), tmp_path / "out", 4)

    def test_a_disk_with_room_for_the_output_and_for_some_hidden_states(
        self, llama: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Two snapshots of them are what it takes where all of them fit the memory."""
        aim = {"omega": 0.4, "calibration": "builtin", "samples": 8, "block_size": 128}
        recipe = written(ties(llama, aim=aim, dtype="bfloat16"), tmp_path)
        [disk] = [need for need in planned(run, recipe, tmp_path / "out")["needs"] if need["what"] == "disk"]
        states = (disk["least"] - SMALL_FILES_BYTES) // 3
        real, free = shutil.disk_usage, [SMALL_FILES_BYTES + 3 * states // 2]
        monkeypatch.setattr(shutil, "disk_usage", lambda path: real(path)._replace(free=free[0]))
        assert "running the model, for hidden states, needs" in self.same(run, recipe, tmp_path / "out", 4)
        free[0] = SMALL_FILES_BYTES + 5 * states // 2
        assert run("plan", recipe, tmp_path / "out", "--no-measure").code == 0
        assert run("merge", recipe, tmp_path / "out").code == 0

    def test_too_little_memory_for_acm(
        self, llama: Path, texts: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It takes some 100 MB beside what a calibration of the same texts takes."""
        monkeypatch.setattr(memory, "anonymous_bytes", lambda: 100_000_000)
        recipe = written(ties(llama, acm={"calibration": str(texts)}), tmp_path)
        wrong = self.same(run, recipe, tmp_path / "out", 5, "--ram", "200MB")
        assert "running the model block by block" in wrong
        assert wrong.count("--ram ") == 1, "the merge needs less, and is not told beside it"
        found = planned(run, recipe, tmp_path / "out", "--ram", "1MB", code=5)
        [ram] = [need for need in found["needs"] if need["what"] == "RAM"]
        named = f"{ram['least'] // 10**6}MB"
        assert f"`--ram {named}` would do" in found["hints"][0]
        assert named in wrong, "the number does not depend on the budget that was given"
        assert run("plan", recipe, tmp_path / "out", "--no-measure", "--ram", named).code == 0

    def test_lost_activations_are_measured_again_and_in_the_same_environment(
        self, llama: Path, texts: Path, tmp_path: Path, run: Run, each_tensor: None
    ) -> None:
        job = merge_recipe(llama, "ties", omega=0.4, calibration=str(texts))
        with pytest.raises(Stopped):
            merge(job, tmp_path / "out", Options(use_cache=False, threads=1), stopping_after(5))
        (tmp_path / "out" / PRIVATE / ACTIVATIONS).unlink()
        found = plan.plan(job, tmp_path / "out", Options(use_cache=False, threads=2), measure=False)
        assert found.exit_code == 7
        assert any("threads of calibration" in problem for problem in found.problems)
        with pytest.raises(ResumeError, match="threads of calibration"):
            merge(job, tmp_path / "out", Options(use_cache=False, threads=2))

    def test_missing_texts_do_not_make_an_interrupted_run_another_one(
        self, llama: Path, texts: Path, tmp_path: Path, run: Run, each_tensor: None
    ) -> None:
        recipe = written(ties(llama, aim={"omega": 0.4, "calibration": str(texts)}), tmp_path)
        with pytest.raises(Stopped):
            merge(read_recipe(load_tree(recipe)), tmp_path / "out", Options(), stopping_after(5))
        texts.rename(tmp_path / "moved.jsonl")
        wrong = self.same(run, recipe, tmp_path / "out", 3)
        assert "another one" not in wrong
        assert "--fresh" not in wrong

    def test_an_output_that_is_taken(self, llama: Path, tmp_path: Path, run: Run) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine.txt").write_text("mine")
        self.same(run, written(ties(llama), tmp_path), tmp_path / "out", 2)

    def test_activations_of_another_model(self, llama: Path, texts: Path, tmp_path: Path, run: Run) -> None:
        other = tiny.build("gpt2", tmp_path / "gpt2")
        file = tmp_path / "activations.safetensors"
        assert run("calibrate", other, "-o", file, "--calibration", texts).code == 0
        recipe = written(ties(llama, aim={"omega": 0.4, "calibration": str(file)}), tmp_path)
        self.same(run, recipe, tmp_path / "out", 3)

    def test_a_missing_model(self, llama: Path, tmp_path: Path, run: Run) -> None:
        recipe = ties(llama)
        recipe["models"][1]["model"] = str(tmp_path / "none")
        self.same(run, written(recipe, tmp_path), tmp_path / "out", 3)

    @pytest.mark.parametrize("method", ["", "tise"])
    def test_a_wrong_recipe_with_all_its_mistakes(self, method: str, llama: Path, tmp_path: Path, run: Run) -> None:
        recipe = ties(llama, dtype="bfloat61", aim={"omega": 7})
        recipe["models"][0]["parameters"]["densty"] = 0.5
        if method:
            recipe["merge_method"] = method
        wrong = self.same(run, written(recipe, tmp_path), tmp_path / "out", 2)
        for said in ("bfloat16", "omega", "did you mean `density`", *(["did you mean `ties`"] if method else [])):
            assert said in wrong

    def test_a_tied_head_that_differs_from_its_embedding(self, place: Place) -> None:
        for name in ("base", "math", "code"):
            tiny.edit_config(place.folder / name, tie_word_embeddings=True)
        wrong = self.same(place.run, written(ties(place.folder), place.folder), place.out, 3)
        assert "`base`: `lm_head.weight` should be tied" in wrong

    def test_another_jobs_output(self, llama: Path, tmp_path: Path, run: Run) -> None:
        recipe = written(ties(llama), tmp_path)
        assert run("merge", recipe, tmp_path / "out").code == 0
        assert "it holds another merge" in self.same(run, recipe, tmp_path / "out", 2, "--density", "0.3")

    def test_another_jobs_interrupted_run(
        self, llama: Path, texts: Path, tmp_path: Path, run: Run, each_tensor: None
    ) -> None:
        with pytest.raises(Stopped):
            merge(merge_recipe(llama, "linear"), tmp_path / "out", Options(), stopping_after(5))
        wrong = self.same(run, written(ties(llama), tmp_path), tmp_path / "out", 7)
        assert "merge_method" in wrong
        fresh = run("plan", tmp_path / "recipe.yml", tmp_path / "out", "--no-measure", "--fresh")
        assert fresh.code == 0, fresh.err

    def test_a_run_at_work(self, llama: Path, tmp_path: Path, run: Run) -> None:
        recipe = written(ties(llama), tmp_path)
        (tmp_path / "out" / PRIVATE).mkdir(parents=True)
        with locked(tmp_path / "out" / PRIVATE / "lock"):
            foreseen = run("plan", recipe, tmp_path / "out", "--no-measure")
        assert foreseen.code == 6
        assert "another run" in foreseen.err

    def test_a_cache_that_may_not_be_used(
        self, llama: Path, texts: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(shares, "GROWTH_BYTES", 0)  # so that calibrating takes more than merging
        recipe = written(ties(llama, aim={"omega": 0.4, "calibration": str(texts)}), tmp_path)
        assert run("merge", recipe, tmp_path / "out").code == 0
        needs = [planned(run, recipe, tmp_path / "new", *more)["needs"][0]["why"] for more in ((), ("--no-cache",))]
        assert [why.startswith("calibrate: ") for why in needs] == [False, True]

    def test_missing_models_do_not_hide_other_problems(self, llama: Path, tmp_path: Path, run: Run) -> None:
        recipe = ties(llama, aim={"omega": 0.4, "calibration": str(tmp_path / "none.jsonl")})
        recipe["models"][1]["model"] = str(tmp_path / "none")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine.txt").write_text("mine")
        done = run("plan", written(recipe, tmp_path), tmp_path / "out", "--no-measure")
        assert done.code == run("merge", written(recipe, tmp_path), tmp_path / "out").code == 2
        for said in ("no model folder", "not empty", "no calibration file"):
            assert said in done.err

    def test_several_at_once(self, llama: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        real = shutil.disk_usage
        monkeypatch.setattr(shutil, "disk_usage", lambda path: real(path)._replace(free=1000))
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine.txt").write_text("mine")
        found = planned(run, written(ties(llama), tmp_path), tmp_path / "out", code=2)
        assert len(found["problems"]) == 2
        assert any("not empty" in problem for problem in found["problems"])
        assert any("disk" in problem for problem in found["problems"])

    def test_a_check_that_is_added_refuses_both(
        self, llama: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from lowmem_aim.jobs import preparation

        def check_weekday(ready: preparation.Prepared) -> None:
            raise UsageError(f"no merges of {len(ready.inputs.experts)} experts on a Monday")

        monkeypatch.setattr(preparation, "LATER", (*preparation.LATER, check_weekday))
        assert "on a Monday" in self.same(run, written(ties(llama), tmp_path), tmp_path / "out", 2)
        relaxed = run(
            "relax",
            llama / "math",
            "--base",
            llama / "base",
            "--omega",
            "0.4",
            "--calibration",
            "builtin",
            tmp_path / "relaxed",
        )
        assert relaxed.code == 2
        assert "on a Monday" in relaxed.err
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / "relaxed").exists()


class TestItOnlyLooks:
    def test_no_more_is_read_than_a_row_of_each_tensor_of_the_base(
        self, llama: Path, texts: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """By which cached activations are known; without AIM nothing is."""
        read: list[tuple[str, str, int]] = []
        real = checkpoint.Checkpoint.rows

        def watched(self: checkpoint.Checkpoint, name: str, start: int, stop: int) -> torch.Tensor:
            read.append((self.label, name, stop - start))
            return real(self, name, start, stop)

        monkeypatch.setattr(checkpoint.Checkpoint, "rows", watched)
        planned(run, written(ties(llama), tmp_path), tmp_path / "out")
        assert not read
        recipe = ties(llama, aim={"omega": 0.4, "calibration": str(texts)}, acm={"calibration": str(texts)})
        planned(run, written(recipe, tmp_path), tmp_path / "out")
        assert {(label, rows) for label, _, rows in read} == {("base", 1)}
        assert len(read) == len(load_file(llama / "base/model.safetensors"))

    @pytest.mark.parametrize("exists", [False, True])
    def test_nothing_is_left(
        self, exists: bool, llama: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(plan, "MEASURED_SECONDS", 0.05)
        recipe = written(ties(llama), tmp_path)
        if exists:
            (tmp_path / "out").mkdir()
        run("plan", recipe, tmp_path / "out")  # what is learnt of the models' structure is cached
        before = everything_in(tmp_path, llama, cache_folder())
        assert run("plan", recipe, tmp_path / "out").code == 0
        assert everything_in(tmp_path, llama, cache_folder()) == before
        assert (tmp_path / "out").exists() == exists
        assert not list(cache_folder().glob("stand-ins-*"))

    def test_an_interrupted_run_is_left_as_it_is(self, llama: Path, tmp_path: Path, run: Run) -> None:
        recipe = written(ties(llama), tmp_path)
        assert run("merge", recipe, tmp_path / "out").code == 0
        before = everything_in(tmp_path)
        found = planned(run, recipe, tmp_path / "out")
        assert found["notes"] == [f"`{tmp_path / 'out'}` is finished already"]
        assert everything_in(tmp_path) == before
        [events] = runs_in(tmp_path / "out" / PRIVATE / LOG)
        assert sum(isinstance(event, RunStarted) for _, event in events) == 1

    def test_of_hub_models_only_headers_are_fetched(self, hub: Hub, sharded: Path, tmp_path: Path, run: Run) -> None:
        hub.commits[OLD] = sharded
        own = {"weight": 0.5}
        models = [{"model": "tiny/model", "parameters": own}, {"model": str(sharded), "parameters": own}]
        recipe = written({"merge_method": "linear", "models": models}, tmp_path)
        found = planned(run, recipe, tmp_path / "out")
        distant, local = found["survey"]["models"]
        assert set(hub.of_weights.values()) == {FIRST_BYTES}
        assert distant["missing_bytes"] == weights(sharded) > 0
        assert local["missing_bytes"] == 0
        assert distant["parameters"] == local["parameters"]
        assert any("does not include downloads" in note for note in found["notes"])
        assert not list(cache_folder().glob("stand-ins-*"))


def test_the_default_texts_are_on_the_hub_and_a_plan_does_not_fetch_them(
    llama: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr("lowmem_aim.measuring.texts._from_hub", lambda name, *_: asked.append(name) or [])
    models = ("--method", "ties", "--base", llama / "base", "--expert", llama / "math", "--omega", "0.4")
    done = run("plan", tmp_path / "out", *models, "--no-measure")
    assert done.code == 0, done.err
    assert "the texts are on the Hub, and were not fetched" in " ".join(done.out.split())
    assert asked == []
