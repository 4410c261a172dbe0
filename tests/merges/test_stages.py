"""A recipe of several documents: its named stages are made first, and give what each would give by hand."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from adapters import factors, shapes_of, write
from conftest import Run
from long_cases import others_long
from merge_cases import digests, tensors_in
from stopping import SHARDS, Stopped, stop, stopping_after

import lowmem_aim
from lowmem_aim.errors import DiskError, LowmemAimError, RecipeError, ResumeError
from lowmem_aim.events import Event, Notice, PhaseStarted, Planned
from lowmem_aim.jobs import merge as merge_job
from lowmem_aim.jobs.merge import merge
from lowmem_aim.jobs.plan import plan
from lowmem_aim.output.folder import PRIVATE, SMALL_FILES_BYTES, is_finished, stage_folder, stages_in
from lowmem_aim.output.verify import verify_outputs
from lowmem_aim.recipe.recipe import Recipe
from lowmem_aim.system.options import Options
from lowmem_aim.view.record import runs_in
from lowmem_aim.view.status import status_of

Document = dict[str, Any]


def three(folder: Path) -> list[Document]:
    """Three stages of the models in `folder`: the third uses both others, the second the first."""
    base, math, code, chat = (str(folder / name) for name in ("base", "math", "code", "chat"))
    return [
        {
            "name": "first",
            "merge_method": "linear",
            "models": [{"model": name, "parameters": {"weight": 0.5}} for name in (math, code)],
        },
        {
            "name": "second",
            "merge_method": "dare_ties",
            "base_model": base,
            "models": [{"model": name, "parameters": {"weight": 0.5, "density": 0.6}} for name in ("first", chat)],
        },
        {
            "merge_method": "slerp",
            "base_model": "first",
            "models": [{"model": "second"}],
            "parameters": {"t": [0.2, 0.8]},
        },
    ]


def two(folder: Path) -> list[Document]:
    first = three(folder)[0]
    return [first, {"merge_method": "passthrough", "models": [{"model": "first"}], "parameters": {"scale": 0.5}}]


def by_hand(documents: Sequence[Document], place: Path, options: Options = SHARDS) -> Path:
    """Make the stages one by one in folders of `place` that have their names; returns the last one's."""
    names = [document.get("name", "last") for document in documents]

    def placed(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: placed(item) for key, item in value.items() if key != "name"}
        if isinstance(value, list):
            return [placed(item) for item in value]
        is_named = isinstance(value, str) and value.partition("+")[0] in names
        return str(place / value) if is_named else value

    for name, document in zip(names, documents, strict=True):
        merge(lowmem_aim.read_recipe(placed(document)), place / name, options)
    return place / names[-1]


def model_of(out: Path) -> dict[str, str]:
    """Digests of the files that a loader reads: of a card and the like, several documents say more than one."""
    told = {"README.md", "lowmem_aim.json", "mergekit_config.yml"}
    return {name: digest for name, digest in digests(out).items() if name not in told}


def seen_in(job: Recipe, out: Path, options: Options = SHARDS) -> list[Event]:
    """The events of a merge that comes to its end."""
    events: list[Event] = []
    merge(job, out, options, events.append)
    return events


def phases_of(events: Sequence[Event]) -> list[str]:
    return [event.label for event in events if isinstance(event, PhaseStarted)]


# --- what comes out ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("documents", others_long([two, three], (three,)))
def test_stages_give_what_each_of_them_gives_by_hand(documents: Any, llama: Path, tmp_path: Path) -> None:
    hand = by_hand(documents(llama), tmp_path / "hand")
    kept = tmp_path / "kept"
    out = merge(lowmem_aim.read_recipe(documents(llama)), tmp_path / "out", replace(SHARDS, keep_stages=kept))
    assert model_of(out) == model_of(hand)
    assert len([name for name in model_of(out) if name.endswith(".safetensors")]) > 1
    assert digests(kept / "first") == digests(tmp_path / "hand" / "first")  # all of its files: it is made of no other
    for stage in kept.iterdir():
        verify_outputs(stage)
        assert model_of(stage) == model_of(tmp_path / "hand" / stage.name)
    assert not stages_in(out)
    verify_outputs(out)


