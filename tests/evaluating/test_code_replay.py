"""Tasks that run what the model has written are scored in a process apart: it can do little, and is not believed."""

from __future__ import annotations

import builtins
import json
import os
import signal
import socket
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hub.data_sets import write_data_sets
from hub.playing import asked_for_data_sets, playing
from hub.server import Hub

from lowmem_aim.errors import UsageError
from lowmem_aim.evaluating import replay, tasks
from lowmem_aim.evaluating.apart import Ended
from lowmem_aim.evaluating.code_scoring import require_processes
from lowmem_aim.evaluating.generation import WritingModel
from lowmem_aim.evaluating.replay import checked, digest_of, scored_apart
from lowmem_aim.evaluating.replayed_model import ReplayedModel
from lowmem_aim.evaluating.scores import read_scores
from lowmem_aim.evaluating.tasks import Asked, Loaded
from lowmem_aim.system.confinement import cannot_confine

pytestmark = pytest.mark.skipif(os.name != "posix", reason="programs are run on POSIX systems alone")

TASK = """
task: NAME
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/NAME.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{q}}"
doc_to_target: "{{a}}"
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 4, do_sample: false}
metric_list: [{metric: exact_match}]
"""
RUNS = "unsafe_code: true\nprocess_results: !function code.run\nprocess_docs: !function code.items\n"
CODE = """
def items(rows):
    return rows.map(lambda row: {"a": row["a"].strip()})

def run(doc, results):
    try:
        exec(results[0], {})
    except Exception as error:
        return {"exact_match": float(type(error).__name__ == doc["a"])}
    return {"exact_match": float(doc["a"] == "")}

def lazily(doc, results):
    import evaluate
    return evaluate.load("code_eval").compute(["assert 1"], [results], k=[1])[0]
"""
GROUP = "group: both\ntask: [runs, also]\naggregate_metric_list: [{metric: exact_match}]\n"


def write(folder: Path, name: str, items: Sequence[tuple[str, str]], more: str = "") -> None:
    """Write a task with items: what the model is asked, and what is right."""
    rows = (json.dumps({"q": question, "a": answer}) for question, answer in items)
    (folder / f"{name}.jsonl").write_text("\n".join(rows))
    (folder / f"{name}.yaml").write_text((TASK + more).replace("NAME", name).replace("FOLDER", str(folder)))
    (folder / "code.py").write_text(CODE)


def attempts(folder: Path, port: int) -> dict[str, str]:
    """Programs, and the errors that they end with if they cannot do what they try."""
    found = {
        "import builtins; builtins.has_run = True": "",
        "open('here', 'w').write('x')": "",
        "import os; assert os.path.samefile(os.path.expanduser('~'), '.')": "",
        "import os; assert not {'HF_TOKEN', 'OTHER'} & {*os.environ}": "",
        "open('large', 'wb').truncate(200_000_000)": "OSError",
        "bytearray(5_000_000_000)": "MemoryError",
        "while True: pass": "TimeoutError",
        "import lm_eval.api.metrics as m, lm_eval.evaluator_utils as e; m.mean = e.mean = lambda items: 0.25": "",
    }
    if not require_processes():
        found[f"import socket; socket.create_connection(('127.0.0.1', {port}), 5)"] = "OSError"
    if not cannot_confine():
        for program in (f"open({str(folder / 'secret')!r})", f"open({str(folder / 'new')!r}, 'w')"):
            found[program] = "PermissionError"
        for program in ("open(f'/proc/{os.getppid()}/environ').read()", "os.kill(os.getppid(), 0)"):
            found[f"import os; {program}"] = "PermissionError"
    return found


