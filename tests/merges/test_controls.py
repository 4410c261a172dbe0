"""Controls of AIM: their factors are those of the documentation, the same however a merge goes, and named as such."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import references as ref
import tiny
import torch
import yaml
from calibrating import activations_of
from cards import assert_card
from conftest import Run
from long_cases import others_long
from merge_cases import digests, recipe, tensors_in, with_aim
from stopping import stop

from lowmem_aim.errors import RecipeError
from lowmem_aim.evaluating.origin import origin_of
from lowmem_aim.events import Event, Notice
from lowmem_aim.jobs.merge import merge
from lowmem_aim.methods.masks import NO_EXPERT, draws_of
from lowmem_aim.models.checkpoint import Checkpoint
from lowmem_aim.recipe.reader import read_recipe
from lowmem_aim.recipe.recipe import Aim
from lowmem_aim.recipe.words import CONTROLS, SCALINGS
from lowmem_aim.recipe.yaml_tree import parse, tree_of
from lowmem_aim.relaxing.activations import Activations
from lowmem_aim.relaxing.aim import shrinkage
from lowmem_aim.relaxing.controls import controlled, falls_short
from lowmem_aim.system.options import Options

NAME = "model.layers.0.mlp.up_proj.weight"
SHAPES = [(1, 12), (12, 1), (12,), (3, 1, 8), (3, 8, 1), (1, 1), (1,)]


def some_means(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Statistics with a few channels that are far more active than the others, as large models have them."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).abs() ** 3


def orders(name: str, modules: int, channels: int, seed: int = 0) -> list[list[int]]:
    """The order of the channels of each module, from the documented draws."""
    draws = draws_of(
        seed=seed, name=name, position=NO_EXPERT, start=0, count=modules * channels, device=torch.device("cpu")
    ).tolist()
    rows = [draws[first : first + channels] for first in range(0, len(draws), channels)]
    return [sorted(range(channels), key=row.__getitem__) for row in rows]


def factors_of(means: torch.Tensor, omega: float, kind: str, name: str, seed: int = 0) -> torch.Tensor:
    """The reference's factors of a whole tensor; each fused expert is a module."""
    modules = list(means) if means.ndim == 3 else [means]
    drawn = orders(name, len(modules), modules[0].numel(), seed)
    found = [ref.control(module, omega, kind, order) for module, order in zip(modules, drawn, strict=True)]
    return torch.stack(found) if means.ndim == 3 else found[0]


def mean_by_module(values: torch.Tensor) -> torch.Tensor:
    return values.double().reshape(len(values) if values.ndim == 3 else 1, -1).mean(dim=1)


class TestFactors:
    @pytest.mark.parametrize("control", CONTROLS)
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_they_are_the_formulas(self, shape: tuple[int, ...], control: str) -> None:
        means = some_means(shape)
        found = controlled(means, 0.4, Aim(control=control), NAME)
        assert found.shape == means.shape
        assert torch.allclose(1 - found.double(), factors_of(means, 0.4, control, NAME), atol=1e-7, rtol=0)

    @pytest.mark.parametrize("scaling", SCALINGS)
    @pytest.mark.parametrize("control", CONTROLS)
    def test_the_mean_is_that_of_aim_whatever_the_scaling(self, control: str, scaling: str) -> None:
        means, aim = some_means((3, 1, 200)), Aim(control=control, scaling=scaling)
        assert not falls_short(means, 0.4, aim)
        found, wanted = controlled(means, 0.4, aim, NAME), shrinkage(means, 0.4, scaling)
        assert not torch.equal(found, wanted)
        assert torch.allclose(mean_by_module(found), mean_by_module(wanted), rtol=1e-6)

    @pytest.mark.parametrize("control", CONTROLS)
    def test_silent_modules_and_omega_1_are_left_alone(self, control: str) -> None:
        means, aim = some_means((3, 1, 8)), Aim(control=control)
        means[1] = 0.0
        assert not controlled(means, 0.2, aim, NAME)[1].any()
        assert not controlled(means, 1.0, aim, NAME).any()
        assert not falls_short(means, 1.0, aim)

    def test_the_order_is_of_the_seed_the_name_and_the_expert(self) -> None:
        means = some_means((1, 8)).expand(2, 1, 8).contiguous()
        first = controlled(means, 0.0, Aim(control="permuted"), NAME)
        others = [
            controlled(means, 0.0, Aim(control="permuted", control_seed=1), NAME),
            controlled(means, 0.0, Aim(control="permuted"), NAME.replace("0", "1")),
        ]
        assert all(not torch.equal(first, other) for other in others)
        assert not torch.equal(first[0], first[1])
        for found in (first, *others):
            assert torch.equal(found.sort().values, shrinkage(means, 0.0).sort().values)

    def test_inverted_takes_back_no_more_than_all(self) -> None:
        means = torch.tensor([[1.0, 0.9, 0.8, 0.9]])  # evenly active: AIM takes back nearly all
        aim = Aim(control="inverted")
        assert falls_short(means, 0.0, aim)
        assert torch.allclose(controlled(means, 0.0, aim, NAME), torch.tensor([[0.0, 0.1, 0.2, 0.1]]))
        assert not falls_short(means, 0.0, Aim(control="uniform"))


