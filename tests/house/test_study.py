"""The study of solved merges asks what is right, and nothing that its experts are tuned on."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "study"))

import recipes
import skills
import written


@pytest.mark.parametrize("skill", skills.SKILLS)
def test_nothing_is_asked_that_an_expert_is_tuned_on(skill: str) -> None:
    asked = {item.question for item in written.held_out(skill)}
    assert len(asked) == written.ITEMS
    assert not asked & {item.question for item in written.training_items(skill)}


def test_every_expression_that_counts_as_right_is_one() -> None:
    for item in written.held_out("code"):
        values = item.question.rstrip(".").split(" in ")[1].split()[0]
        assert isinstance(eval(item.answer, {values: [-3, -2, 5, 22, 29]}), int | float | list | set)


def test_every_worked_answer_ends_with_its_result() -> None:
    for item in written.held_out("math"):
        for step in item.answer.split(", "):
            worked, result = step.split(" = ")
            assert eval(worked) == int(result) >= 0


def test_every_json_that_is_asked_for_is_json() -> None:
    answers = [item.answer for item in written.held_out("instructions") if item.question.startswith("Write JSON")]
    assert answers
    assert all(set(json.loads(answer)) == {"name", "item", "count"} for answer in answers)


def test_recipes_that_name_a_method_of_this_tool_can_be_read(tmp_path: Path) -> None:
    places = recipes.Places(tmp_path / "base", {skill: tmp_path / skill for skill in skills.SKILLS}, tmp_path)
    read = [merge.name for merge in recipes.merges(places) if not recipes.not_known(merge)]
    assert {"average", "task-arithmetic", "ties"} <= set(read)
    assert len({merge.name for merge in recipes.merges(places)}) == len(recipes.merges(places))
