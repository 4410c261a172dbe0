"""The harness' own six tasks of the AIM paper, on items of a Hub that is played: fetched, then evaluated without it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lm_eval
import pytest
from hub.data_sets import FUNCTIONS, write_data_sets
from hub.nltk_data import asked_for_nltk_data, nltk_files
from hub.playing import asked_for_data_sets, playing
from hub.server import Hub
from learned import learned

from lowmem_aim.evaluating import tasks
from lowmem_aim.evaluating.scores import read_scores
from lowmem_aim.evaluating.tasks import Asked

OWN = Path(lm_eval.__file__).parent / "tasks"
SIX = ("humaneval", "mbpp", "mmlu_anatomy", "minerva_math", "gsm8k", "ifeval")
LENGTH, WRITTEN = 112, 40  # tokens that the model reads and writes together, and writes
LIMITS = ("--max-length", str(LENGTH), "--set", f"gen_kwargs.max_gen_toks={WRITTEN}", "--batch-size", "8")


class Place:
    """A folder with what the Hub holds, what came from it, and the tasks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.hub = Hub(datasets=write_data_sets(folder / "hub"), files=nltk_files())
        # Only these folders of the harness are looked through: its whole index takes seconds.
        names = ("humaneval", "mbpp", "mmlu/default", "minerva_math", "gsm8k", "ifeval")
        self.tasks = (folder / "groups", *(OWN / name for name in names))
        self.tasks[0].mkdir()
        shutil.copy(OWN / "benchmarks" / "minerva_math.yaml", self.tasks[0])

    @property
    def asked(self) -> tuple[str, ...]:
        """The flags that ask for the six tasks."""
        folders = (word for task in self.tasks for word in ("--include-path", str(task)))
        return ("--tasks", ",".join(SIX), *folders, "--allow-task-code")

    def online(self) -> ExitStack:
        """Until the end of the block, the Hub and nltk's server answer."""
        stack = ExitStack()
        address = stack.enter_context(playing(self.hub))
        return self._asking(stack, address)

    def offline(self) -> ExitStack:
        """Until the end of the block, there is no network, and the libraries know it."""
        return self._asking(ExitStack(), "")

    def _asking(self, stack: ExitStack, address: str) -> ExitStack:
        stack.enter_context(asked_for_data_sets(address, self.folder / "cache"))
        stack.enter_context(asked_for_nltk_data(address, self.folder / "nltk"))
        return stack


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def answer(task: str, item: dict[str, Any]) -> str:
    """What a model that knows everything says of an item."""
    match task.split("_")[0]:
        case "humaneval":
            return str(item["canonical_solution"])
        case "mbpp":
            return f"{item['code']}\n[DONE]"
        case "mmlu":
            return " " + "ABCD"[item["answer"]]
        case "minerva":
            return f" {item['solution']}"
        case "gsm8k":
            return " " + item["answer"].splitlines()[-1]
    return " Yes."


def all_answers(folders: tuple[Path, ...]) -> dict[str, str]:
    """The answers to all that the six tasks ask, by the texts that a model is given."""
    asked = Asked(SIX, folders, allow_code=True, allow_execution=True)
    found = {}
    for name, task in tasks.loaded(asked).tasks["tasks"].items():
        task.set_config(key="num_fewshot", value=task.get_config("num_fewshot") or 0)
        task.set_fewshot_seed(seed=1234)
        task.build_all_requests()
        found |= {instance.args[0]: answer(name, instance.doc) for instance in task.instances}
    return found


def test_all_that_is_missing_is_told_before_work(place: Place, tmp_path: Path, run: Any, llama: Path) -> None:
    out = tmp_path / "scores.json"
    with place.offline():
        refused = run("evaluate", llama / "base", *place.asked, "--allow-code-execution", "-o", out)
    assert (refused.code, refused.out) == (9, ""), refused.err
    for name in place.hub.datasets:
        assert f"the data set `{name}`" in refused.err
    for told in ("(algebra, counting_and_probability, geometry, intermediate_algebra and 3 more)", "`punkt_tab`"):
        assert told in refused.err
    assert f"lowmem-aim evaluate --fetch --tasks {','.join(SIX)} --include-path" in refused.err
    assert not list(tmp_path.glob("scores*"))


def test_tasks_are_fetched_and_then_evaluated_without_a_network(place: Place, tmp_path: Path, run: Any) -> None:
    with place.online():
        done = run("evaluate", "--fetch", *place.asked)
    assert (done.code, done.out) == (0, ""), done.err
    for told in ("`cais/mmlu` (anatomy): 2 items", "`google/IFEval`: 2 items train", "nltk's `punkt_tab`"):
        assert told in done.err
    out = tmp_path / "scores.json"
    with place.offline():
        model = learned(tmp_path / "model", all_answers(place.tasks), LENGTH - WRITTEN)
        done = run("evaluate", model, *place.asked, *LIMITS, "--allow-code-execution", "-o", out)
    assert done.code == 0, done.err
    scores = read_scores(out)
    assert {name: score.value for name, score in scores.scores.items()} == dict.fromkeys(SIX, 1.0)
    assert {name: scores.scores[name].metric for name in ("humaneval", "mbpp")} == {
        "humaneval": "pass@1",
        "mbpp": "pass_at_1",
    }
    assert scores.scores["humaneval"].n == scores.scores["mbpp"].n == len(FUNCTIONS)
    assert scores.settings["settings"] == {"gen_kwargs.max_gen_toks": WRITTEN, "max_length": LENGTH}


@pytest.mark.long
def test_the_whole_of_mmlu_in_processes_of_their_own(tmp_path: Path, llama: Path) -> None:
    """All 57 subjects, found in the harness' whole index; the libraries read their settings from the environment."""
    subjects = [yaml.stem.removeprefix("mmlu_") for yaml in (OWN / "mmlu" / "default").glob("mmlu_*.yaml")]
    assert len(subjects) == 57
    hub = Hub(datasets=write_data_sets(tmp_path / "hub", subjects))
    out = tmp_path / "scores.json"
    names = ("--tasks", "mmlu,humaneval", "--quiet")

    def call(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
        variables = {**os.environ, "HF_HOME": str(tmp_path / "home"), **environment}
        command = [sys.executable, "-m", "lowmem_aim", "evaluate", *map(str, words), *names]
        return subprocess.run(command, env=variables, capture_output=True, text=True, check=False)

    evaluation = (llama / "base", "--allow-code-execution", "-o", out, *LIMITS)
    refused = call(*evaluation, HF_HUB_OFFLINE="1")
    assert (refused.returncode, "and 53 more" in refused.stderr) == (9, True), refused.stderr
    with playing(hub) as address:
        fetched = call("--fetch", HF_HUB_OFFLINE="0", HF_ENDPOINT=address)
    assert fetched.returncode == 0, fetched.stderr
    done = call(*evaluation, HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    scores = json.loads(out.read_text())["scores"]
    assert (scores["mmlu"]["n"], scores["humaneval"]["n"]) == (114, 2)
