"""Merges that are solved from texts, against computations on whole models in memory; and always the same bytes."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import solving_cases as cases
import tiny
import torch
import vocabularies
from long_cases import others_long
from merge_cases import digests, tensors_in
from moment_cases import by_an_ordinary_forward, seen
from stopping import SHARDS, stop
from text_merges import NAMES, TEXTS, WEIGHT, job, models
from torch import Tensor
from transformers import AutoModelForCausalLM

from lowmem_aim.errors import ModelError, RecipeError, ResumeError
from lowmem_aim.events import Event, Notice, TensorDone
from lowmem_aim.jobs import plan as planning
from lowmem_aim.jobs.merge import merge
from lowmem_aim.merging import effects
from lowmem_aim.merging.given import Given
from lowmem_aim.methods import moments as tiles
from lowmem_aim.methods import solved
from lowmem_aim.methods.moments import MatrixSpace
from lowmem_aim.recipe.from_flags import applied, empty_recipe
from lowmem_aim.recipe.reader import read_recipe
from lowmem_aim.solving import input_moments, kept_states
from lowmem_aim.system.options import Options

TURNED = {"gpt2": r"\.c_\w+\.weight"}


@pytest.fixture(autouse=True)
def _many_small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (tiles, solved):
        monkeypatch.setattr(module, "TILE", 24)
    monkeypatch.setattr(input_moments, "ROWS", 16)


@pytest.fixture(scope="module")
def llama_with_texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models("llama", tmp_path_factory.mktemp("llama"))


def tokens(texts: Sequence[str]) -> list[Tensor]:
    return [torch.tensor(tiny.tokenizer()(text)["input_ids"]) for text in texts]


def assert_solved(
    architecture: str, folder: Path, ours: Mapping[str, Tensor], moments: Sequence[Mapping[str, Tensor]]
) -> int:
    """Assert that linears with moments are as the formula says, and all else is the mean; return their number."""
    own, *others = (tensors_in(folder / name) for name in ("base", *NAMES))
    found = 0
    for name, merged in ours.items():
        deltas = [other[name].double() - own[name].double() for other in others]
        truth = solved_delta(architecture, name, deltas, [table.get(name) for table in moments])
        found += any(name in table for table in moments)
        error = merged.double() - own[name].double() - truth
        assert float(error.norm()) <= 1e-4 * float(truth.norm()), name
    return found


def solved_delta(architecture: str, name: str, deltas: Sequence[Tensor], moments: Sequence[Tensor | None]) -> Tensor:
    if all(moment is None for moment in moments):
        return (WEIGHT[0] * deltas[0] + WEIGHT[1] * deltas[1]) / sum(WEIGHT)
    turned = architecture in TURNED and re.search(TURNED[architecture], name) is not None
    matrices = [delta.T if turned else delta for delta in deltas]
    found = cases.regmean_of_moments(matrices, moments, WEIGHT)
    return found.T if turned else found


@pytest.mark.parametrize(
    "architecture",
    others_long(
        ("llama", "gpt2", "qwen3", "gemma3_text", "mixtral", "qwen2_moe", "qwen3_moe"), ("llama", "gpt2", "qwen3_moe")
    ),
)
def test_regmean_solves_every_linear_by_the_inputs_of_each_expert(architecture: str, tmp_path: Path) -> None:
    folder = models(architecture, tmp_path)
    ours = tensors_in(merge(job(folder, "regmean"), tmp_path / "out"))
    moments = [by_an_ordinary_forward(folder / name, tokens(TEXTS[name])) for name in NAMES]
    assert assert_solved(architecture, folder, ours, moments) >= 4 * tiny.LAYERS


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_regmean_plus_feeds_each_block_what_the_merged_blocks_make(architecture: str, tmp_path: Path) -> None:
    folder = models(architecture, tmp_path)
    ours = tensors_in(merge(job(folder, "regmean_plus"), tmp_path / "out"))
    moments = by_merged_blocks(architecture, folder)
    assert assert_solved(architecture, folder, ours, moments) >= 4 * tiny.LAYERS
    plain = tensors_in(merge(job(folder, "regmean"), tmp_path / "plain"))
    assert any(not torch.equal(plain[name], ours[name]) for name in ours)


def test_texts_go_through_the_very_rows_that_are_merged_which_are_solved_once(
    llama_with_texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = {"omega": "0.1,1", "calibration": str(llama_with_texts / "math.jsonl")}
    begun, init = list[str](), solved.Solution.__init__

    def counted(solution: solved.Solution, goal: solved.Goal, space: MatrixSpace, name: str) -> None:
        begun.append(name)
        init(solution, goal, space, name)

    monkeypatch.setattr(solved.Solution, "__init__", counted)
    once = merge(job(llama_with_texts, "regmean_plus", **flags), tmp_path / "once")
    assert len(begun) == len(set(begun)) > 0
    monkeypatch.setattr(Given, "taker", lambda given, task: None)
    again = merge(job(llama_with_texts, "regmean_plus", **flags), tmp_path / "again")
    assert digests(once) == digests(again)
    assert len(begun) > 2 * len(set(begun))


def test_experts_of_several_dtypes_each_run_beside_the_merged_blocks_in_their_own(tmp_path: Path) -> None:
    folder = models("llama", tmp_path)
    plain = tensors_in(merge(job(folder, "regmean_plus"), tmp_path / "plain"))

    def halve(tensors: dict[str, Tensor]) -> None:
        tensors.update({name: value.to(torch.bfloat16) for name, value in tensors.items()})

    tiny.edit_tensors(folder / "code", halve)
    tiny.edit_config(folder / "code", dtype="bfloat16")
    mixed = tensors_in(merge(job(folder, "regmean_plus"), tmp_path / "mixed"))
    for name, value in plain.items():
        assert float((mixed[name] - value).norm()) <= 0.02 * float(value.norm()), name


def test_regmean_plus_takes_only_texts_whose_tokens_have_the_same_ids_in_the_merged_model(tmp_path: Path) -> None:
    folder = models("llama", tmp_path)
    plus = partial(job, folder, "regmean_plus", tokenizer_source="base")
    expected = tensors_in(merge(plus(), tmp_path / "expected"))
    vocabularies.add_tokens(folder / "code", ["<|new|>"], padding=3)  # which no text has
    found = tensors_in(merge(plus(), tmp_path / "more"))
    assert all(torch.equal(found[name], value) for name, value in expected.items() if name not in vocabularies.ROWS)
    (folder / "math.jsonl").write_text(json.dumps({"text": "HELP! 1 + 1 = 2 #'() %&"}))  # tokens of the swapped ones
    vocabularies.swap_tokens(folder / "math", 40)
    vocabularies.permute_rows(folder / "math", 40)
    with pytest.raises(ModelError, match="other ids for those of `math`"):
        merge(plus(), tmp_path / "swapped")
    merge(job(folder, "regmean", tokenizer_source="base"), tmp_path / "own")


def by_merged_blocks(architecture: str, folder: Path) -> list[dict[str, Tensor]]:
    """The moments of RegMean++: whole models, and a merged one that is filled block by block."""
    base, *experts = (
        AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32).eval() for name in ("base", *NAMES)
    )
    merged = copy.deepcopy(base)
    names = {id(value): name for name, value in merged.named_parameters()}
    prefix = "transformer.h" if architecture == "gpt2" else "model.layers"
    found: list[dict[str, Tensor]] = [{} for _ in experts]

    def fill(parameters: Any) -> None:
        for value in parameters:
            name = names[id(value)]
            own = dict(base.named_parameters())[name].double()
            deltas = [dict(expert.named_parameters())[name].double() - own for expert in experts]
            value.copy_(own + solved_delta(architecture, name, deltas, [table.get(name) for table in found]))

    with torch.no_grad():
        fill(value for name, value in merged.named_parameters() if not name.startswith(prefix))
        for index in range(tiny.LAYERS):
            for number, (expert, name) in enumerate(zip(experts, NAMES, strict=True)):
                with seen(expert) as moments:
                    for text in tokens(TEXTS[name]):
                        args, kwargs = call_of(merged, merged.get_submodule(f"{prefix}.{index}"), text)
                        expert.get_submodule(f"{prefix}.{index}")(*args, **kwargs)
                found[number] |= moments
            fill(merged.get_submodule(f"{prefix}.{index}").parameters())
    return found


def call_of(model: Any, block: Any, text: Tensor) -> tuple[Any, Any]:
    """What a block is called with when the model reads a text."""
    calls = []
    handle = block.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    model(text[None], use_cache=False)
    handle.remove()
    return calls[0]


@pytest.mark.parametrize("method", ["regmean", "regmean_plus"])
@pytest.mark.parametrize("tensors", others_long((4, 12, 24), (12,)))
def test_an_interrupted_merge_ends_with_the_same_bytes(
    llama_with_texts: Path, tmp_path: Path, method: str, tensors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_states, "SECONDS", 0.0)
    recipe = job(llama_with_texts, method)
    merge(recipe, tmp_path / "whole", SHARDS)
    stop(recipe, tmp_path / "out", tensors)
    merge(recipe, tmp_path / "out", SHARDS)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_budgets_and_read_mode_change_no_byte(
    llama_with_texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lowmem_aim.merging import loop

    given: list[int] = []

    class Less(loop.TensorStore):
        def __init__(self, device: torch.device, *, ram_bytes: int, **rest: Any) -> None:
            given.append(ram_bytes)
            super().__init__(device, ram_bytes=ram_bytes * (2 - len(given) % 3) // 2, **rest)  # a half, none, all

    monkeypatch.setattr(loop, "TensorStore", Less)
    made = [
        digests(merge(job(llama_with_texts, "regmean"), tmp_path / read, Options(read=read)))  # type: ignore[arg-type]
        for read in ("mmap", "pread")
    ]
    made.append(digests(merge(job(llama_with_texts, "regmean"), tmp_path / "third")))
    assert made[0] == made[1] == made[2]
    assert min(given) > 10_000


def test_several_omegas_share_the_texts(llama_with_texts: Path, tmp_path: Path) -> None:
    texts = str(llama_with_texts / "math.jsonl")
    for method in ("regmean", "regmean_plus"):
        flags = {"omega": "0.4,1", "calibration": texts, "samples": 2}
        merge(job(llama_with_texts, method, **flags), tmp_path / method)
        plain = tensors_in(merge(job(llama_with_texts, method), tmp_path / f"{method}-plain"))
        kept, relaxed = (tensors_in(tmp_path / method / f"omega-{omega}") for omega in ("1", "0.4"))
        assert all(torch.equal(kept[name], value) for name, value in plain.items())
        assert any(not torch.equal(relaxed[name], value) for name, value in plain.items())


def test_the_output_says_which_texts_it_was_made_with(llama_with_texts: Path, tmp_path: Path) -> None:
    merge(job(llama_with_texts, "regmean"), tmp_path / "out")
    facts = json.loads((tmp_path / "out" / "lowmem_aim.json").read_text())
    assert [model["calibration"] for model in facts["recipe"]["models"]] == ["math.jsonl", "code.jsonl"]
    assert facts["recipe"]["solve"] == {"samples": 64, "block_size": 512, "seed": 42, "pack": False}


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"expert": ("a", "b")}, r"`regmean` needs texts of `a`, `b`"),
        ({"expert": ("a", "b"), "solve_calibration": "x.safetensors"}, "holds activations"),
        ({"expert": ("a=x.jsonl", "b"), "method": "ties"}, "what is kept of each expert needs texts of `b`"),
        ({"expert": ("a=x.jsonl",), "method": "linear", "base": None}, "needs a `base_model`"),
    ],
)
def test_texts_that_are_missing_or_idle_are_told_before_work(
    llama_with_texts: Path, flags: dict[str, Any], told: str
) -> None:
    given = {"method": "regmean", "base": "base", "expert": ("a=x.jsonl",), "weight": ("1",)}
    with pytest.raises(RecipeError, match=told):
        read_recipe(applied(empty_recipe(), given | flags))


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"expert": ("a=x.jsonl", "b=y.jsonl")}, []),
        ({"expert": ("a=x.jsonl", "b"), "solve_calibration": "z.jsonl"}, ["`b` has no texts of its own, and"]),
        ({"expert": ("a=x.jsonl", "b=x.jsonl", "c=y.jsonl")}, ["2 experts have the same texts, `x.jsonl`"]),
    ],
)
def test_texts_that_are_nobodys_own_are_told(flags: dict[str, Any], told: list[str]) -> None:
    recipe = read_recipe(applied(empty_recipe(), {"method": "regmean", "base": "base"} | flags))
    assert [notice for text in told for notice in recipe.notices if text in notice] == list(recipe.notices)
    assert all("hardly more than an average" in notice for notice in recipe.notices)
    assert len(recipe.notices) == len(told)


def test_a_file_of_texts_that_is_not_there_is_told_before_work(llama_with_texts: Path, tmp_path: Path) -> None:
    folder = llama_with_texts
    experts = (f"{folder / 'math'}={tmp_path / 'none.jsonl'}", f"{folder / 'code'}={folder / 'code'}.jsonl")
    with pytest.raises(ModelError, match=r"none\.jsonl"):
        merge(job(folder, "regmean", expert=experts), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("architecture", "method"),
    others_long(
        (("llama", "ties"), ("gpt2", "regmean"), ("llama", "regmean"), ("gpt2", "ties")),
        (("llama", "ties"), ("gpt2", "regmean")),
    ),
)
def test_what_a_merge_keeps_of_each_expert_is_told(
    architecture: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(effects, "SAMPLED", 1000)  # all outputs
    folder = models(architecture, tmp_path)
    events: list[Event] = []
    out = merge(
        job(folder, method, omega="0.7", calibration=str(folder / "math.jsonl")),
        tmp_path / "out",
        Options(),
        events.append,
    )
    ours, base = tensors_in(out), tensors_in(folder / "base")
    told = {event.name: event.effects for event in events if isinstance(event, TensorDone)}
    moments = [by_an_ordinary_forward(folder / name, tokens(TEXTS[name])) for name in NAMES]
    shares: dict[str, list[float]] = {name: [] for name in NAMES}
    for name in moments[0]:
        turned = architecture in TURNED
        for expert, table in zip(NAMES, moments, strict=True):
            own = tensors_in(folder / expert)[name].double() - base[name].double()
            lost = own - (ours[name].double() - base[name].double())
            own, lost = (x.T if turned else x for x in (own, lost))
            share = 1 - float((lost @ table[name] * lost).sum() / (own @ table[name] * own).sum())
            shares[expert].append(share)
        found = told[name]
        assert found is not None
        assert [round(share or 0.0, 3) for share in found] == [round(own[-1], 3) for own in shares.values()], name
    facts = json.loads((out / "lowmem_aim.json").read_text())["effects"]
    assert [one["model"] for one in facts] == list(NAMES)
    for one, own in zip(facts, shares.values(), strict=True):
        assert abs(one["kept"] - sum(own) / len(own)) < 1e-3
        assert list(one["layers"]) == ["0", "1", "2"]
    assert "## What is kept of each expert" in (out / "README.md").read_text()
    plain = job(folder, method, omega="0.7", calibration=str(folder / "math.jsonl"))
    if method == "ties":  # measuring changes nothing
        without = tensors_in(merge(replace(plain, solve=None), tmp_path / "without"))
        assert all(torch.equal(without[name], value) for name, value in ours.items())


def test_a_method_without_a_base_is_told_of_too(llama_with_texts: Path, tmp_path: Path) -> None:
    out = merge(
        job(
            llama_with_texts,
            "linear",
            expert=tuple(f"{llama_with_texts / name}={llama_with_texts / name}.jsonl" for name in NAMES),
        ),
        tmp_path / "out",
    )
    facts = json.loads((out / "lowmem_aim.json").read_text())["effects"]
    assert all(0.0 < one["kept"] < 1.0 for one in facts)


def test_what_is_kept_is_the_same_for_every_slice_and_kill(
    llama_with_texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(effects, "SAMPLED", 11)
    ties = job(llama_with_texts, "ties", density=("0.5",))
    whole = digests(merge(ties, tmp_path / "whole", SHARDS))
    assert digests(merge(ties, tmp_path / "rows", replace(SHARDS, slice_rows=3))) == whole
    stop(ties, tmp_path / "out", 15)
    assert digests(merge(ties, tmp_path / "out", SHARDS)) == whole


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3_moe"])
def test_weights_are_solved_in_the_space_of_outputs(architecture: str, tmp_path: Path) -> None:
    folder = models(architecture, tmp_path)
    ours = tensors_in(merge(job(folder, "task_arithmetic", weight=("solved",)), tmp_path / "out"))
    moments = [by_an_ordinary_forward(folder / name, tokens(TEXTS[name])) for name in NAMES]
    own, *others = (tensors_in(folder / name) for name in ("base", *NAMES))
    for name, merged in ours.items():
        deltas = [other[name].double() - own[name].double() for other in others]
        turned = architecture in TURNED and re.search(TURNED[architecture], name) is not None
        shares = coefficients([d.T if turned else d for d in deltas], [table.get(name) for table in moments])
        error = merged.double() - own[name].double() - shares[0] * deltas[0] - shares[1] * deltas[1]
        assert float(error.norm()) <= 1e-4 * float((deltas[0] + deltas[1]).norm()), name


def coefficients(deltas: Sequence[Tensor], moments: Sequence[Tensor | None]) -> list[float]:
    """The least squares over both experts' outputs, in float64; the mean without any."""
    left, right = torch.zeros(2, 2).double(), torch.zeros(2).double()
    for i, moment in enumerate(moments):
        if moment is not None:
            whole = (deltas[i] @ moment * deltas[i]).sum()
            for j in range(2):
                right[j] += (deltas[j] @ moment * deltas[i]).sum() / whole
                for k in range(2):
                    left[j, k] += (deltas[j] @ moment * deltas[k]).sum() / whole
    if not left.any():
        return [0.5, 0.5]
    found: list[float] = torch.linalg.solve(left + 1e-4 * left.diagonal().mean() * torch.eye(2), right).tolist()
    return found


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"expert": ("a", "b")}, "`task_arithmetic` needs texts"),
        ({"method": "ties"}, "must be a finite number"),
        ({"weight": ("solve",)}, "a finite number, or `solved`"),
    ],
)
def test_solved_weights_that_cannot_be_are_told(llama_with_texts: Path, flags: dict[str, Any], told: str) -> None:
    given = {"method": "task_arithmetic", "base": "base", "expert": ("a=x.jsonl", "b=y.jsonl"), "weight": ("solved",)}
    with pytest.raises(RecipeError, match=told):
        read_recipe(applied(empty_recipe(), given | flags))


