"""ACM: exact mutual information in little memory, its coefficients, and what they do to merges of any origin."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import pytest
import tiny
import torch
import yaml
from calibrating import activations_of
from conftest import Place, Run
from long_cases import others_long
from merge_cases import digests, tensors_in
from stopping import Stopped, stop
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowmem_aim.errors import ModelError, RecipeError, UsageError
from lowmem_aim.events import Event, PhaseStarted
from lowmem_aim.jobs.merge import merge
from lowmem_aim.measuring import comparison
from lowmem_aim.measuring.mutual_information import CHUNK, PairCounts
from lowmem_aim.recipe.from_flags import applied, relax_recipe
from lowmem_aim.recipe.reader import read_recipe
from lowmem_aim.recipe.recipe import Acm, Recipe
from lowmem_aim.recipe.yaml_tree import parse, tree_of
from lowmem_aim.relaxing.acm import freezing
from lowmem_aim.system.options import Options
from lowmem_aim.system.tensor_store import TensorStore

TEXTS = ["The quick brown fox.", "jumps over", "a lazy dog that has been sleeping all day long in the sun"]


def brute_force(x: Tensor, y: Tensor) -> float:
    first, second = ([float(v) for v in t.to(torch.bfloat16).flatten()] for t in (x, y))
    n = len(first)
    a, b, pairs = Counter(first), Counter(second), Counter(zip(first, second, strict=True))
    return math.fsum(c / n * math.log(c * n / (a[i] * b[j])) for (i, j), c in pairs.items())


class TestMutualInformation:
    @pytest.mark.parametrize("shape", [(1,), (7,), (50, 40), (3, 5, 7)])
    @pytest.mark.parametrize("noise", [0.0, 0.1, 10.0])
    def test_it_is_that_of_the_empirical_distribution(self, shape: tuple[int, ...], noise: float) -> None:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(shape, generator=generator).to(torch.bfloat16)
        y = (x + noise * torch.randn(shape, generator=generator)).to(torch.bfloat16)
        counts = PairCounts()
        counts.add(x, y)
        assert counts.mutual_information() == pytest.approx(brute_force(x, y), abs=1e-12)

    def test_pieces_and_a_shelf_change_no_bit(self, tmp_path: Path) -> None:
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(5000, generator=generator)
        y = x + 0.3 * torch.randn(5000, generator=generator)
        whole = PairCounts()
        whole.add(x, y)
        with TensorStore(torch.device("cpu"), device_bytes=0, ram_bytes=0, folder=tmp_path) as store:
            pieces = PairCounts(store)
            for start in range(0, 5000, 137):
                pieces.add(x[start : start + 137], y[start : start + 137])
            assert pieces.mutual_information() == whole.mutual_information()
        assert CHUNK > 5000

    def test_both_zeros_are_one_label(self) -> None:
        counts = PairCounts()
        counts.add(torch.tensor([0.0, -0.0, 1.0]), torch.tensor([1.0, 1.0, 2.0]))
        assert counts.mutual_information() == pytest.approx(
            brute_force(torch.tensor([0.0, 0, 1]), torch.tensor([1.0, 1, 2]))
        )

    def test_nothing_shares_nothing_and_what_is_not_finite_is_refused(self) -> None:
        assert PairCounts().mutual_information() == 0.0
        with pytest.raises(ValueError, match="beyond bfloat16"):
            PairCounts().add(torch.tensor([1.0, 3.4e38]), torch.tensor([1.0, 2.0]))


class TestCoefficients:
    information: ClassVar = {"0": [2.0, 3.0, 2.5], "1": [1.0, 1.0, 1.0], "embedding": [5.0, 4.0, 5.0]}

    def test_by_samples(self) -> None:
        found = freezing(self.information, 0.7, "samples")
        sigmoid = [1 / (1 + math.exp(0.7 * x)) for x in (1.0, 0.0, 0.5)]
        assert found["0"] == pytest.approx(sum(sigmoid) / 3, abs=1e-15)
        assert found["embedding"] == pytest.approx((0.5 + 1 / (1 + math.exp(0.7)) + 0.5) / 3, abs=1e-15)

    def test_a_layer_whose_information_is_the_same_for_every_text_is_halved_whatever_it_is(self) -> None:
        assert freezing(self.information, 0.7, "samples")["1"] == 0.5
        assert freezing({"1": [9.0, 9.0]}, 1.2, "samples")["1"] == 0.5

    def test_by_layers(self) -> None:
        found = freezing(self.information, 0.7, "layers")
        assert found["0"] == 0.5  # the most redundant
        assert found["1"] == pytest.approx(1 / (1 + math.exp(0.7 * 1.5)), abs=1e-15)
        assert found["embedding"] == freezing(self.information, 0.7, "samples")["embedding"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": line}) + "\n" for line in TEXTS))
    return file


@pytest.fixture(scope="module")
def activations(llama: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return activations_of(llama / "base", texts, tmp_path_factory.mktemp("activations") / "a.safetensors")


def job(llama: Path, acm: dict[str, Any] | None, method: str = "ties", **more: Any) -> Recipe:
    own = {"weight": 0.5, "density": 0.5} if method == "ties" else {"weight": 0.5}
    table: dict[str, Any] = {
        "merge_method": method,
        "base_model": str(llama / "base"),
        "models": [{"model": str(llama / name), "parameters": own} for name in ("math", "code")],
        **more,
    }
    if acm is not None:
        table["acm"] = acm
    return read_recipe(parse(yaml.safe_dump(table), "recipe.yml"))


def reference(
    base: Path, merged: Path, texts: list[str], layers: tuple[int, ...] = (0, 1, 2)
) -> dict[str, list[float]]:
    """The mutual information with both whole models in memory, as transformers runs them.

    `layers`: the base's layer that each layer of the merged model is compared with.
    """
    models = [AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (base, merged)]
    tokenizer = AutoTokenizer.from_pretrained(base)
    found: dict[str, list[float]] = {}
    for text in texts:
        outputs: list[dict[str, Tensor]] = [{}, {}]
        for model, seen in zip(models, outputs, strict=True):
            parts = {"embedding": model.model.embed_tokens, "norm": model.model.norm, "lm_head": model.lm_head}
            parts |= {str(i): layer.mlp.down_proj for i, layer in enumerate(model.model.layers)}
            hooks = [
                part.register_forward_hook(lambda m, a, y, name=name, seen=seen: seen.__setitem__(name, y))
                for name, part in parts.items()
            ]
            with torch.no_grad():
                model(**tokenizer(text, return_tensors="pt"))
            for hook in hooks:
                hook.remove()
        for name, output in outputs[1].items():
            of_base = str(layers[int(name)]) if name.isdecimal() else name
            found.setdefault(name, []).append(brute_force(outputs[0][of_base], output))
    return found


def kept(folder: Path) -> dict[str, float]:
    """Of each group, from the provenance."""
    groups = json.loads((folder / "lowmem_aim.json").read_text())["acm"]["groups"]
    return {name: group["kept"] for name, group in groups.items()}


def group_of(name: str) -> str:
    if "layers." in name:
        return name.split("layers.")[1].split(".")[0]
    return {"model.embed_tokens.weight": "embedding", "model.norm.weight": "norm", "lm_head.weight": "lm_head"}[name]


class TestRelax:
    @pytest.mark.parametrize("normalise", ["samples", "layers"])
    def test_each_layer_of_a_foreign_merge_keeps_its_share(
        self, normalise: str, llama: Path, texts: Path, tmp_path: Path, run: Run
    ) -> None:
        command = ("relax", llama / "math", tmp_path / "out", "--base", llama / "base", "--with", "acm")
        done = run(*command, "--calibration", texts, "--normalise", normalise, "--theta", 1.5)
        assert done.code == 0, done.err
        out, base, merged = (tensors_in(f) for f in (tmp_path / "out", llama / "base", llama / "math"))
        information = reference(llama / "base", llama / "math", TEXTS)
        shares = {name: 1 - t for name, t in freezing(information, 1.5, normalise).items()}  # type: ignore[arg-type]
        assert kept(tmp_path / "out") == pytest.approx(shares, abs=1e-3)
        exact = kept(tmp_path / "out")
        for name, value in out.items():
            truth = base[name].double() + exact[group_of(name)] * (merged[name].double() - base[name].double())
            assert float((value.double() - truth).abs().max()) < 1e-6, name
        card = (tmp_path / "out" / "README.md").read_text()
        assert "ACM, arXiv 2505.14009" in card
        assert "theta 1.5" in card
        assert "87 tokens in 3 texts" in card

    def test_both_are_aim_and_then_acm_on_its_result(
        self, llama: Path, texts: Path, activations: Path, tmp_path: Path, run: Run
    ) -> None:
        base = ("--base", llama / "base")
        aim = run("relax", llama / "math", tmp_path / "aim", *base, "--calibration", activations, "--omega", 0.2)
        assert aim.code == 0, aim.err
        acm = run("relax", tmp_path / "aim", tmp_path / "then", *base, "--with", "acm", "--calibration", texts)
        assert acm.code == 0, acm.err
        recipe = read_recipe(
            parse(
                yaml.safe_dump(
                    {
                        "merge_method": "passthrough",
                        "base_model": str(llama / "base"),
                        "models": [{"model": str(llama / "math")}],
                        "aim": {"calibration": str(activations), "omega": 0.2},
                        "acm": {"calibration": str(texts)},
                    }
                ),
                "recipe.yml",
            )
        )
        out, then = tensors_in(merge(recipe, tmp_path / "both")), tensors_in(tmp_path / "then")
        assert all(torch.equal(out[name], then[name]) for name in then)
        one = run(
            "relax", llama / "math", tmp_path / "one", *base, "--with", "both", "--calibration", texts, "--omega", 0.2
        )
        assert one.code == 0, one.err
        assert "AIM and ACM" in (tmp_path / "one" / "README.md").read_text()

    def test_a_model_without_a_delta_stays_the_base(self, llama: Path, texts: Path, tmp_path: Path, run: Run) -> None:
        command = ("relax", llama / "base", tmp_path / "out", "--base", llama / "base", "--with", "acm")
        assert run(*command, "--calibration", texts).code == 0
        out, base = tensors_in(tmp_path / "out"), tensors_in(llama / "base")
        assert all(torch.equal(out[name], base[name]) for name in base)

    @pytest.mark.parametrize(
        "architecture", others_long(["qwen2", "gpt2", "mixtral", "gemma2", "opt"], ("qwen2", "gpt2", "mixtral"))
    )
    def test_other_architectures(self, architecture: str, texts: Path, tmp_path: Path, run: Run) -> None:
        base = tiny.build(architecture, tmp_path / "base")
        merged = tiny.perturbed(base, tmp_path / "merged", scale=0.05)
        done = run("relax", merged, tmp_path / "out", "--base", base, "--with", "acm", "--calibration", texts)
        assert done.code == 0, done.err
        shares = kept(tmp_path / "out")
        tied = json.loads((base / "config.json").read_text()).get("tie_word_embeddings", architecture == "opt")
        assert set(shares) == {"embedding", "norm", "0", "1", "2"} | (set() if tied else {"lm_head"})
        assert all(0.5 <= share < 1.0 for share in shares.values())
        out, before, after = (tensors_in(folder) for folder in (tmp_path / "out", base, merged))
        layer = [name for name in out if re.search(r"(layers|h)\.1\.", name) and out[name].is_floating_point()]
        assert len(layer) > 5
        for name in layer:
            truth = before[name].double() + shares["1"] * (after[name].double() - before[name].double())
            assert float((out[name].double() - truth).abs().max()) < 1e-6, name


class TestInARecipe:
    def test_it_is_the_merge_and_then_acm(self, llama: Path, texts: Path, tmp_path: Path, run: Run) -> None:
        merge(job(llama, None), tmp_path / "merged")
        command = ("relax", tmp_path / "merged", tmp_path / "then", "--base", llama / "base", "--with", "acm")
        assert run(*command, "--calibration", texts).code == 0
        out = tensors_in(merge(job(llama, {"calibration": str(texts)}), tmp_path / "out"))
        then = tensors_in(tmp_path / "then")
        assert all(torch.equal(out[name], then[name]) for name in then)
        assert kept(tmp_path / "out") == kept(tmp_path / "then")
        portable = yaml.safe_load((tmp_path / "out" / "mergekit_config.yml").read_text())
        assert portable["acm"] == {"theta": 0.7, "normalise": "samples", "calibration": "texts.jsonl", "samples": 100}

    def test_a_layer_is_compared_with_the_layer_of_the_base_that_it_comes_from(
        self, llama: Path, texts: Path, tmp_path: Path
    ) -> None:
        taken = (1, 2, 0, 2, 2)
        slices = [
            {"sources": [{"model": str(llama / name), "layer_range": [layer, layer + 1]}]}
            for layer, name in zip(taken, ("math", "code", "math", "code", "math"), strict=True)
        ]
        table = {"merge_method": "passthrough", "base_model": str(llama / "base"), "slices": slices}
        plain = merge(read_recipe(tree_of(table, "recipe")), tmp_path / "plain")
        made = merge(read_recipe(tree_of(table | {"acm": {"calibration": str(texts)}}, "recipe")), tmp_path / "out")
        information = reference(llama / "base", plain, TEXTS, taken)
        shares = {name: 1 - t for name, t in freezing(information, 0.7, "samples").items()}
        exact, out, base, merged = kept(made), *(tensors_in(f) for f in (made, llama / "base", plain))
        assert exact == pytest.approx(shares, abs=1e-3)
        for name, value in out.items():
            group = group_of(name)
            own = name.replace(f"layers.{group}.", f"layers.{taken[int(group)]}.") if group.isdecimal() else name
            truth = base[own].double() + exact[group] * (merged[name].double() - base[own].double())
            assert float((value.double() - truth).abs().max()) < 1e-6, name

    @pytest.mark.parametrize("method", others_long(["ties", "della", "widen"], ("ties",)))
    def test_slices_and_a_budget_that_pages_change_no_byte(
        self, method: str, llama: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        recipe = job(llama, {"calibration": str(texts)}, method, dtype="bfloat16")
        merge(recipe, tmp_path / "whole")
        shares_for = comparison.shares_for

        def small(*args: Any, **given: Any) -> Any:
            from dataclasses import replace

            return replace(shares_for(*args, **given), weights=1, ram_states=0)

        monkeypatch.setattr(comparison, "shares_for", small)
        monkeypatch.setattr("lowmem_aim.blocks.shares.SMALLEST_PAGED", 1)
        monkeypatch.setattr("lowmem_aim.merging.merged_weights.ELEMENTS", 33)
        merge(recipe, tmp_path / "small", Options(slice_rows=3, read="pread"))
        assert digests(tmp_path / "small") == digests(tmp_path / "whole")

    def test_interrupted_it_does_not_compare_again(
        self,
        llama: Path,
        texts: Path,
        tmp_path: Path,
        each_tensor: None,
    ) -> None:
        recipe = job(llama, {"calibration": str(texts)})
        merge(recipe, tmp_path / "whole")
        stop(recipe, tmp_path / "out", 7, Options())
        phases: list[Event] = []
        merge(recipe, tmp_path / "out", Options(), phases.append)
        assert [event.phase for event in phases if isinstance(event, PhaseStarted)] == ["merge", "finish"]
        assert digests(tmp_path / "out") == digests(tmp_path / "whole")

    def test_interrupted_while_it_compares_it_starts_again(self, llama: Path, texts: Path, tmp_path: Path) -> None:
        recipe = job(llama, {"calibration": str(texts)})

        def interrupt(event: Event) -> None:
            if isinstance(event, PhaseStarted) and event.phase == "merge":
                raise AssertionError
            if type(event).__name__ == "Advanced":
                raise Stopped

        with pytest.raises(Stopped):
            merge(recipe, tmp_path / "out", Options(), interrupt)
        assert not (tmp_path / "out").exists()
        merge(recipe, tmp_path / "out")
        merge(recipe, tmp_path / "whole")
        assert digests(tmp_path / "out") == digests(tmp_path / "whole")

    def test_each_omega_has_its_own(self, llama: Path, texts: Path, activations: Path, tmp_path: Path) -> None:
        aim = {"omega": [0.1, 1.0], "calibration": str(activations)}
        merge(job(llama, {"calibration": str(texts)}, aim=aim), tmp_path / "out")
        merge(job(llama, {"calibration": str(texts)}, aim=aim | {"omega": 0.1}), tmp_path / "one")
        assert digests(tmp_path / "out" / "omega-0.1") == digests(tmp_path / "one")
        assert kept(tmp_path / "out" / "omega-1") != kept(tmp_path / "one")

    def test_wrong_settings_are_named_with_their_line(self) -> None:
        text = "merge_method: linear\nmodels:\n- {model: a, parameters: {weight: 1}}\nacm:\n"
        with pytest.raises(RecipeError) as caught:
            read_recipe(parse(text + "  theta: -1\n  normalise: all\n  samples: 0\n  tetha: 1\n", "recipe.yml"))
        assert list(caught.value.problems) == [
            "recipe.yml:4:1: `acm` needs a `base_model`: its outputs are what the merge is compared with",
            "recipe.yml:5:3: `acm.theta` must lie in [0, 100], not -1",
            "recipe.yml:6:3: `acm.normalise` must be one of samples, layers, not `all`",
            "recipe.yml:7:3: `acm.samples` must be a whole number above 0, not `0`",
            "recipe.yml:8:3: unknown key `tetha`; did you mean `theta`?",
        ]

    def test_its_texts_are_aims_unless_those_are_activations(self, llama: Path, texts: Path, activations: Path) -> None:
        assert job(llama, {}, aim={"calibration": str(texts)}).acm == Acm(calibration=str(texts))
        assert job(llama, {}, aim={"calibration": str(activations)}).acm == Acm()

    def test_activations_are_no_texts(self, llama: Path, activations: Path, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="must be texts"):
            merge(job(llama, {"calibration": str(activations)}), tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_theta_is_one_number(self) -> None:
        text = "merge_method: slerp\nbase_model: b\nparameters: {t: 0.5}\nmodels:\n- {model: a}\n"
        for theta in ("[0.5, 1]", "[{filter: mlp, value: 1}]"):
            with pytest.raises(RecipeError, match="must be a number"):
                read_recipe(parse(f"{text}acm: {{theta: {theta}}}\n", "recipe.yml"))

    @pytest.mark.parametrize("method", ["sce", "task_arithmetic", "widen"])
    def test_nan_in_an_expert_is_told_as_ever(self, method: str, place: Place, texts: Path) -> None:
        from safetensors.torch import load_file, save_file

        file = place.folder / "math" / "model.safetensors"
        tensors = load_file(file)
        tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = math.nan
        save_file(tensors, file, metadata={"format": "pt"})
        recipe = place.folder / "recipe.yml"
        models = [{"model": str(place.folder / name), "parameters": {"weight": 0.5}} for name in ("math", "code")]
        table = {"merge_method": method, "base_model": str(place.folder / "base"), "models": models}
        recipe.write_text(yaml.safe_dump(table | {"acm": {"calibration": str(texts)}}))
        done = place.run("merge", recipe, place.out)
        place.refused(done, ModelError.exit_code, "`model.layers.1.mlp.up_proj.weight` of `math` holds 1 value")

    def test_threads_count_only_while_it_compares(
        self,
        llama: Path,
        texts: Path,
        tmp_path: Path,
        each_tensor: None,
    ) -> None:
        recipe = job(llama, {"calibration": str(texts)})
        threads = torch.get_num_threads()
        try:
            stop(recipe, tmp_path / "out", 5, Options(threads=2))
            merge(recipe, tmp_path / "out", Options(threads=1))
        finally:
            torch.set_num_threads(threads)

    def test_flags_go_to_whom_they_are_for(self, llama: Path, texts: Path, activations: Path) -> None:
        def read(**flags: Any) -> Recipe:
            return read_recipe(relax_recipe("m", {"base": "b", "expert": (), **flags}))

        alone = read(relaxations="acm", calibration=str(texts), samples=7, calibration_dtype="float32")
        assert (alone.aim, alone.acm) == (None, Acm(calibration=str(texts), samples=7, dtype="float32"))
        both = read(relaxations="both", calibration=str(activations), omega="0.2")
        assert both.aim is not None
        assert (both.aim.calibration, both.acm) == (str(activations), Acm())
        tree = parse(
            "merge_method: slerp\nbase_model: b\nparameters: {t: 1}\nmodels: [{model: a}]\nacm: {theta: 1}\n", "r"
        )
        assert read_recipe(applied(tree, {"calibration": str(texts)})).acm == Acm(theta=1.0, calibration=str(texts))
        with pytest.raises(RecipeError, match="--omega has no meaning without AIM"):
            read(relaxations="acm", omega="0.4")

    def test_flags_of_acm_need_it(self, place: Place, texts: Path) -> None:
        command = ("relax", place.folder / "math", place.out, "--base", place.folder / "base")
        place.refused(
            place.run(*command, "--theta", 1, "--calibration", texts), 2, "--theta has no meaning without ACM"
        )

    def test_outputs_that_are_not_finite_are_told(self, place: Place, texts: Path) -> None:
        from safetensors.torch import load_file, save_file

        file = place.folder / "math" / "model.safetensors"
        tensors = load_file(file)
        tensors["model.layers.1.mlp.down_proj.weight"].fill_(3e38)
        save_file(tensors, file, metadata={"format": "pt"})
        command = ("relax", place.folder / "math", place.out, "--base", place.folder / "base", "--with", "acm")
        done = place.run(*command, "--calibration", texts)
        place.refused(done, ModelError.exit_code, "is NaN, or beyond bfloat16")
