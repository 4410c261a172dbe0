"""`plan --activations`: what it says is what the merge then keeps of each expert; and it writes nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Run
from long_cases import others_long
from merge_cases import recipe
from stopping import SHARDS, Stopped, stopping_after

import lowmem_aim
from lowmem_aim.errors import UsageError
from lowmem_aim.events import Event, Notice, Planned, TensorDone
from lowmem_aim.jobs.merge import merge
from lowmem_aim.jobs.unwritten import effects
from lowmem_aim.measuring import snapshots
from lowmem_aim.merging import loop
from lowmem_aim.output.folder import outputs_in
from lowmem_aim.recipe.recipe import Recipe
from lowmem_aim.solving import kept_states

NAMES = ("math", "code")
TEXTS = {"math": ["two and two are four", "9 + 1 = 10"], "code": ["def f(x): return x + 1"]}
# Names that snapshots, activations and private folders have beside an output: these are the user's.
OWN_FILES = ("calibration-1-0.bin", "solving-a.bin", "activations.safetensors", "journal.sqlite", "run.log")


@pytest.fixture(scope="module")
def with_texts(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The experts, as `--expert` names them with their texts."""
    folder = tmp_path_factory.mktemp("texts")
    for name, lines in TEXTS.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return {name: f"{llama / name}={folder / name}.jsonl" for name in NAMES}


@pytest.fixture
def texts_of_math(with_texts: dict[str, str]) -> str:
    return with_texts["math"].partition("=")[2]


def of(llama: Path, with_texts: dict[str, str], method: str, **flags: Any) -> Recipe:
    return recipe(llama, method, expert=tuple(with_texts.values()), **flags)


def merged(job: Recipe, out: Path) -> list[dict[str, Any]]:
    """The shares that a merge keeps, as `effects` has them: from each lowmem_aim.json, and from its tensors' events."""
    events: list[Event] = []
    merge(job, out, emit=events.append)
    found = []
    for folder in outputs_in(out):
        name = "" if folder == out else folder.name
        told = [event for event in events if isinstance(event, TensorDone) and event.output == name and event.effects]
        tensors = {
            event.name: [None if share is None else round(share, 4) for share in event.effects or ()] for event in told
        }
        facts = json.loads((folder / "lowmem_aim.json").read_text())["effects"]
        found.append({"output": name, "experts": facts, "tensors": tensors})
    return found


FLAGS: dict[str, dict[str, Any]] = {
    "ties": {"density": ("0.5",)},
    "covariance": {},
    "regmean": {},
    "regmean_plus": {},
    "task_arithmetic": {"weight": ("solved",)},
}


@pytest.mark.parametrize("method", others_long(FLAGS, ("ties", "regmean_plus")))
def test_what_is_told_is_what_the_merge_keeps(
    method: str, llama: Path, with_texts: dict[str, str], texts_of_math: str, tmp_path: Path
) -> None:
    """A recipe of two outputs: one relaxed by AIM, one not, its omega being 1."""
    aim = {"omega": "0.4,1", "calibration": texts_of_math, "samples": 2}
    job = of(llama, with_texts, method, **FLAGS[method], **aim)
    told = effects(job, tmp_path / "out")
    assert [one["output"] for one in told] == ["omega-0.4", "omega-1"]
    assert [expert["model"] for expert in told[0]["experts"]] == list(NAMES)
    assert told[0]["experts"] != told[1]["experts"]
    assert list(told) == merged(job, tmp_path / "out")


@pytest.mark.long
def test_it_is_the_same_with_acm(llama: Path, with_texts: dict[str, str], texts_of_math: str, tmp_path: Path) -> None:
    table = yaml.safe_dump(
        {
            "merge_method": "linear",
            "base_model": str(llama / "base"),
            "models": [
                {"model": own.partition("=")[0], "calibration": own.partition("=")[2], "parameters": {"weight": 0.5}}
                for own in with_texts.values()
            ],
            "acm": {"calibration": texts_of_math, "samples": 2},
        }
    )
    job = lowmem_aim.read_recipe(table)
    told = effects(job, tmp_path / "out")
    plain = effects(replace(job, acm=None), tmp_path / "plain")
    assert told != plain
    assert list(told) == merged(job, tmp_path / "out")


