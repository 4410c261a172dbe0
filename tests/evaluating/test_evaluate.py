"""`evaluate`: the command, from local task files to scores.json; what it refuses, all at once and before work."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import adapters
import lm_eval
import nltk
import pytest
import tiny

from lowmem_aim.evaluating import tasks
from lowmem_aim.evaluating.generation import WritingModel
from lowmem_aim.evaluating.scores import read_scores
from lowmem_aim.evaluating.tasks import Asked
from lowmem_aim.system.files import cache_folder

ITEMS = [{"q": f"{a} + {b} =", "choices": [str(a + b), str(a + b + 1)], "label": 0} for a in range(4) for b in range(5)]
TEXTS = [{"text": "one two three " * n} for n in (1, 4, 20)]
CHOICE = """
task: sums
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/items.jsonl}}
test_split: test
fewshot_split: test
num_fewshot: 1
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_target: label
doc_to_choice: choices
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
FLOW = """
task: flow
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/texts.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}]
"""
CODED = CHOICE.replace("task: sums", "task: coded").replace('"{{q}}"', "!function code.text")
WRITES = """
task: writes
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/items.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{q}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["."], max_gen_toks: 4, do_sample: false}
metric_list: [{metric: exact_match}]
"""
LONG = "include: writes.yaml\ntask: long\ngeneration_kwargs: {until: ['.'], max_gen_toks: 500}\n"
RUNS = "include: writes.yaml\ntask: runs\nunsafe_code: true\n"
# The harness' own files, with their filters and metrics, on items that are here.
OWN = Path(lm_eval.__file__).parent / "tasks"
GSM8K = f"""
include: {OWN / "gsm8k" / "gsm8k.yaml"}
dataset_path: json
dataset_name: null
dataset_kwargs: {{data_files: {{test: FOLDER/sums.jsonl, train: FOLDER/sums.jsonl}}}}
num_fewshot: 0
"""
HUMANEVAL = f"""
include: {OWN / "humaneval" / "humaneval.yaml"}
dataset_path: json
dataset_kwargs: {{data_files: {{test: FOLDER/functions.jsonl}}}}
"""
MBPP = f"""
include: {OWN / "mbpp" / "mbpp.yaml"}
dataset_path: json
dataset_name: null
dataset_kwargs: {{data_files: {{test: FOLDER/problems.jsonl}}}}
"""
IFEVAL = f"""
include: {OWN / "ifeval" / "ifeval.yaml"}
dataset_path: json
dataset_kwargs: {{data_files: {{train: FOLDER/items.jsonl}}}}
"""
FUNCTIONS = [
    {"prompt": f"def f{n}(a, b):\n", "test": "def check(f):\n    assert f(1, 2) == 3", "entry_point": f"f{n}"}
    for n in range(2)
]
PROBLEMS = [{"task_id": n, "text": "Say 1.", "code": "", "test_list": ["assert f() == 1"] * 3} for n in range(2)]
SUMS = [{"question": f"{a} and 2?", "answer": f"It is\n#### {a + 2}"} for a in range(3)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model `model`, and task files in `tasks`."""
    folder = tmp_path_factory.mktemp("evaluate")
    tiny.build("llama", folder / "model")
    own = folder / "tasks"
    own.mkdir()
    rows = {"items": ITEMS, "texts": TEXTS, "sums": SUMS, "functions": FUNCTIONS, "problems": PROBLEMS}
    for name, some in rows.items():
        (own / f"{name}.jsonl").write_text("\n".join(map(json.dumps, some)))
    texts = {"sums": CHOICE, "flow": FLOW, "coded": CODED, "writes": WRITES, "long": LONG, "runs": RUNS}
    texts |= {"gsm8k": GSM8K, "humaneval": HUMANEVAL, "mbpp": MBPP, "ifeval": IFEVAL}
    for name, text in texts.items():
        (own / f"{name}.yaml").write_text(text.replace("FOLDER", str(own)))
    (own / "included.yaml").write_text("include: coded.yaml\ntask: included\n")
    (own / "code.py").write_text(
        f"import pathlib\npathlib.Path({str(folder / 'ran')!r}).touch()\ndef text(doc): return doc['q']\n"
    )
    return folder


def line(place: Path, out: Path, *more: str, names: str = "sums,flow") -> tuple[str, ...]:
    return (
        "evaluate",
        str(place / "model"),
        "--tasks",
        names,
        "--include-path",
        str(place / "tasks"),
        "-o",
        str(out),
        *more,
    )


def test_what_needs_the_most_memory_is_asked_first(place: Path) -> None:
    found = tasks.loaded(Asked(("writes", "sums", "flow"), (place / "tasks",))).tasks["tasks"]
    assert list(found) == ["flow", "sums", "writes"]


def test_scores_are_written_and_known_again(place: Path, tmp_path: Path, run: Any) -> None:
    out = tmp_path / "scores.json"
    done = run(*line(place, out))
    assert (done.code, done.out) == (0, f"{out}\n"), done.err
    scores = read_scores(out)
    assert (scores.name, scores.method, scores.relaxed) == ("model", None, False)
    assert scores.settings == {"seed": 1234, "limit": None, "num_fewshot": None, "chat_template": False, "settings": {}}
    sums, flow = scores.scores["sums"], scores.scores["flow"]
    assert (sums.metric, sums.n, sums.unit, 0 <= sums.value <= 1) == ("acc", len(ITEMS), "", True)
    assert sums.stderr
    assert (flow.metric, flow.n, flow.stderr, flow.in_volume) == ("word_perplexity", len(TEXTS), None, False)
    assert not out.with_name("scores.json.partial").exists()
    (kept,) = (cache_folder() / "answers").iterdir()
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    again = run(*line(place, tmp_path / "again.json", "--ram", "1GB", "--json"))
    events = [json.loads(text) for text in again.out.splitlines()]
    begun = [event for event in events if event["event"] == "phase_started"]
    assert begun
    assert all(event["done"] == event["total"] for event in begun)
    assert read_scores(tmp_path / "again.json").scores == scores.scores


def test_another_metric_can_be_asked_for(place: Path, tmp_path: Path, run: Any) -> None:
    out = tmp_path / "scores.json"
    assert run(*line(place, out, "--metric", "sums=acc_norm", "--limit", "6", names="sums")).code == 0
    assert (read_scores(out).scores["sums"].metric, read_scores(out).scores["sums"].n) == ("acc_norm", 6)
    refused = run(*line(place, tmp_path / "other.json", "--metric", "sums=f1", names="sums"))
    assert (refused.code, "`acc`, `acc_norm`" in refused.err) == (2, True), refused.err


def test_what_is_wrong_is_told_at_once_and_before_work(
    place: Path, tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lm_eval.tasks.manager.__file__", str(place / "model" / "manager.py"))  # its own are thousands
    taken = tmp_path / "taken.json"
    taken.write_text("{}")
    told = run(
        "evaluate", str(place / "none"), "--tasks", "sums", "--include-path", str(place / "no"), "-o", str(taken)
    )
    assert told.code == 2
    for part in ("taken.json` exists already", "no folder of tasks", "there is no model folder"):
        assert part.split("of tasks")[0].strip() in told.err, told.err
    assert taken.read_text() == "{}"
    unknown = run(*line(place, tmp_path / "out.json", names="sums,flwo"))
    assert (unknown.code, "did you mean `flow`" in unknown.err) == (2, True), unknown.err
    assert run(*line(place, tmp_path / "out.txt")).code == 2
    assert not list(tmp_path.glob("out*"))


def test_code_of_a_task_file_runs_only_if_that_is_allowed(place: Path, tmp_path: Path, run: Any) -> None:
    for name in ("coded", "included"):
        refused = run(*line(place, tmp_path / "out.json", names=name))
        assert (refused.code, "code.text" in refused.err, "--allow-task-code" in refused.err) == (2, True, True)
    assert not (place / "ran").exists()
    assert run(*line(place, tmp_path / "out.json", "--allow-task-code", names="coded")).code == 0
    assert (place / "ran").exists()


def test_a_task_lets_the_model_write_and_is_told_of_before_work(place: Path, tmp_path: Path, run: Any) -> None:
    out = tmp_path / "scores.json"
    done = run(*line(place, out, "--limit", "3", "--ram", "1MB", "--batch-size", "2", names="writes"))
    assert done.code == 0, done.err
    told = next(text for text in done.err.splitlines() if text.startswith("`writes`"))
    for part in ("3 texts, 12 tokens at most", "not kept to", "are read from disk for each token"):
        assert part in told
    assert done.err.index(told) < done.err.index("evaluate: 0 of 3")
    score = read_scores(out).scores["writes"]
    assert (score.metric, score.n, 0 <= score.value <= 1) == ("exact_match", 3, True)


def test_the_model_writes_last(place: Path, tmp_path: Path, run: Any) -> None:
    done = run(*line(place, tmp_path / "scores.json", "--limit", "3", "--json", names="writes,sums"))
    assert done.code == 0, done.out
    events = [json.loads(text) for text in done.out.splitlines()]
    totals = [event["total"] for event in events if event["event"] == "phase_started" and event["phase"] == "evaluate"]
    assert totals == [6, 3]


def test_gsm8k_is_scored_by_the_last_number(
    place: Path, tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["so 9, or 2", "#### 3", "5"]  # as answers to 0, 1 and 2 and 2: only the second is strict
    monkeypatch.setattr(WritingModel, "texts", lambda self, requests, known: texts)
    out = tmp_path / "scores.json"
    assert run(*line(place, out, "--max-length", "400", names="gsm8k")).code == 0
    assert read_scores(out).scores["gsm8k"].value == pytest.approx(2 / 3)
    strict = tmp_path / "strict.json"
    named = ("--metric", "gsm8k=exact_match,strict-match", "--max-length", "400")
    assert run(*line(place, strict, *named, names="gsm8k")).code == 0
    assert read_scores(strict).scores["gsm8k"].value == pytest.approx(1 / 3)


def test_what_the_model_cannot_write_is_refused_before_work(place: Path, tmp_path: Path, run: Any) -> None:
    for name, part in (("long", "up to 500 tokens"), ("runs", "`--allow-code-execution`")):
        refused = run(*line(place, tmp_path / "out.json", names=f"sums,{name}"))
        assert (refused.code, f"`{name}`" in refused.err, part in refused.err) == (2, True, True), refused.err
    adapter = adapters.write(
        tmp_path / "adapter", adapters.factors(adapters.shapes_of(place / "model", "q_proj.weight"))
    )
    own = line(place, tmp_path / "out.json", names="writes")
    refused = run(own[0], f"{place / 'model'}+{adapter}", *own[2:])
    assert (refused.code, "comes with an adapter" in refused.err) == (3, True), refused.err
    assert not list(tmp_path.glob("out*"))


def test_programs_that_the_model_writes_are_run_if_that_is_allowed(
    place: Path, tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = {"humaneval": ["    return a + b", "    return a - b"], "mbpp": ["def f(): return 1", "?"]}
    allowed = ("--allow-task-code", "--max-length", "2000")
    for name, written in texts.items():
        monkeypatch.setattr(WritingModel, "texts", lambda self, requests, known, written=written: written)
        refused = run(*line(place, tmp_path / "out.json", *allowed, names=name))
        assert (refused.code, f"`{name}` runs the programs" in refused.err) == (2, True), refused.err
        out = tmp_path / f"{name}.json"
        done = run(*line(place, out, *allowed, "--allow-code-execution", names=name))
        assert done.code == 0, done.err
        score = read_scores(out).scores[name]
        assert (score.metric, score.value, score.n) == (tasks.USUAL[name], 0.5, 2)
    assert not list(tmp_path.glob("out*"))


def test_words_that_a_task_would_fetch_are_missed_before_work(
    place: Path, tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    monkeypatch.setattr(nltk, "download", lambda *_, **__: print("no network"))
    refused = run(*line(place, tmp_path / "out.json", "--allow-task-code", "--max-length", "4000", names="ifeval"))
    assert (refused.code, "`punkt_tab`" in refused.err, refused.out) == (9, True, ""), refused.err
    assert not list(tmp_path.iterdir())


def test_the_models_chat_template_is_applied_or_missed_before_work(
    place: Path, tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    contexts: list[str] = []
    monkeypatch.setattr(
        WritingModel, "texts", lambda self, requests, known: [contexts.append(text) or "" for text, _ in requests]
    )
    own = line(place, tmp_path / "out.json", "--chat-template", "--limit", "1", names="writes")
    refused = run(*own)
    assert (refused.code, "`model` has no chat template" in refused.err) == (3, True), refused.err
    assert not list(tmp_path.glob("out*"))
    model = tiny.perturbed(place / "model", tmp_path / "chats", scale=0)
    (model / "chat_template.jinja").write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")
    assert run(own[0], model, *own[2:]).code == 0
    assert contexts == [f"<user>{ITEMS[0]['q']}"]


def test_a_better_task_is_proposed() -> None:
    (text,) = tasks.better(Asked(names=("hendrycks_math_algebra", "sums")))
    assert "`minerva_math`" in text


def test_without_the_harness_the_extra_is_named(
    place: Path, tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "HARNESS", "no_such_package")
    refused = run(*line(place, tmp_path / "out.json"))
    assert (refused.code, "lowmem-aim[eval]" in refused.err) == (2, True)


def test_a_budget_that_is_too_small_leaves_nothing_behind(place: Path, tmp_path: Path, run: Any) -> None:
    out = tmp_path / "scores.json"
    small = run(*line(place, out, "--no-cache", "--ram", "1MB"))
    assert small.code == 5, small.err
    assert "--max-length" in small.err
    assert not list(tmp_path.iterdir())
