"""What `aim:` can be told besides one omega: several, by layer and module, other scalings, weights to leave alone."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import references as ref
import torch
import yaml
from conftest import Run
from merge_cases import digests, recipe, tensors_in, with_aim
from stopping import stop

from lowmem_aim.errors import RecipeError, UsageError
from lowmem_aim.events import Event, Notice
from lowmem_aim.jobs.merge import merge
from lowmem_aim.merging.slices import TensorInputs
from lowmem_aim.recipe.reader import read_recipe
from lowmem_aim.recipe.recipe import Setting, one_by_one
from lowmem_aim.recipe.words import SCALINGS
from lowmem_aim.recipe.yaml_tree import parse
from lowmem_aim.relaxing.activations import Activations
from lowmem_aim.relaxing.aim import shrinkage
from lowmem_aim.system.options import Options

UP, DOWN = "model.layers.{}.mlp.up_proj.weight", "model.layers.{}.mlp.down_proj.weight"
HEAD, NORM = "lm_head.weight", "model.layers.1.input_layernorm.weight"


def problems(aim: str) -> list[str]:
    text = f"merge_method: slerp\nbase_model: b\nparameters: {{t: 0.5}}\nmodels:\n- model: m\naim: {aim}\n"
    with pytest.raises(RecipeError) as caught:
        read_recipe(parse(text, "recipe.yml"))
    return list(caught.value.problems)


class TestScaling:
    means = torch.tensor([[4.0, 1.0, 0.0, 2.0, 1.0]])

    @pytest.mark.parametrize(
        ("scaling", "expected"),
        [
            ("identity", [1.0, 0.25, 0.0, 0.5, 0.25]),
            ("sqrt", [1.0, 0.5, 0.0, 0.5**0.5, 0.5]),
            ("square", [1.0, 0.0625, 0.0, 0.25, 0.0625]),
            ("rank", [1.0, 0.25, 0.0, 0.75, 0.5]),  # equal ones as they stand
        ],
    )
    def test_it_is_a_function_of_the_share_of_the_most_active(self, scaling: str, expected: list[float]) -> None:
        found = shrinkage(self.means, 0.4, scaling)
        assert torch.allclose(found, 0.6 * torch.tensor([expected]), atol=1e-7)

    @pytest.mark.parametrize("scaling", SCALINGS)
    def test_experts_are_modules_each_and_silent_ones_are_left_alone(self, scaling: str) -> None:
        stack = torch.stack([self.means, torch.zeros(1, 5), self.means * 7])
        found = shrinkage(stack, 0.0, scaling)
        alone = shrinkage(self.means, 0.0, scaling)
        assert torch.equal(found[0], alone)
        assert torch.equal(found[1], torch.zeros(1, 5))
        assert torch.allclose(found[2], alone)

    @pytest.mark.parametrize("scaling", SCALINGS)
    def test_one_channel_is_the_most_active(self, scaling: str) -> None:
        assert shrinkage(torch.tensor([3.0]), 0.25, scaling).tolist() == [0.75]

    def test_a_merge_takes_it(self, llama: Path, measured: Path, tmp_path: Path) -> None:
        out = tensors_in(merge(with_aim(llama, measured, {"omega": 0.2, "scaling": "sqrt"}), tmp_path / "out"))
        plain = tensors_in(merge(with_aim(llama, measured, {"omega": 1.0}), tmp_path / "plain"))
        base, name = tensors_in(llama / "base"), UP.format(1)
        means = Activations.load(measured).means[name].double()
        share = (means / means.max()).sqrt()
        expected = base[name] + (plain[name] - base[name]) * (1 - share * 0.8)
        assert float((out[name] - expected).abs().max()) < 1e-6
        card = (tmp_path / "out" / "README.md").read_text()
        assert "omega 0.2 and the scaling sqrt" in card
        assert "scaling: sqrt" in card


class TestExclude:
    def test_weights_whose_name_has_the_part_keep_the_merged_value(
        self, llama: Path, measured: Path, tmp_path: Path
    ) -> None:
        job = with_aim(llama, measured, {"omega": 0.0, "exclude": ["lm_head", "norm"]})
        out = tensors_in(merge(job, tmp_path / "out"))
        plain = tensors_in(merge(with_aim(llama, measured, {"omega": 1.0}), tmp_path / "plain"))
        assert {name for name in out if torch.equal(out[name], plain[name])} == {
            name for name in out if "norm" in name or name in (HEAD, "model.embed_tokens.weight")
        }

    def test_a_part_of_no_relaxed_weight_is_told(self, llama: Path, measured: Path, tmp_path: Path) -> None:
        notices: list[Event] = []
        job = with_aim(llama, measured, {"exclude": ["embed_tokens", "lm_head", "atention"]})
        merge(job, tmp_path / "out", emit=notices.append)
        told = [event.text for event in notices if isinstance(event, Notice) and "exclude" in event.text]
        assert [text.split("`")[3] for text in told] == ["embed_tokens", "atention"]

    def test_flags(self, llama: Path) -> None:
        flags = {"omega": "0.3", "exclude": ("norm", "lm_head"), "scaling": "rank", "calibration": "builtin"}
        aim = recipe(llama, **flags).aim
        assert aim is not None
        assert (aim.omega, aim.exclude, aim.scaling) == (Setting(0.3), ("norm", "lm_head"), "rank")


class TestOmegaByLayerAndModule:
    def test_filters_and_gradients(self, llama: Path, measured: Path, tmp_path: Path) -> None:
        omega = [{"filter": "up_proj", "value": [0.0, 1.0]}, {"filter": "norm", "value": 0.7}]
        out = tensors_in(merge(with_aim(llama, measured, {"omega": omega}), tmp_path / "out"))
        plain = tensors_in(merge(with_aim(llama, measured, {"omega": 1.0}), tmp_path / "plain"))
        base, means = tensors_in(llama / "base"), Activations.load(measured).means
        for name, expected in {
            UP.format(0): 0.0,
            UP.format(1): 0.5,
            UP.format(2): 1.0,
            NORM: 0.7,
            DOWN.format(1): 0.4,  # no filter: the default
        }.items():
            truth = ref.aim(base[name], plain[name], means[name], expected)
            assert float((out[name].double() - truth).abs().max()) < 1e-6, name
        assert yaml.safe_load((tmp_path / "out" / "mergekit_config.yml").read_text())["aim"]["omega"] == omega

    def test_every_value_is_checked(self) -> None:
        found = problems("{omega: [{filter: up, value: [0.1, 1.5]}, {value: -1}], scaling: cube, exclude: [norm, '']}")
        assert [text.partition(": ")[2] for text in found] == [
            "`aim.omega` must lie in [0, 1], not 1.5",
            "`aim.omega` must lie in [0, 1], not -1",
            "`aim.scaling` must be one of identity, sqrt, square, rank, not `cube`",
            "`aim.exclude` must be a list of parts of tensor names, such as `[lm_head, norm]`",
        ]


class TestSeveral:
    def outputs(self, out: Path) -> dict[str, Any]:
        return {folder.name: digests(folder) for folder in sorted(out.iterdir())}

    def test_each_is_the_merge_with_that_omega_alone(self, llama: Path, measured: Path, tmp_path: Path) -> None:
        merge(with_aim(llama, measured, {"omega": [0.4, 1, 0.25]}), tmp_path / "out")
        assert sorted(self.outputs(tmp_path / "out")) == ["omega-0.25", "omega-0.4", "omega-1"]
        for name, omega in (("omega-0.4", 0.4), ("omega-1", 1.0), ("omega-0.25", 0.25)):
            merge(with_aim(llama, measured, {"omega": omega}), tmp_path / name)
            assert digests(tmp_path / "out" / name) == digests(tmp_path / name)

    def test_inputs_are_read_once(
        self, llama: Path, measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        begun: list[str] = []
        slices = TensorInputs.slices

        def noted(tensor: TensorInputs, first_pass: bool) -> Any:
            begun.append(tensor.task.name)
            return slices(tensor, first_pass)

        monkeypatch.setattr(TensorInputs, "slices", noted)
        out = merge(with_aim(llama, measured, {"omega": [0.2, 0.4]}), tmp_path / "out")
        assert sorted(begun) == sorted(tensors_in(out / "omega-0.2"))

    def test_interrupted_it_goes_on(self, llama: Path, texts: Path, tmp_path: Path, each_tensor: None) -> None:
        job = recipe(llama, omega="0.2,0.4", calibration=str(texts))
        options = Options(shard_bytes=40_000)
        merge(job, tmp_path / "whole", options)
        out = tmp_path / "out"
        for tensors in (3, 11):
            stop(job, out, tensors, options)
            assert not list(out.glob("*/config.json"))
        shutil.rmtree(out / "omega-0.4" / ".lowmem_aim" / "staging")  # the one is behind the other
        merge(job, out, options)
        assert self.outputs(out) == self.outputs(tmp_path / "whole")
        notices: list[Event] = []
        merge(job, out, options, notices.append)
        assert sum(isinstance(event, Notice) and "finished already" in event.text for event in notices) == 2

    def test_one_more_omega_finds_the_others_finished(self, llama: Path, measured: Path, tmp_path: Path) -> None:
        merge(with_aim(llama, measured, {"omega": [0.2]}), tmp_path / "out")
        before = (tmp_path / "out" / "omega-0.2" / "model.safetensors").stat().st_ino
        merge(with_aim(llama, measured, {"omega": [0.2, 0.6]}), tmp_path / "out")
        assert sorted(self.outputs(tmp_path / "out")) == ["omega-0.2", "omega-0.6"]
        assert (tmp_path / "out" / "omega-0.2" / "model.safetensors").stat().st_ino == before

    def test_a_folder_that_is_a_merge_is_refused(self, llama: Path, measured: Path, tmp_path: Path) -> None:
        merge(with_aim(llama, measured, {"omega": 0.2}), tmp_path / "out")
        with pytest.raises(UsageError, match="holds a merge"):
            merge(with_aim(llama, measured, {"omega": [0.2, 0.4]}), tmp_path / "out")

    def test_a_failure_leaves_nothing(self, llama: Path, measured: Path, tmp_path: Path) -> None:
        job = with_aim(llama, measured, {"omega": [0.2, 0.4]})
        with pytest.raises(UsageError):
            merge(job, tmp_path / "new" / "out", Options(nonfinite="base", shard_bytes=1))
        assert not (tmp_path / "new").exists()

    def test_the_command_line_takes_commas(self, llama: Path, measured: Path, tmp_path: Path, run: Run) -> None:
        command = ("relax", llama / "math", tmp_path / "out", "--base", llama / "base", "--calibration", measured)
        done = run(*command, "--omega", "0.2,0.4, 0.6")
        assert done.code == 0, done.err
        assert sorted(self.outputs(tmp_path / "out")) == ["omega-0.2", "omega-0.4", "omega-0.6"]
        assert run("status", tmp_path / "out").out.count("finished") == 3
        assert run("verify", tmp_path / "out").code == 0
        (tmp_path / "out" / "omega-0.4" / "model.safetensors").write_bytes(b"")
        assert run("verify", tmp_path / "out").code == 8

    def test_wrong_lists_are_named(self) -> None:
        assert "has 0.4 twice" in problems("{omega: [0.4, 0.4]}")[0]
        assert "must lie in [0, 1]" in problems("{omega: [0.4, 1.4]}")[0]
        assert "empty list" in problems("{omega: []}")[0]
        assert "a gradient is `- value: [...]`" in problems("{omega: [[0.1, 0.2]]}")[0]

    def test_folders_have_the_omegas_names(self, llama: Path, measured: Path) -> None:
        job = with_aim(llama, measured, {"omega": [1e-05, 0.30000000000000004, -0.0]})
        assert list(one_by_one(job)) == ["omega-1e-05", "omega-0.30000000000000004", "omega-0"]