def test_an_adapter_may_be_added_to_a_stage(llama: Path, tmp_path: Path) -> None:
    shapes = shapes_of(llama / "base", "q_proj", "down_proj")
    adapter = write(tmp_path / "adapter", factors(shapes, seed=1))
    last = {"merge_method": "passthrough", "models": [{"model": {"model": "first", "lora": str(adapter)}}]}
    plain = [three(llama)[0], {**last, "models": [{"model": f"first+{adapter}"}]}]
    job = lowmem_aim.read_recipe([plain[0], last])
    assert plan(job, tmp_path / "out", SHARDS, measure=False).fits
    out = merge(job, tmp_path / "out", SHARDS)
    assert model_of(out) == model_of(by_hand(plain, tmp_path / "hand"))
    assert not phases_of(seen_in(job, out))
    write(adapter, factors(shapes, seed=2))
    with pytest.raises(ResumeError, match=r"`first\+adapter` no longer has the same"):
        merge(job, out, SHARDS)


def test_a_stage_may_give_the_tokenizer_alone(llama: Path, tmp_path: Path) -> None:
    last = {"merge_method": "passthrough", "models": [{"model": str(llama / "chat")}], "tokenizer_source": "first"}
    documents = [{**three(llama)[0], "tokenizer_source": "union"}, last]
    job = lowmem_aim.read_recipe(documents)
    assert plan(job, tmp_path / "out", SHARDS, measure=False).fits
    assert model_of(merge(job, tmp_path / "out", SHARDS)) == model_of(by_hand(documents, tmp_path / "hand"))


def test_a_key_that_stands_twice_is_told_of_every_document(llama: Path) -> None:
    twice = [f"{yaml.safe_dump(document)}dtype: float32\ndtype: float32\n" for document in two(llama)]
    with pytest.raises(RecipeError) as raised:
        lowmem_aim.read_recipe("---\n".join(twice))
    assert "recipe:11:1: the key `dtype` appears twice (and at 19:1)" in str(raised.value)


def test_the_documents_may_stand_in_any_order(llama: Path, tmp_path: Path) -> None:
    expected = [*lowmem_aim.read_recipe(three(llama)).stages]
    found = [lowmem_aim.read_recipe(order) for order in itertools.permutations(three(llama))]
    assert [[*recipe.stages] for recipe in found] == [expected] * 6
    assert {recipe.method.name for recipe in found} == {"slerp"}
    whole = model_of(merge(found[0], tmp_path / "out"))
    assert model_of(merge(found[-1], tmp_path / "turned")) == whole


def test_a_file_a_text_a_list_and_stdin_are_the_same_recipe(
    llama: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = f"---\n{yaml.safe_dump_all(two(llama))}---\n"  # an empty document does not count
    (tmp_path / "r.yml").write_text(text)
    read = [lowmem_aim.read_recipe(recipe) for recipe in (tmp_path / "r.yml", text, two(llama))]
    assert [[*recipe.stages] for recipe in read] == [["first"]] * 3
    assert len({str(recipe.references) for recipe in read}) == 1
    expected = model_of(merge(read[0], tmp_path / "out"))
    monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO(text.encode())))
    assert run("merge", "-", tmp_path / "piped").code == 0
    assert model_of(tmp_path / "piped") == expected


