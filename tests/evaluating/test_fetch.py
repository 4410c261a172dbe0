"""`evaluate --fetch`: which flags it takes, and what it says of data sets that do not come, or are of no use then."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub.data_sets import write_data_sets
from hub.playing import asked_for_data_sets, playing
from hub.server import Hub

from lowmem_aim.errors import NetworkError, UsageError
from lowmem_aim.evaluating import tasks
from lowmem_aim.evaluating.tasks import Asked
from lowmem_aim.jobs.fetch import fetch

TASK = """
task: NAME
dataset_path: PATH
test_split: train
output_type: multiple_choice
doc_to_text: "{{prompt}}"
doc_to_target: 0
doc_to_choice: ["a", "b"]
"""
NOBODY = "http://127.0.0.1:9"  # an address at which no server answers
ADDRESSED = TASK + "dataset_kwargs: {data_files: {train: 'hf://datasets/google/IFEval/ifeval_input_data.jsonl'}}\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of task files: `here`, `nowhere` and `nothing` on the Hub by their names, `addressed` by an address."""
    made = tmp_path / "tasks"
    made.mkdir()
    paths = {"here": "google/IFEval", "nowhere": "no/such", "nothing": "none/other", "addressed": "json"}
    for name, path in paths.items():
        text = (ADDRESSED if name == "addressed" else TASK).replace("NAME", name).replace("PATH", path)
        (made / f"{name}.yaml").write_text(text)
    return made


@pytest.fixture
def online(tmp_path: Path) -> Iterator[None]:
    hub = Hub(datasets=write_data_sets(tmp_path / "hub"))
    with playing(hub) as address, asked_for_data_sets(address, tmp_path / "cache"):
        yield


def test_what_came_is_told_to_programs_too(folder: Path, run: Any, online: None) -> None:
    done = run("evaluate", "--fetch", "--tasks", "here", "--include-path", folder, "--json")
    assert done.code == 0, done.err
    events = [json.loads(line) for line in done.out.splitlines()]
    told = [event["text"] for event in events if event["event"] == "notice"]
    assert told == ["`google/IFEval`: 2 items train"]
    assert [event["total"] for event in events if event["event"] == "phase_started"] == [1]
    assert (events[-1]["event"], events[-1]["outcome"]) == ("run_ended", "finished")


def test_a_model_comes_from_the_hub_too(folder: Path, tmp_path: Path, run: Any, llama: Path) -> None:
    hub = Hub(models={"tiny/chat": llama / "base"}, datasets=write_data_sets(tmp_path / "hub"))
    out = tmp_path / "scores.json"
    with playing(hub) as address, asked_for_data_sets(address, tmp_path / "cache"):
        done = run("evaluate", "tiny/chat", "--tasks", "here", "--include-path", folder, "-o", out)
    assert done.code == 0, done.err
    scores = json.loads(out.read_text())
    assert (scores["name"], scores["scores"]["here"]["n"]) == ("tiny/chat", 2)


def test_items_on_this_machine_are_not_fetched_or_missed(folder: Path, tmp_path: Path, run: Any) -> None:
    rows = tmp_path / "rows"
    rows.mkdir()
    (rows / "train.jsonl").write_text('{"prompt": "say a"}\n')
    paths = {"files": "json", "whole": str(rows), "gone": str(tmp_path / "gone")}
    for name, path in paths.items():
        more = f"dataset_kwargs: {{data_files: {{train: {rows}/train.jsonl}}}}\n" if name == "files" else ""
        (folder / f"{name}.yaml").write_text(TASK.replace("NAME", name).replace("PATH", path) + more)
    with asked_for_data_sets(NOBODY, tmp_path / "cache"):
        done = run("evaluate", "--fetch", "--tasks", "files,whole", "--include-path", folder)
        assert (done.code, "fetch: 0 of 0 data sets" in done.err) == (0, True), done.err
    with asked_for_data_sets("", tmp_path / "cache"), pytest.raises(UsageError, match="gone"):
        tasks.loaded(Asked(("gone",), (folder,)))