def test_the_plan_counts_what_solving_and_running_texts_take(
    llama_with_texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "MEASURED_SECONDS", 0.05)
    counted = {}
    for method in ("regmean", "regmean_plus", "ties"):
        forecast = planning.plan(job(llama_with_texts, method), tmp_path / method)
        assert [step.phase for step in forecast.steps] == ["texts", "merge"]
        told = [re.search(r"solving takes (\S+) operations, here ", note) for note in forecast.notes]
        counted[method] = [float(found[1]) for found in told if found]
    assert counted["ties"] == []
    assert counted["regmean"] == counted["regmean_plus"] != []


def test_weights_are_solved_for_all_models_or_none(llama_with_texts: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="for all models of a tensor, or for none"):
        merge(job(llama_with_texts, "task_arithmetic", weight=("solved", "1")), tmp_path / "out")


def test_systems_that_are_singular_are_told_in_the_card(llama_with_texts: Path, tmp_path: Path) -> None:
    notices: list[str] = []

    def emit(event: Event) -> None:
        if isinstance(event, Notice):
            notices.append(event.text)

    short = tmp_path / "short.jsonl"
    short.write_text(json.dumps({"text": "a" * 20}) + "\n")  # the first inputs are all the same
    experts = tuple(f"{llama_with_texts / name}={short}" for name in NAMES)
    flags = {"parameter": ("shrink=1", "ridge=0"), "expert": experts}
    out = merge(job(llama_with_texts, "regmean", **flags), tmp_path / "out", Options(), emit)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert any(name in text and "singular" in text for text in notices)
    facts = json.loads((out / "lowmem_aim.json").read_text())["singular"]
    assert name in {one["tensor"] for one in facts}
    assert f"| `{name}` | `solved with a ridge of" in (out / "README.md").read_text()


def test_other_texts_are_told_on_resuming(llama_with_texts: Path, tmp_path: Path) -> None:
    stop(job(llama_with_texts, "regmean"), tmp_path / "out", 20)
    other = tmp_path / "math.jsonl"
    other.write_text(json.dumps({"text": "other texts than those before"}) + "\n")
    math, code = (llama_with_texts / name for name in NAMES)
    experts = (f"{math}={other}", f"{code}={code}.jsonl")
    with pytest.raises(ResumeError, match="the texts of the experts have changed"):
        merge(job(llama_with_texts, "regmean", expert=experts), tmp_path / "out", SHARDS)


def test_another_number_of_threads_is_refused_on_resuming(llama_with_texts: Path, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        stop(job(llama_with_texts, "regmean"), tmp_path / "out", 20, replace(SHARDS, threads=1))
        with pytest.raises(ResumeError, match="threads of solving"):
            merge(job(llama_with_texts, "regmean"), tmp_path / "out", replace(SHARDS, threads=2))
    finally:
        torch.set_num_threads(before)