def test_the_recipe_of_the_output_has_all_documents_and_makes_it_again(llama: Path, tmp_path: Path, run: Run) -> None:
    out = merge(lowmem_aim.read_recipe(three(llama)), tmp_path / "out")
    written = [*yaml.safe_load_all((out / "mergekit_config.yml").read_text())]
    assert [document.get("name") for document in written] == ["first", "second", None]
    for name in ("base", "math", "code", "chat"):
        (tmp_path / "again").mkdir(exist_ok=True)
        (tmp_path / "again" / name).symlink_to(llama / name, target_is_directory=True)
    shutil.copy(out / "mergekit_config.yml", tmp_path / "again" / "r.yml")
    assert run("merge", tmp_path / "again" / "r.yml", tmp_path / "made-again").code == 0
    assert digests(tmp_path / "made-again") == digests(out)
    facts = json.loads((out / "lowmem_aim.json").read_text())
    assert {item["model"] for item in facts["stages"]["first"]["inputs"]} == {"math", "code"}
    card = (out / "README.md").read_text()
    assert [*yaml.safe_load(card.split("---")[1])["base_model"]] == ["math", "code", "base", "chat"]


def test_models_of_one_name_and_a_model_named_as_a_stage_are_told_apart(llama: Path, tmp_path: Path) -> None:
    for name in ("one/first", "one/last", "two/last"):
        tiny.perturbed(llama / "math", tmp_path / name, scale=0.0)
    paths = [str(tmp_path / name) for name in ("one/first", "one/last", "two/last")]
    documents = two(llama)
    documents[0]["models"] = [{"model": path, "parameters": {"weight": 1}} for path in paths[:2]]
    documents.append({**documents[0], "name": "third", "models": [{"model": paths[2], "parameters": {"weight": 1}}]})
    documents[1] = {
        "merge_method": "linear",
        "models": [{"model": name, "parameters": {"weight": 1}} for name in ("first", "third")],
    }
    out = merge(lowmem_aim.read_recipe(documents), tmp_path / "out")
    written = [*yaml.safe_load_all((out / "mergekit_config.yml").read_text())]
    listed = [[model["model"] for model in document["models"]] for document in written]
    assert listed == [["one/first", "one/last"], ["two/last"], ["first", "third"]]


def test_a_stage_may_have_aim_and_be_the_base_of_another(llama: Path, texts: Path, tmp_path: Path) -> None:
    documents = three(llama)
    documents[1]["aim"] = {"omega": 0.3, "calibration": str(texts)}
    documents[2] |= {"merge_method": "task_arithmetic", "parameters": {"weight": 0.5}}
    documents[2]["aim"] = {"omega": [0.2, 0.6], "calibration": str(texts)}
    options = Options(use_cache=False)
    hand = by_hand(documents, tmp_path / "hand", options)
    events = seen_in(lowmem_aim.read_recipe(documents), tmp_path / "out", options)
    for omega in ("omega-0.2", "omega-0.6"):
        assert model_of(tmp_path / "out" / omega) == model_of(hand / omega)
    assert phases_of(events) == [
        "first: merge",
        "first: finish",
        "second: calibrate",
        "second: merge",
        "second: finish",
        "calibrate",
        "merge",
        "finish",
    ]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["omega-0.2", "omega-0.6"]
    verify_outputs(tmp_path / "out")
    assert not phases_of(seen_in(lowmem_aim.read_recipe(documents), tmp_path / "out", options))


# --- interrupted ------------------------------------------------------------------------------------------------------

TENSORS = 30  # of a tiny Llama