class TestMerges:
    @pytest.mark.parametrize("architecture", ["gpt2", "gpt_oss"])  # transposed, tied; plain, fused experts
    def test_every_kind_of_tensor_has_its_own_factors(self, architecture: str, texts: Path, tmp_path: Path) -> None:
        base = tiny.build(architecture, tmp_path / "base")
        for seed, name in enumerate(("math", "code"), start=1):
            tiny.perturbed(base, tmp_path / name, scale=0.05, seed=seed)
        measured = activations_of(base, texts, tmp_path / "activations.safetensors")
        activations, before = Activations.load(measured), tensors_in(base)
        plain = tensors_in(merge(with_aim(tmp_path, measured, {"omega": 1.0}), tmp_path / "plain"))
        heads = {embedding: head for head, embedding in activations.tied.items()}
        for control in CONTROLS:
            job = with_aim(tmp_path, measured, {"omega": 0.3, "control": control, "control_seed": 5})
            found = tensors_in(merge(job, tmp_path / control))
            assert found.keys() == plain.keys()
            for name, value in found.items():
                means = activations.means.get(heads.get(name, name))
                if means is None:
                    assert torch.equal(value, plain[name])
                    continue
                factors = factors_of(means, 0.3, control, name, seed=5)
                expected = before[name].double() + (plain[name].double() - before[name].double()) * factors
                assert (value.double() - expected).abs().max() < 1e-6, (control, name)

    @pytest.mark.parametrize("control", others_long(CONTROLS, ("inverted",)))
    def test_omega_1_changes_nothing(self, llama: Path, measured: Path, tmp_path: Path, control: str) -> None:
        plain = tensors_in(merge(with_aim(llama, measured, {"omega": 1.0}), tmp_path / "plain"))
        found = tensors_in(merge(with_aim(llama, measured, {"omega": 1.0, "control": control}), tmp_path / "out"))
        assert all(torch.equal(found[name], plain[name]) for name in plain)

    def test_excluded_weights_keep_the_merged_value(self, llama: Path, measured: Path, tmp_path: Path) -> None:
        aim = {"omega": 0.0, "exclude": ["norm", "mlp"], "control": "uniform"}
        plain = tensors_in(merge(with_aim(llama, measured, {"omega": 1.0}), tmp_path / "plain"))
        found = tensors_in(merge(with_aim(llama, measured, aim), tmp_path / "out"))
        same = {name for name in found if torch.equal(found[name], plain[name])}
        assert same == {name for name in found if "norm" in name or "mlp" in name or "embed" in name}

    @pytest.mark.parametrize("control", others_long(CONTROLS, ("permuted",)))
    def test_slices_threads_and_kills_change_no_byte(
        self, llama: Path, measured: Path, tmp_path: Path, control: str, each_tensor: None
    ) -> None:
        job = recipe(llama, omega=0.3, calibration=str(measured), control=control)
        shards = Options(shard_bytes=40_000)
        merge(job, tmp_path / "whole", shards)
        merge(job, tmp_path / "rows", Options(shard_bytes=40_000, slice_rows=1, threads=1))
        for tensors in (5, 9):
            stop(job, tmp_path / "out", tensors, shards)
        merge(job, tmp_path / "out", shards)
        assert digests(tmp_path / "rows") == digests(tmp_path / "out") == digests(tmp_path / "whole")

    def test_several_omegas_are_each_the_merge_with_that_omega_alone(
        self, llama: Path, measured: Path, tmp_path: Path
    ) -> None:
        several = merge(with_aim(llama, measured, {"omega": [0.2, 0.6], "control": "permuted"}), tmp_path / "out")
        alone = merge(with_aim(llama, measured, {"omega": 0.6, "control": "permuted"}), tmp_path / "alone")
        assert digests(several / "omega-0.6") == digests(alone) != digests(several / "omega-0.2")

    def test_a_layer_that_is_there_twice_has_an_order_of_its_own_each_time(
        self, llama: Path, measured: Path, tmp_path: Path
    ) -> None:
        sources = [[{"model": str(llama / "math"), "layer_range": [0, 1]}]] * 2
        table = {"merge_method": "passthrough", "base_model": str(llama / "base"), "dtype": "float32"}
        table |= {"slices": [{"sources": part} for part in sources]}
        aim = {"omega": 0.0, "calibration": str(measured), "control": "permuted"}
        found = tensors_in(merge(read_recipe(tree_of(table | {"aim": aim}, "recipe")), tmp_path / "out"))
        base, math, means = (
            tensors_in(llama / "base")[NAME].double(),
            tensors_in(llama / "math")[NAME].double(),
            Activations.load(measured).means[NAME],
        )
        for name in (NAME, NAME.replace("0", "1")):
            expected = base + (math - base) * factors_of(means, 0.0, "permuted", name)
            assert (found[name].double() - expected).abs().max() < 1e-6

    def test_relax_and_acm_take_them(self, llama: Path, texts: Path, tmp_path: Path, run: Run) -> None:
        command = ("relax", llama / "math", tmp_path / "out", "--base", llama / "base", "--calibration", texts)
        done = run(*command, "--with", "both", "--omega", "0.2", "--control", "inverted")
        assert done.code == 0, done.err
        found, base, math = (tensors_in(folder)[NAME] for folder in (tmp_path / "out", llama / "base", llama / "math"))
        measured = activations_of(llama / "base", texts, tmp_path / "activations.safetensors")
        kept = json.loads((tmp_path / "out" / "lowmem_aim.json").read_text())["acm"]["groups"]["0"]["kept"]
        factors = kept * factors_of(Activations.load(measured).means[NAME], 0.2, "inverted", NAME)
        assert (found.double() - base.double() - (math - base).double() * factors).abs().max() < 1e-6


