"""Metrics that would be downloaded as code: tasks that ask for one are refused before work, and nothing is fetched."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import evaluate
import pytest
from lm_eval.tasks.squadv2.task import SQuAD2

from lowmem_aim.errors import UsageError
from lowmem_aim.evaluating.code_scoring import CodeEval
from lowmem_aim.evaluating.downloaded_metrics import nothing_downloaded, scored_by_downloads

CODE = """
import evaluate
import evaluate as hf_evaluate

def helper(texts):
    return evaluate.load("rouge").compute(texts)

def by_another(doc, results):
    return helper(results)

def by_ours(doc, results):
    return hf_evaluate.load("code_eval").compute(results)

def by_itself(doc, results):
    return {"acc": 1.0}
"""


@pytest.fixture
def code(tmp_path: Path) -> ModuleType:
    (tmp_path / "utils.py").write_text(CODE)
    spec = importlib.util.spec_from_file_location("utils_of_a_task", tmp_path / "utils.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def told(**tasks: Any) -> list[str]:
    return [problem for error in scored_by_downloads(tasks) for problem in error.problems]


def scored_by(function: Any) -> Any:
    return SimpleNamespace(config=SimpleNamespace(process_results=function))


def test_what_a_task_is_scored_by_is_looked_through(code: ModuleType) -> None:
    [problem] = told(sums=scored_by(code.by_another), own=scored_by(code.by_itself), ours=scored_by(code.by_ours))
    assert problem.startswith("the task `sums` is scored by `rouge`, which would be downloaded as code")


def test_a_metric_that_the_harness_does_not_have_is_one() -> None:
    [problem] = told(sums=SimpleNamespace(_metric_fn_list={"rouge": None, "acc": len}))
    assert "`rouge`" in problem


def test_names_of_what_a_tasks_own_function_gives_are_none(code: ModuleType) -> None:
    own = scored_by(code.by_itself)
    own._metric_fn_list = {"strict": None}
    assert not told(own=own)


def test_tasks_with_a_class_of_their_own_are_too() -> None:
    [problem] = told(squad=object.__new__(SQuAD2))
    assert "`squad_v2`" in problem


def test_nothing_is_downloaded_while_tasks_are_loaded_and_scored(code: ModuleType) -> None:
    own = evaluate.load
    with nothing_downloaded():
        assert isinstance(evaluate.load("code_eval"), CodeEval)
        with pytest.raises(UsageError, match="`rouge`, which would be downloaded as code"):
            code.by_another({}, ["text"])
    assert evaluate.load is own
