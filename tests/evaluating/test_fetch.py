"""`evaluate --fetch`: which flags it takes, and what it says of data sets that do not come, or are of no use then."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub.data_sets import write_data_sets
from hub.playing import asked_for_data_sets, playing
from hub.server import Hub

TASK = """
task: NAME
dataset_path: PATH
test_split: train
output_type: multiple_choice
doc_to_text: "{{prompt}}"
doc_to_target: 0
doc_to_choice: ["a", "b"]
"""
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
    assert [event["text"] for event in events if event["event"] == "notice"] == ["`google/IFEval`: 2 items train"]
    assert (events[-1]["event"], events[-1]["outcome"]) == ("run_ended", "finished")


def test_all_that_does_not_come_is_told(folder: Path, run: Any, online: None) -> None:
    refused = run("evaluate", "--fetch", "--tasks", "nowhere,here,nothing", "--include-path", folder)
    assert refused.code == 9, refused.err
    assert all(f"the data set `{name}` cannot be fetched" in refused.err for name in ("no/such", "none/other"))
    assert "`google/IFEval`: 2 items" in refused.err


def test_what_is_of_no_use_without_a_network_is_told(folder: Path, run: Any, online: None) -> None:
    refused = run("evaluate", "--fetch", "--tasks", "addressed", "--include-path", folder)
    assert refused.code == 9, refused.err
    assert "`hf://datasets/google/IFEval/ifeval_input_data.jsonl` is downloaded, but" in refused.err


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
    assert "--include-path` means" not in refused.err
    assert not list(tmp_path.glob("out*"))


def test_without_fetch_a_model_and_an_output_are_needed(folder: Path, run: Any) -> None:
    for given, missing in (((), "`MODEL` is missing"), (("model",), "`--output` / `-o` is missing")):
        refused = run("evaluate", *given, "--tasks", "here", "--include-path", folder)
        assert (refused.code, missing in refused.err) == (2, True), refused.err