class TestNames:
    def test_plan_card_and_scores_say_what_it_is(self, llama: Path, measured: Path, tmp_path: Path, run: Run) -> None:
        flags = ("--omega", "0.3", "--calibration", measured, "--control", "permuted", "--control-seed", "7")
        models = ("--method", "slerp", "--base", llama / "base", "--expert", llama / "math", "-p", "t=0.5")
        shown = run("plan", tmp_path / "out", *models, *flags).out
        assert "control   permuted (seed 7) factors in place of AIM's: to judge AIM by, not a model to use" in shown
        assert run("merge", tmp_path / "out", *models, *flags).code == 0
        card = (tmp_path / "out" / "README.md").read_text()
        assert_card(card)
        assert "# A merge by slerp with AIM control (permuted)\n" in card
        assert "**This is not a model to use:** it is a control" in card
        assert "AIM's factors in a random order, drawn with seed 7" in card
        assert yaml.safe_load(card.split("---\n")[1])["tags"] == ["merge", "lowmem-aim", "slerp", "aim-control"]
        facts = json.loads((tmp_path / "out" / "lowmem_aim.json").read_text())
        assert facts["control"] == {"name": "permuted", "weaker_than_aim": []}
        written = yaml.safe_load((tmp_path / "out" / "mergekit_config.yml").read_text())["aim"]
        assert written == facts["recipe"]["aim"]
        assert (written["control"], written["control_seed"]) == ("permuted", 7)
        with Checkpoint.open(tmp_path / "out") as merged:
            assert origin_of(merged)["control"] == "permuted"

    def test_a_merge_with_aim_itself_names_none(self, llama: Path, measured: Path, tmp_path: Path) -> None:
        out = merge(with_aim(llama, measured, {}), tmp_path / "out")
        assert not any("control" in (out / name).read_text() for name in ("README.md", "lowmem_aim.json"))

    def test_where_inverted_takes_back_less_is_told(self, llama: Path, measured: Path, tmp_path: Path) -> None:
        notices: list[Event] = []
        job = with_aim(llama, measured, {"omega": 0.0, "scaling": "sqrt", "control": "inverted"})
        out = merge(job, tmp_path / "out", emit=notices.append)
        weaker = json.loads((out / "lowmem_aim.json").read_text())["control"]["weaker_than_aim"]
        means = Activations.load(measured).means
        assert weaker
        assert set(weaker) == {name for name in means if float((means[name] / means[name].max()).sqrt().mean()) > 0.5}
        told = [event.text for event in notices if isinstance(event, Notice) and "less than AIM" in event.text]
        assert told == [
            f"AIM control (inverted): it takes back less than AIM in {len(weaker)} weights, such as `{weaker[0]}`"
        ]
        assert f"In {len(weaker)} weights this takes back less than AIM" in (out / "README.md").read_text()

    def test_a_stage_that_is_one_is_told(self, llama: Path, measured: Path, tmp_path: Path) -> None:
        parts: list[dict[str, Any]] = [
            {
                "name": "first",
                "merge_method": "task_arithmetic",
                "base_model": str(llama / "base"),
                "models": [{"model": str(llama / "math"), "parameters": {"weight": 0.5}}],
                "aim": {"calibration": str(measured), "control": "uniform"},
            },
            {"merge_method": "linear", "models": [{"model": "first", "parameters": {"weight": 1}}]},
        ]
        out = merge(read_recipe(parse("---\n".join(map(yaml.safe_dump, parts)), "recipe.yml")), tmp_path / "out")
        assert "**This is not a model to use:** its stage `first` is a control" in (out / "README.md").read_text()

    def test_another_control_is_another_job(
        self, llama: Path, measured: Path, tmp_path: Path, run: Run, each_tensor: None
    ) -> None:
        flags = {"omega": 0.3, "calibration": str(measured)}
        stop(recipe(llama, **flags, control="uniform"), tmp_path / "out", 9)
        command = ["merge", tmp_path / "out", "--method", "ties", "--base", llama / "base"]
        command += [part for name in ("math", "code", "chat") for part in ("--expert", llama / name)]
        command += ["--omega", "0.3", "--calibration", measured, "--shard-size", "40000"]
        for control, told in (
            (["permuted"], "aim.control: uniform then, permuted now"),
            ([], "uniform then, not given"),
        ):
            done = run(*command, *(part for name in control for part in ("--control", name)))
            assert done.code == 7
            assert told in done.err
        assert run(*command, "--control", "uniform").code == 0


