"""SIGKILL to the process group of an evaluation, at ten moments from start to end: the same scores, byte by byte.

The tasks are one of multiple choice, one that reads texts whole, and one in which the model writes; answers are kept in
the cache or beside the journal, in turn.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from crash.workshop import Ended, Job, at_call, build_models, emptied, ended, start

from lowmem_aim.measuring import snapshots

FEW = slice(3, None, 5)  # one in a block, one while the model writes
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/items.jsonl}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{q}}}}"
doc_to_target: {target}
{more}
metric_list: [{{metric: {metric}}}]
"""
TASKS = {
    "choice": ("multiple_choice", "label", "doc_to_choice: choices", "acc"),
    "flow": ("loglikelihood_rolling", '"{{q}}"', "", "word_perplexity"),
    "writes": (
        "generate_until",
        '"{{choices[0]}}"',
        "generation_kwargs: {until: ['.'], max_gen_toks: 6, do_sample: false}",
        "exact_match",
    ),
}
ITEMS = 12


def suite(job: Job, short: bool) -> str:
    work = emptied(job.work.parent / "evaluations")
    build_models(work, num_hidden_layers=3)
    save_tasks(work / "tasks")
    snapshots.SECONDS = 0.0  # every block is kept
    import_harness()
    whole = work / "whole.json"
    done = attempt(work, whole, "cache", lambda: None)
    assert done.code == 0, done
    expected, moments = whole.read_bytes(), kills()[FEW if short else slice(None)]
    for number, (told, kill) in enumerate(moments):
        out, cache = work / f"{number}.json", "cache" if number % 2 else "beside"
        killed = attempt(work, out, cache, kill)
        assert killed.code == -signal.SIGKILL, f"{told}: {killed}"
        assert not out.exists(), told
        finished = attempt(work, out, cache, lambda: None)
        assert finished.code == 0, f"{told}: {finished}"
        assert out.read_bytes() == expected, f"killed {told}: other scores"
        assert not out.with_name(f"{out.name}.partial").exists(), told
    return f"{len(moments)} kills ({'; '.join(told for told, _ in moments)}): the same scores"


def attempt(work: Path, out: Path, cache: str, before: Callable[[], object]) -> Ended:
    """Run the command in a fork that leads a process group; `before` prepares that process for its trouble."""

    def prepare() -> None:
        os.setsid()
        os.environ["XDG_CACHE_HOME"] = str(out.with_suffix(".cache"))
        before()

    command = ["evaluate", str(work / "base"), "--tasks", ",".join(TASKS), "--include-path", str(work / "tasks")]
    flags = ["--spill", "200kB", "--ram", "4GB", "--quiet", *["--no-cache"] * (cache == "beside")]
    return ended(*start([*command, *flags, "-o", str(out)], prepare))


def kills() -> list[tuple[str, Callable[[], object]]]:
    """Ten moments of a run, in order, and what kills the process group then."""
    from lowmem_aim.blocks.runner import BlockRunner
    from lowmem_aim.evaluating import likelihoods
    from lowmem_aim.evaluating.answers import Answers
    from lowmem_aim.evaluating.pace import MOST_TEXTS
    from lowmem_aim.evaluating.whole_model import WholeModel
    from lowmem_aim.jobs import evaluate
    from lowmem_aim.measuring.snapshots import Snapshots

    def at(owner: Any, name: str, number: int, after: bool = False) -> Callable[[], object]:
        return lambda: at_call(owner, name, number, lambda: os.killpg(0, signal.SIGKILL), after=after)

    return [
        ("before the model is digested", at(evaluate, "digest_of_model", 1)),
        ("in the first block", at(BlockRunner, "run_block", MOST_TEXTS + 3)),  # behind those that give the pace
        ("when a block is kept", at(Snapshots, "offer", 2, True)),
        ("in the third block", at(BlockRunner, "run_block", MOST_TEXTS + 31)),
        ("before the first round's answers are kept", at(Answers, "keep", 1)),
        ("when they are kept", at(Answers, "keep", 1, True)),
        ("before the second round is cut", at(likelihoods, "batches_of", 2)),
        ("before the model writes", at(WholeModel, "generate_until", 1)),
        ("after its third text", at(WholeModel, "generate_until", 3, True)),
        ("before the scores are written", at(evaluate, "write_scores", 1)),
    ]


def save_tasks(folder: Path) -> None:
    folder.mkdir()
    rows = [
        {"q": f"What is {n} and {n}? " * (n % 4 + 1), "choices": [f"It is {n + k}" for k in range(4)], "label": 0}
        for n in range(ITEMS)
    ]
    (folder / "items.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name, (kind, target, more, metric) in TASKS.items():
        text = TASK.format(name=name, folder=folder, kind=kind, target=target, more=more, metric=metric)
        (folder / f"{name}.yaml").write_text(text)


def import_harness() -> None:
    """Import what takes seconds once, for all forks."""
    for name in ("lm_eval.evaluator", "lm_eval.tasks", "lowmem_aim.evaluating.language_model", "datasets"):
        importlib.import_module(name)