@pytest.fixture(scope="module")
def whole(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Digests of all files of the three stages' output, made at once."""
    return digests(merge(lowmem_aim.read_recipe(three(llama)), tmp_path_factory.mktemp("whole") / "out", SHARDS))


def test_interrupted_in_each_stage_it_ends_with_the_same_bytes(
    llama: Path, tmp_path: Path, whole: dict[str, str], each_tensor: None, run: Run
) -> None:
    job, out = lowmem_aim.read_recipe(three(llama)), tmp_path / "out"
    assert len(tensors_in(llama / "base")) == TENSORS
    expected = [
        ("first", ["first: merge"]),  # of each run: the stage that it ends in, and the phases that it comes to
        ("second", ["first: merge", "first: finish", "second: merge"]),
        ("", ["second: merge", "second: finish", "merge"]),
    ]
    for stage, phases in expected:
        events: list[Event] = []
        tensors = 5 if stage == "first" else TENSORS - 5 + 8
        stopping = stopping_after(tensors)

        def emit(event: Event, events: list[Event] = events, stopping: Any = stopping) -> None:
            events.append(event)
            stopping(event)

        with pytest.raises(Stopped):
            merge(job, out, SHARDS, emit)
        assert phases_of(events) == phases
        assert not (out / "config.json").exists()
        found = status_of(out, stages_in(out))
        assert (found.state, found.kept) == ("interrupted", True)
        shown = run("status", out)
        assert shown.code == 0
        assert [f"stage {folder.name}:" in shown.out for folder in stages_in(out)] == [True] * len(stages_in(out))
        state = {folder.name: is_finished(folder) for folder in stages_in(out)}
        assert state == {"first": stage != "first"} | ({} if stage == "first" else {"second": stage == ""})
    assert phases_of(seen_in(job, out)) == ["merge", "finish"]
    assert digests(out) == whole
    assert not stages_in(out)


def stopped(*_: object) -> None:
    raise Stopped


def test_stages_are_removed_only_once_the_output_is_complete(
    llama: Path, tmp_path: Path, whole: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    job, out = lowmem_aim.read_recipe(three(llama)), tmp_path / "out"

    with monkeypatch.context() as patch:
        patch.setattr(merge_job, "put_away", stopped)
        with pytest.raises(Stopped):
            merge(job, out, SHARDS)
    assert is_finished(out)
    assert [folder.name for folder in stages_in(out)] == ["first", "second"]
    (stage_folder(out, "first") / "config.json").unlink()  # and one is half removed
    assert not phases_of(seen_in(job, out))
    assert not stages_in(out)
    assert digests(out) == whole


@pytest.mark.long
def test_a_stage_that_is_lost_is_made_again(
    llama: Path, tmp_path: Path, whole: dict[str, str], each_tensor: None
) -> None:
    job, out = lowmem_aim.read_recipe(three(llama)), tmp_path / "out"
    stop(job, out, 2 * TENSORS + 7)
    shutil.rmtree(stage_folder(out, "first"))
    events = seen_in(job, out)
    assert phases_of(events) == ["first: merge", "first: finish", "merge", "finish"]
    assert any(isinstance(event, Notice) and "read again" in event.text for event in events)
    assert digests(out) == whole


def test_a_first_run_that_finishes_nothing_leaves_nothing(llama: Path, tmp_path: Path) -> None:
    stop(lowmem_aim.read_recipe(three(llama)), tmp_path / "a" / "out", 0, Options())
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("tensors", others_long([7, TENSORS + 7, 2 * TENSORS + 7], (TENSORS + 7,)))
def test_a_changed_recipe_of_a_stage_is_refused_by_its_name(
    tensors: int, llama: Path, tmp_path: Path, whole: dict[str, str], each_tensor: None
) -> None:
    out, changed = tmp_path / "out", three(llama)
    stop(lowmem_aim.read_recipe(three(llama)), out, tensors)
    changed[0]["models"][0]["parameters"]["weight"] = 0.25
    with pytest.raises(ResumeError) as caught:
        merge(lowmem_aim.read_recipe(changed), out, SHARDS)
    assert any(line.startswith("stage `first`: ") and "0.25 now" in line for line in caught.value.problems)
    assert "--fresh" in caught.value.hint
    assert plan(lowmem_aim.read_recipe(changed), out, SHARDS, measure=False).exit_code == 7
    merge(lowmem_aim.read_recipe(three(llama)), out, SHARDS)  # what was there is as it was
    assert digests(out) == whole


def test_a_stage_of_another_recipe_is_refused_even_if_its_folder_is_gone(
    llama: Path, tmp_path: Path, each_tensor: None
) -> None:
    out, changed = tmp_path / "out", three(llama)
    stop(lowmem_aim.read_recipe(three(llama)), out, 2 * TENSORS + 7)
    shutil.rmtree(out / PRIVATE / "stages")
    changed[0]["models"][0]["parameters"]["weight"] = 0.25
    with pytest.raises(ResumeError, match=r"stages\.first has changed"):
        merge(lowmem_aim.read_recipe(changed), out, SHARDS)


def test_fresh_makes_all_stages_anew(llama: Path, tmp_path: Path, each_tensor: None) -> None:
    out, changed = tmp_path / "out", three(llama)
    stop(lowmem_aim.read_recipe(three(llama)), out, TENSORS + 7)
    changed[0] |= {"models": [{"model": str(llama / "math"), "parameters": {"weight": 1}}], "dtype": "bfloat16"}
    fresh = replace(SHARDS, fresh=True)
    assert plan(lowmem_aim.read_recipe(changed), out, fresh, measure=False).fits
    events = seen_in(lowmem_aim.read_recipe(changed), out, fresh)
    assert phases_of(events)[:1] == ["first: merge"]
    assert model_of(out) == model_of(by_hand(changed, tmp_path / "hand"))


# --- finished ---------------------------------------------------------------------------------------------------------


def test_a_finished_output_knows_its_stages_without_their_folders(llama: Path, tmp_path: Path, run: Run) -> None:
    for name in ("base", "math", "code", "chat"):
        tiny.perturbed(llama / name, tmp_path / name, scale=0.0)
    out, file = tmp_path / "out", tmp_path / "r.yml"
    file.write_text(yaml.safe_dump_all(three(tmp_path)))
    assert run("merge", file, out).code == 0
    assert "is finished already" in run("merge", file, out).err
    assert run("plan", file, out, "--no-measure").code == 0
    os.utime(tmp_path / "math" / "model.safetensors")
    again = run("merge", file, out)
    assert again.code == 0
    assert "`math` has new or moved files: what was read from it is read again" in again.err
    changed = three(tmp_path)
    changed[0]["models"][0]["parameters"]["weight"] = 0.25
    file.write_text(yaml.safe_dump_all(changed))
    for command in (("merge",), ("plan", "--no-measure")):
        refused = run(*command, file, out)
        assert (refused.code, "stage `first`: " in refused.err) == (2, True), refused.err
    file.write_text(yaml.safe_dump_all(three(tmp_path)))
    tiny.edit_tensors(tmp_path / "math", lambda tensors: tensors["model.norm.weight"].add_(1.0))
    refused = run("merge", file, out)
    assert refused.code == 7
    assert "stage `first`: `math` no longer has the same `model.norm.weight`" in refused.err
    verify_outputs(out)


def test_kept_stages_are_moved_once_and_never_over_something(llama: Path, tmp_path: Path, run: Run) -> None:
    file, out, kept = tmp_path / "r.yml", tmp_path / "out", tmp_path / "kept"
    file.write_text(yaml.safe_dump_all(three(llama)))
    (kept / "second").mkdir(parents=True)
    (kept / "second" / "mine.txt").write_text("mine")
    for command in (("merge",), ("plan", "--no-measure")):
        refused = run(*command, file, out, "--keep-stages", kept)
        assert (refused.code, "second` is not empty" in refused.err) == (2, True), refused.err
    inside = run("merge", file, out, "--keep-stages", out / "kept")
    assert (inside.code, "lies in the output folder" in inside.err) == (2, True)
    assert not out.exists()
    shutil.rmtree(kept / "second")
    assert run("merge", file, out, "--keep-stages", kept).code == 0
    assert run("merge", file, out, "--keep-stages", kept).code == 0  # there is nothing left to move
    assert sorted(folder.name for folder in kept.iterdir()) == ["first", "second"]
    assert run("verify", kept / "second").code == 0
    alone = run("merge", tmp_path / "x", "--method", "linear", "--expert", llama / "math", "--keep-stages", kept)
    assert (alone.code, "the recipe has no named stages" in alone.err) == (2, True)


@pytest.mark.parametrize("killed", [False, True])
def test_stages_that_are_kept_on_another_disk_are_there_whole_or_not_at_all(
    killed: bool, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, out, kept = lowmem_aim.read_recipe(two(llama)), tmp_path / "out", tmp_path / "kept"
    monkeypatch.setattr("lowmem_aim.output.stages._is_elsewhere", lambda *_: True)
    options = replace(SHARDS, keep_stages=kept)
    with monkeypatch.context() as patch:
        if killed:
            patch.setattr("lowmem_aim.output.stages._remove", stopped)
            with pytest.raises(Stopped):
                merge(job, out, options)
            assert stages_in(out)
            (kept / ".first.partial").mkdir()
    merge(job, out, options)
    assert not stages_in(out)
    assert [path.name for path in kept.iterdir() if not path.name.startswith(".")] == ["first"]
    verify_outputs(kept / "first")


# --- before work ------------------------------------------------------------------------------------------------------


def told(documents: Sequence[Document]) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        lowmem_aim.read_recipe(yaml.safe_dump_all(documents))
    assert all(hint for hint in caught.value.hints)
    return [*caught.value.problems]


@pytest.mark.parametrize(
    "name", ["a/b", "..", ".hidden", "a\\b", "a:b", "x+lora", "x@main", "a" * 101, "end.", 5, "é\x1b"]
)
def test_a_stage_has_the_name_of_a_plain_file(name: Any, llama: Path) -> None:
    documents = two(llama)
    documents[0]["name"] = documents[1]["models"][0]["model"] = name
    assert any("`name`" in problem and problem.startswith("recipe:") for problem in told(documents))


def test_a_name_is_no_models_path(llama: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(llama)
    documents = two(llama)
    documents[0]["name"] = documents[1]["models"][0]["model"] = "math"
    assert "there is a model in the folder `math`" in told(documents)[0]
    (tmp_path / "math").mkdir()  # no model
    monkeypatch.chdir(tmp_path)
    assert [*lowmem_aim.read_recipe(documents).stages] == ["math"]


def test_names_circles_and_unused_stages_are_told_at_once_with_their_lines(llama: Path) -> None:
    def linear(uses: str, **more: Any) -> Document:
        return {**more, "merge_method": "linear", "models": [{"model": uses, "parameters": {"weight": 1}}]}

    math = str(llama / "math")
    problems = told([linear("b", name="a"), linear("a", name="b"), linear("a"), linear(math, name="c")])
    assert problems == [
        "recipe:1:1: the stages wait for each other: `a` uses `b`, which uses `a`",
        "recipe:21:1: nothing uses the stage `c`",
    ]
    problems = told([linear(math, name="A"), linear(math, name="a"), linear(math), linear("A"), linear("A")])
    assert [problem.split(" (")[0] for problem in problems] == [
        "recipe:13:1: two stages have the name `a` and `A`, which some systems do not tell apart",
        "recipe:21:1: another document without a `name`",
    ]
    assert "every document has a `name`" in told([linear(math, name="a"), linear("a", name="b")])[0]
    several = linear(math, name="a", base_model=math, aim={"omega": [0.2, 0.4], "calibration": "builtin"})
    assert "has several omegas: only the output may" in told([several, linear("a")])[0]
    problems = told([linear(math, name="second"), linear("secnd"), linear("second", name="third")])
    assert problems[0].endswith(": `model`: neither a stage nor a folder is named `secnd`")
    assert not [problem for problem in problems if "nothing uses the stage `second`" in problem]
    assert len(told([{**linear("a", name="a"), "dtype": "float23"}, {"merge_method": "liner"}])) == 4


def test_all_stages_are_checked_before_the_first_is_made(llama: Path, tmp_path: Path, run: Run) -> None:
    documents = three(llama)
    documents[0]["models"].append({"model": str(tmp_path / "nowhere"), "parameters": {"weight": 1}})
    documents[1]["models"].append({"model": str(tmp_path / "lost"), "parameters": {"weight": 1}})
    (tmp_path / "r.yml").write_text(yaml.safe_dump_all(documents))
    refused = run("merge", tmp_path / "r.yml", tmp_path / "out")
    assert refused.code == 3
    assert "nowhere" in refused.err
    assert "lost" in refused.err
    wide = tiny.build("llama", tmp_path / "wide", hidden_size=64)
    documents = three(llama)
    documents[2] = {"merge_method": "linear", "models": documents[2]["models"] + [{"model": str(wide)}]}
    documents[2]["parameters"] = {"weight": 1}
    with pytest.raises(LowmemAimError, match="`wide`"):
        merge(lowmem_aim.read_recipe(documents[:1] + documents[1:]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_error_in_the_middle_names_the_stage_and_says_once_what_is_kept(
    llama: Path, tmp_path: Path, each_tensor: None, run: Run
) -> None:
    broken = tiny.perturbed(llama / "chat", tmp_path / "broken", scale=0.0)
    tiny.edit_tensors(broken, lambda tensors: tensors["model.norm.weight"].fill_(float("nan")))
    documents = three(llama)
    documents[1]["models"][1]["model"] = str(broken)
    (tmp_path / "r.yml").write_text(yaml.safe_dump_all(documents))
    failed = run("merge", tmp_path / "r.yml", tmp_path / "out")
    assert failed.code == 3
    [told] = [line for line in failed.err.splitlines() if line.startswith("error: ")]
    assert told.startswith("error: stage `second`: ")
    assert "`broken`" in told
    hints = [line for line in failed.err.splitlines() if "what is finished is kept" in line]
    assert [line.count("what is finished is kept") for line in hints if line.startswith("hint:")] == [1]
    assert is_finished(stage_folder(tmp_path / "out", "first"))


def test_the_plan_counts_the_disk_of_all_stages(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job, out = lowmem_aim.read_recipe(three(llama)), tmp_path / "out"
    found = plan(job, out, measure=False)
    [disk] = [need for need in found.needs if need.what == "disk"]
    kept = tmp_path / "kept"
    merge(job, out, Options(keep_stages=kept))
    folders = [out, *(kept / name for name in ("first", "second"))]
    written = sum((folder / "model.safetensors").stat().st_size for folder in folders)
    assert 0 <= disk.least - SMALL_FILES_BYTES - written < 300_000  # tokenizers
    assert [*found.survey["stages"]] == ["first", "second"]
    free = disk.least - 1

    class Usage:
        total, used = 10**12, 0

    Usage.free = free  # type: ignore[attr-defined]
    monkeypatch.setattr("lowmem_aim.output.folder.shutil.disk_usage", lambda _: Usage)
    with pytest.raises(DiskError, match="with the stages that it is made of"):
        merge(job, tmp_path / "other")
    assert not (tmp_path / "other").exists()


# --- what is shown ----------------------------------------------------------------------------------------------------


def test_lines_log_and_summary_name_the_stage(llama: Path, tmp_path: Path, run: Run) -> None:
    file, out = tmp_path / "r.yml", tmp_path / "out"
    file.write_text(yaml.safe_dump_all(three(llama)))
    done = run("merge", file, out)
    assert done.code == 0
    assert done.out == f"{out}\n"
    for line in ("stage     first", "first: merge: done", "second: finish: done", "merge: done", "finished in "):
        assert line in done.err
    [logged] = runs_in(out / PRIVATE / "run.log")
    [event] = [event for _, event in logged if isinstance(event, Planned)]
    assert event.stages == (("first", "merge"), ("first", "finish"), ("second", "merge"), ("second", "finish"))
    assert event.tensors == 3 * TENSORS
    [facts] = json.loads((out / PRIVATE / "run.json").read_text())["runs"]
    assert [*facts["phases"]] == [*event.labels]
    assert facts["tensors"] == {"finished": 3 * TENSORS, "earlier": 0}


def test_flags_are_for_the_output_alone(llama: Path, tmp_path: Path, run: Run) -> None:
    file, out, kept = tmp_path / "r.yml", tmp_path / "out", tmp_path / "kept"
    file.write_text(yaml.safe_dump_all(two(llama)))
    assert run("merge", file, out, "--dtype", "bfloat16", "--keep-stages", kept).code == 0
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert json.loads((kept / "first" / "config.json").read_text())["dtype"] == "float32"