class TestRecipes:
    def read(self, aim: str, **flags: Any) -> Any:
        from lowmem_aim.recipe.from_flags import applied

        text = f"merge_method: slerp\nbase_model: b\nparameters: {{t: 0.5}}\nmodels:\n- model: m\naim: {aim}\n"
        return read_recipe(applied(parse(text, "recipe.yml"), flags))

    def test_wrong_values_are_named_with_their_place(self) -> None:
        with pytest.raises(RecipeError) as caught:
            self.read("{control: permutted, control_seed: -1, contrl: uniform}")
        assert list(caught.value.problems) == [
            "recipe.yml:6:7: `aim.control` must be one of uniform, permuted, inverted, not `permutted`; "
            "did you mean `permuted`?",
            "recipe.yml:6:27: `aim.control_seed` must be a whole number in [0, 2^32), not `-1`",
            "recipe.yml:6:45: unknown key `contrl`; did you mean `control`?",
        ]

    @pytest.mark.parametrize("aim", ["{control_seed: 3}", "{control: inverted, control_seed: 3}"])
    def test_a_seed_that_draws_nothing_is_left_out_with_a_notice(self, aim: str) -> None:
        read = self.read(aim)
        assert read.aim.control_seed == 0
        assert [text.partition(": ")[2] for text in read.notices] == [
            "`aim.control_seed` has no meaning without `control: permuted`, the only one that is drawn"
        ]
        assert not self.read("{control: permuted, control_seed: 3}").notices

    def test_a_flag_for_it_is_refused(self) -> None:
        with pytest.raises(RecipeError, match=r"--control-seed: `aim\.control_seed` has no meaning without"):
            self.read("{control: uniform}", control_seed=0)

    def test_flags_win_over_the_recipe(self) -> None:
        aim = self.read("{control: uniform}", control="permuted", control_seed=2).aim
        assert (aim.control, aim.control_seed) == ("permuted", 2)

    def test_without_aim_they_have_no_meaning(self, tmp_path: Path, run: Run) -> None:
        command = ("relax", tmp_path, tmp_path / "out", "--base", tmp_path, "--with", "acm")
        done = run(*command, "--control-seed", "0")
        assert done.code == 2
        assert "--control-seed has no meaning without AIM" in done.err
        done = run("merge", tmp_path / "out", "--method", "linear", "--expert", tmp_path, "--control", "uniform")
        assert "--control has no meaning without AIM" in done.err