def test_programs_are_run_by_a_process_that_can_do_little(
    tmp_path: Path, llama: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder, out = Path("tasks"), tmp_path / "scores.json"  # the files of tasks name their items by relative paths
    folder.mkdir()
    (tmp_path / "secret").write_text("secret")
    (folder / "both.yaml").write_text(GROUP)
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("OTHER", "secret")
    monkeypatch.setattr(replay, "SECONDS", 2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        programs = attempts(tmp_path, server.getsockname()[1])
        write(folder, "runs", list(programs.items()), RUNS)
        write(folder, "also", [("said", "yes")])
        write(folder, "writes", [("said", "yes"), ("not said", "yes")])
        monkeypatch.setattr(
            WritingModel,
            "texts",
            lambda self, requests, known: [{"said": "yes", "not said": "no"}.get(text, text) for text, _ in requests],
        )
        done = run(
            *("evaluate", llama / "base", "--tasks", "writes,both", "--include-path", folder, "-o", out),
            *("--allow-task-code", "--allow-code-execution", "--max-length", "2000"),
        )
    assert done.code == 0, done.err
    assert "what the model has written is run: `both`" in done.err
    scores = read_scores(out).scores
    assert [*scores] == ["writes", "both"]
    assert (scores["both"].value, scores["both"].n) == (1.0, len(programs) + 1)
    assert (scores["writes"].value, scores["writes"].n) == (0.5, 2)
    assert not hasattr(builtins, "has_run")
    assert not (tmp_path / "new").exists()


def test_a_task_that_does_not_say_that_it_runs_programs_is_refused_too(tmp_path: Path) -> None:
    write(tmp_path, "lazy", [("a", "b")], "process_results: !function code.lazily\n")
    asked = Asked(("lazy",), (tmp_path,), allow_code=True)
    with pytest.raises(UsageError, match="`lazy` runs the programs that the model writes"):
        tasks.loaded(asked)


def test_items_that_cannot_be_loaded_without_a_network_are_missed_before_work(tmp_path: Path) -> None:
    address = "'hf://datasets/google/IFEval/ifeval_input_data.jsonl'"
    write(tmp_path, "far", [], "unsafe_code: true\n")
    file = tmp_path / "far.yaml"
    text = file.read_text().replace(f"{tmp_path}/far.jsonl", address)
    file.write_text(text.replace("{{q}}", "{{prompt}}").replace("{{a}}", "-"))
    asked = Asked(("far",), (tmp_path,), allow_execution=True)
    hub = Hub(datasets=write_data_sets(tmp_path / "hub"))
    told = pytest.raises(UsageError, match=r"`hf://datasets/google/IFEval/.*` is loaded with a network alone")
    with playing(hub) as there, asked_for_data_sets(there, tmp_path / "cache"), told:
        tasks.loaded(asked)


RIGHT = {"value": 0.5, "stderr": None, "metric": "acc", "n": 3}


def test_scores_are_taken_in_their_form() -> None:
    assert checked(json.dumps({"scores": {"a": RIGHT}}).encode(), {"a": 3})["a"].value == 0.5
    perplexity = checked(json.dumps({"scores": {"a": {**RIGHT, "metric": "perplexity"}}}).encode(), {"a": 3})["a"]
    assert (perplexity.unit, perplexity.higher_is_better) == ("perplexity", False)


@pytest.mark.parametrize(
    "wrong",
    [
        {"value": float("nan")},
        {"value": True},
        {"value": "0.5"},
        {"value": 10**400},
        {"stderr": -1},
        {"stderr": float("inf")},
        {"metric": ""},
        {"metric": "\x1b[2J"},
        {"metric": "m" * 201},
        {"n": 4},
        {"n": 2.0},
        {"unit": "points"},
    ],
)
def test_a_score_of_another_form_is_none(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="something else"):
        checked(json.dumps({"scores": {"a": {**RIGHT, **wrong}}}).encode(), {"a": 3})


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff",
        b"null",
        b"[" * 100_000,
        b'{"scores": {}}',
        json.dumps({"scores": {"a": RIGHT, "b": RIGHT}}).encode(),
        json.dumps({"scores": {"a": RIGHT}, "more": 1}).encode(),
        json.dumps({"scores": {"a": {"value": 0.5}}}).encode(),
        json.dumps({"scores": {"a": RIGHT}}).encode() + b"\n{}",
        json.dumps({"scores": {"a": RIGHT}}).encode() + b" " * 1_000_000,
    ],
)
def test_what_is_not_the_scores_that_were_asked_for_is_none(content: bytes) -> None:
    with pytest.raises(ValueError, match="something else"):
        checked(content, {"a": 3})


@pytest.mark.parametrize(
    ("ended", "told"),
    [
        (Ended(b"", None, ""), "took more than 310 seconds"),
        (Ended(b"", -signal.SIGXCPU, ""), "took more than 310 seconds"),
        (Ended(b"", -9, ""), "ended by signal 9"),
        (Ended(b"{}", 0, ""), "something else than their scores"),
        (Ended(json.dumps({"scores": {"a": RIGHT}}).encode(), 1, "OSError: \x1b[2J"), r"failed: OSError: \\x1b\[2J"),
        (Ended(b"", 3, ""), "exit code 3"),
    ],
)
def test_a_process_that_gives_no_scores_is_one_error(monkeypatch: pytest.MonkeyPatch, ended: Ended, told: str) -> None:
    monkeypatch.setattr(replay, "run_apart", lambda *_, **__: ended)
    task = SimpleNamespace(instances=[SimpleNamespace(doc_id=0, idx=0, doc={}, resps=["text"])])
    with pytest.raises(UsageError, match=told) as error:
        scored_apart(["a"], Loaded({"tasks": {"a": task}, "groups": {}}, ["a"]), Asked(("a",)))
    assert len(error.value.problems) == 1
    assert "is kept" in error.value.hint


def request(item: int, doc: dict[str, Any]) -> Any:
    return SimpleNamespace(task_name="a", doc_id=item, idx=0, doc=doc)


def test_answers_are_given_in_their_order_and_for_their_items_alone() -> None:
    first, second = {"q": "one"}, {"q": "two"}
    model = ReplayedModel({"a": [[0, 0, digest_of(first), ["x", "y"]], [1, 0, digest_of(second), ["z"]]]})
    assert model.generate_until([request(0, first), request(0, first), request(1, second)]) == ["x", "y", "z"]
    with pytest.raises(ValueError, match="item 1 of a is not the one"):
        ReplayedModel({"a": [[1, 0, digest_of(first), ["z"]]]}).generate_until([request(1, second)])