def test_all_that_does_not_come_is_told(folder: Path, run: Any, online: None) -> None:
    refused = run("evaluate", "--fetch", "--tasks", "nowhere,here,nothing", "--include-path", folder)
    assert refused.code == 9, refused.err
    assert all(f"the data set `{name}` cannot be fetched" in refused.err for name in ("no/such", "none/other"))
    assert "`google/IFEval`: 2 items" in refused.err


def test_what_is_of_no_use_without_a_network_is_told(folder: Path, run: Any, online: None) -> None:
    refused = run("evaluate", "--fetch", "--tasks", "addressed", "--include-path", folder)
    assert refused.code == 9, refused.err
    assert "`hf://datasets/google/IFEval/ifeval_input_data.jsonl` is downloaded, but" in refused.err


def test_another_configuration_does_not_stand_for_one_that_is_missing(
    folder: Path, tmp_path: Path, online: None
) -> None:
    for name in ("main", "socratic"):
        text = TASK.replace("NAME", name).replace("PATH", "openai/gsm8k").replace("prompt", "question")
        (folder / f"{name}.yaml").write_text(f"{text}dataset_name: {name}\n")
    fetch(Asked(("main",), (folder,)))
    with asked_for_data_sets("", tmp_path / "cache"):
        assert tasks.loaded(Asked(("main",), (folder,))).names == ["main"]
        with pytest.raises(NetworkError, match=r"`openai/gsm8k` \(socratic\) is not on this machine"):
            tasks.loaded(Asked(("main", "socratic"), (folder,)))


def test_without_a_network_all_that_is_missing_is_told_too(
    folder: Path, tmp_path: Path, online: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The libraries do not know yet that there is no network."""
    fetch(Asked(("here",), (folder,)))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the Hub's library tries five times
    asked = Asked(("here", "nowhere", "nothing"), (folder,))
    with asked_for_data_sets(NOBODY, tmp_path / "cache"), pytest.raises(NetworkError) as told:
        tasks.loaded(asked)
    assert [name for name in ("google/IFEval", "no/such", "none/other") if name in str(told.value)] == [
        "no/such",
        "none/other",
    ]
    assert "evaluate --fetch --tasks here,nowhere,nothing" in told.value.hint


def test_nothing_is_fetched_offline(folder: Path, run: Any, tmp_path: Path) -> None:
    with asked_for_data_sets("", tmp_path / "cache"):
        refused = run("evaluate", "--fetch", "--tasks", "here", "--include-path", folder)
    assert (refused.code, "HF_HUB_OFFLINE" in refused.err) == (9, True), refused.err


def test_flags_that_mean_nothing_beside_fetch_are_refused(folder: Path, run: Any, tmp_path: Path) -> None:
    given = ("model", "-o", tmp_path / "out.json", "--limit", "3", "--ram", "1GB", "--no-cache")
    refused = run("evaluate", "--fetch", "--tasks", "here", "--include-path", folder, *given)
    assert refused.code == 2
    for name in ("MODEL", "--output", "--limit", "--ram", "--cache"):
        assert f"`{name}` means nothing beside `--fetch`" in refused.err, refused.err
    assert f"write `lowmem-aim evaluate --fetch --tasks here --include-path {folder}`" in refused.err
    assert "--include-path` means" not in refused.err
    assert not list(tmp_path.glob("out*"))


def test_without_fetch_a_model_and_an_output_are_needed(folder: Path, run: Any) -> None:
    for given, missing in (((), "`MODEL` is missing"), (("model",), "`--output` / `-o` is missing")):
        refused = run("evaluate", *given, "--tasks", "here", "--include-path", folder)
        assert (refused.code, missing in refused.err) == (2, True), refused.err