def test_nothing_is_left_however_it_ends(
    llama: Path, with_texts: dict[str, str], texts_of_math: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Matrices and hidden states do not fit in memory, and a merge would keep snapshots of these."""
    spilled: list[Path | None] = []

    class InAFile(loop.TensorStore):
        def __init__(self, *args: Any, ram_bytes: int, folder: Path | None, **rest: Any) -> None:
            spilled.append(folder)
            super().__init__(*args, ram_bytes=0, folder=folder, **rest)

    monkeypatch.setattr(loop, "TensorStore", InAFile)
    for module in (snapshots, kept_states):
        monkeypatch.setattr(module, "SECONDS", 0.0)
    for name in OWN_FILES:
        (tmp_path / name).write_text("mine")
    job = of(llama, with_texts, "regmean", omega="0.4", calibration=texts_of_math, samples=2)
    seen = set[tuple[str, ...]]()

    def emit(event: Event) -> None:
        seen.add(tuple(sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))))

    effects(job, tmp_path / "new" / "out", emit=emit)
    with pytest.raises(Stopped):
        effects(job, tmp_path / "new" / "out", emit=stopping_after(10))
    assert seen == {tuple(sorted(OWN_FILES))}, "whatever kills it, and whenever"
    assert {(tmp_path / name).read_text() for name in OWN_FILES} == {"mine"}
    assert spilled == [tmp_path, tmp_path]


def test_an_output_that_is_begun_or_finished_stays_as_it_is(
    llama: Path, with_texts: dict[str, str], tmp_path: Path
) -> None:
    job, out = of(llama, with_texts, "ties"), tmp_path / "out"
    expected = effects(job, tmp_path / "other")
    with pytest.raises(Stopped):
        merge(job, out, SHARDS, stopping_after(20))
    begun = contents(out)
    assert effects(job, out, SHARDS) == expected
    assert contents(out) == begun
    merge(job, out, SHARDS)
    finished = contents(out)
    assert effects(job, out, SHARDS) == expected
    assert contents(out) == finished


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class TestTheCommand:
    def arguments(self, llama: Path, with_texts: dict[str, str], out: Path) -> list[object]:
        experts = [word for own in with_texts.values() for word in ("--expert", own)]
        return [out, "--method", "ties", "--base", llama / "base", *experts, "--density", "0.5", "--no-measure"]

    def test_it_prints_the_plan_and_then_the_shares_by_layer(
        self, llama: Path, with_texts: dict[str, str], tmp_path: Path, run: Run
    ) -> None:
        arguments = self.arguments(llama, with_texts, tmp_path / "out")
        plain = run("plan", *arguments)
        done = run("plan", *arguments, "--activations")
        assert (plain.code, done.code) == (0, 0), done.err
        budget = ("RAM ", "disk ")  # what is free differs from moment to moment
        before, after = (
            [line for line in told.splitlines() if not line.startswith(budget)] for told in (plain.out, done.out)
        )
        assert after[: len(before)] == before
        heading, names, in_all, *layers = after[len(before) :]
        assert "kept of each expert's effect on its own texts" in heading
        assert names.split() == ["layer", *NAMES]
        [kept] = effects(of(llama, with_texts, "ties", density=("0.5",)), tmp_path / "out")
        assert in_all.split()[2:] == [f"{expert['kept']:.1%}" for expert in kept["experts"]]
        assert [line.split() for line in layers] == [
            [layer, *(f"{expert['layers'][layer]:.1%}" for expert in kept["experts"])] for layer in ("0", "1", "2")
        ]
        assert "merge: " in done.err
        assert "finished in" in done.err
        assert not (tmp_path / "out").exists()

    def test_json_is_one_value(self, llama: Path, with_texts: dict[str, str], tmp_path: Path, run: Run) -> None:
        done = run("plan", *self.arguments(llama, with_texts, tmp_path / "out"), "--activations", "--json")
        assert done.code == 0, done.err
        found = json.loads(done.out)
        assert found["plan"] == 1
        told = effects(of(llama, with_texts, "ties", density=("0.5",)), tmp_path / "out")
        assert found["effects"] == list(told)
        tensors = found["effects"][0]["tensors"]
        assert all(len(shares) == len(found["survey"]["experts"]) for shares in tensors.values())
        assert len(tensors) > 10

    def test_each_notice_is_told_once(self, llama: Path, with_texts: dict[str, str], tmp_path: Path, run: Run) -> None:
        (tmp_path / "long.jsonl").write_text(json.dumps({"text": "a b c " * 200}) + "\n")
        experts = [word for name in NAMES for word in ("--expert", f"{llama / name}={tmp_path / 'long.jsonl'}")]
        arguments = ["--method", "ties", "--base", llama / "base", *experts, "--no-measure"]
        done = run("plan", tmp_path / "out", *arguments, "--activations")
        assert done.code == 0, done.err
        notices = [line for line in done.err.splitlines() if "allows no more" in line]
        assert notices
        assert len(notices) == len(set(notices))

    def test_what_the_merge_refuses_is_refused_before_anything_is_run(
        self, llama: Path, with_texts: dict[str, str], tmp_path: Path, run: Run
    ) -> None:
        arguments = self.arguments(llama, with_texts, tmp_path / "out")
        done = run("plan", *arguments, "--activations", "--ram", "1MB")
        assert done.code == 5
        assert "merge: " not in done.err


REFUSED = [
    ({}, ["the recipe names none"]),
    ({"base_model": None, "merge_method": "linear"}, ["the recipe names none", "the recipe has no `base_model`"]),
    ({"models": [{"model": "no-such-model", "parameters": {"weight": 1}}]}, ["the recipe names none", "no-such-model"]),
]


@pytest.mark.parametrize(("changed", "told"), REFUSED)
def test_without_texts_of_experts_it_is_refused_with_all_that_is_wrong(
    changed: dict[str, Any], told: list[str], llama: Path, tmp_path: Path, run: Run
) -> None:
    models = [{"model": str(llama / name), "parameters": {"weight": 0.5}} for name in NAMES]
    table = {"merge_method": "ties", "base_model": str(llama / "base"), "models": models, **changed}
    table = {key: value for key, value in table.items() if value is not None}
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(table))
    done = run("plan", tmp_path / "recipe.yml", tmp_path / "out", "--activations")
    assert done.code == 2
    assert all(text in done.err for text in told), done.err
    assert all(text in done.err for text in ("`calibration: texts.jsonl`", "`--expert", "`--solve-calibration"))
    assert done.out == ""
    with pytest.raises(UsageError, match="names none"):
        lowmem_aim.plan(table, tmp_path / "out", activations=True)


def test_a_recipe_with_named_stages_is_refused(llama: Path, tmp_path: Path) -> None:
    experts = [{"model": str(llama / name), "parameters": {"weight": 0.5}} for name in NAMES]
    first = {"name": "first", "merge_method": "linear", "models": experts}
    last = {"merge_method": "ties", "base_model": str(llama / "base"), "models": [{"model": "first"}]}
    last["parameters"] = {"weight": 1.0}
    with pytest.raises(UsageError, match="named stages"):
        lowmem_aim.plan([first, last], tmp_path / "out", activations=True)


def test_python_has_the_same(llama: Path, with_texts: dict[str, str], tmp_path: Path) -> None:
    events: list[Event] = []
    job = of(llama, with_texts, "regmean")
    forecast = lowmem_aim.plan(job, tmp_path / "out", on_event=events.append, measure=False, activations=True)
    assert forecast.effects == effects(job, tmp_path / "out")
    assert not lowmem_aim.plan(job, tmp_path / "out", measure=False).effects
    [planned] = [event for event in events if isinstance(event, Planned)]
    assert planned.phases == ("merge",)
    notices = [event for event in events if isinstance(event, Notice)]
    assert len(notices) == len(set(notices))
