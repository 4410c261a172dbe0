"""The harness' own tasks: found in a few of its folders just as in all."""

from __future__ import annotations

from pathlib import Path

import lm_eval.tasks
import pytest
from lm_eval.tasks import TaskManager

from lowmem_aim.evaluating.task_index import index_of

OWN = {
    "alone": {"a.yaml": "task: alone\n"},
    "group": {
        "g.yaml": "group: both\ntask: [one, {task: two, num_fewshot: 3}, {group: inner, task: [tagged]}]\n",
        "one.yaml": "task: one\n",
    },
    "else": {"two.yaml": "task: two\ninclude: ../shared/base.yaml\n", "t.yaml": "task: three\ntag: tagged\n"},
    "shared": {"base.yaml": "output_type: multiple_choice\n"},
    "many-1": {"m.yaml": "task: first\ntag: spread\n"},
    "many-2": {"m.yaml": "task: second\ntag: spread\n"},
    "not": {"n.yaml": "task: alone_not\ndescription: a task of its own\n"},
}


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for folder, files in OWN.items():
        for name, text in files.items():
            (tmp_path / "own" / folder).mkdir(parents=True, exist_ok=True)
            (tmp_path / "own" / folder / name).write_text(text)
    monkeypatch.setattr(lm_eval.tasks.manager, "__file__", str(tmp_path / "own" / "manager.py"))
    return tmp_path


@pytest.mark.parametrize(
    ("name", "others"),
    [("alone", {"one", "alone_not"}), ("both", {"alone", "first"}), ("spread", set()), ("no", set())],
)
def test_a_task_and_all_below_it_are_what_they_are_in_the_whole_index(name: str, others: set[str], own: Path) -> None:
    found, whole = index_of([name], []).task_index, TaskManager().task_index
    below = {"both": {"both", "one", "two", "tagged", "three"}, "spread": {"spread", "first", "second"}}
    for part in below.get(name, {name}) & whole.keys():
        assert found[part] == whole[part]
    assert not others & found.keys()


def test_a_folder_of_the_user_comes_before_the_harness_own(own: Path) -> None:
    (own / "mine").mkdir()
    (own / "mine" / "a.yaml").write_text("task: alone\noutput_type: generate_until\n")
    found = index_of(["alone", "one"], [str(own / "mine")]).task_index
    assert found["alone"].cfg["output_type"] == "generate_until"
    assert "one" in found
