"""Files that the study measures with: the harness' tasks, their held-out items, and texts to calibrate with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from experts import END, ITEMS_A_STEP, RATE, STEPS, prompt, training_items
from skills import SKILLS, Item, draw

ITEMS = 400  # held out, of a skill; how many of them are asked, the command line says
TEXTS = 256  # to calibrate with, of a skill
GENERAL = "general"
FOLDS = 9  # of the general texts: the harness has no standard error for a perplexity, but their spread gives one
CHARACTERS = 500  # of each text that perplexity is measured on: more would cost minutes a model
LONGEST_ANSWERS = {"math": 28, "instructions": 30, "code": 30}  # tokens
LAST_NUMBER = r"(-?\d+)\D*$"


def folds() -> list[str]:
    """The names of the folds of the general texts."""
    return [f"{GENERAL}-{fold + 1}" for fold in range(FOLDS)]


def task(name: str) -> str:
    """The name that the harness has for the task of a skill, or of a fold."""
    return f"study_{name}"


def held_out(skill: str) -> list[Item]:
    """The items that models are asked. Raises ValueError if one of them is trained on."""
    items = draw(skill, ITEMS, "held out", held_out=True)
    if {item.question for item in items} & {item.question for item in training_items(skill)}:
        raise ValueError(f"`{skill}` has items that are both trained on and asked")
    return items


def general_texts() -> tuple[list[list[str]], list[str]]:
    """The texts that come with lowmem-aim in two halves: to measure perplexity on, in folds, and to calibrate with."""
    file = resources.files("lowmem_aim").joinpath("data", "calibration.jsonl")
    texts = [str(json.loads(line)["text"]) for line in file.read_text(encoding="utf-8").splitlines()]
    measured = [text[:CHARACTERS] for text in texts[::2]]
    return [measured[fold::FOLDS] for fold in range(FOLDS)], texts[1::2]


def write_tasks(folder: Path) -> None:
    """Write a task for each skill, and one for the general texts, with their items."""
    for skill in SKILLS:
        items = [{"prompt": prompt(item.question), "answer": _expected(skill, item)} for item in held_out(skill)]
        _write_task(folder, skill, items, _writing(skill))
    for fold, texts in zip(folds(), general_texts()[0], strict=True):
        _write_task(folder, fold, [{"text": text} for text in texts], _reading())


def _expected(skill: str, item: Item) -> str:
    return item.answer.split()[-1] if skill == "math" else item.answer


def _writing(skill: str) -> dict[str, Any]:
    """What is particular to a task that has the model write an answer; of a worked one, the last number counts."""
    worked = [{"function": "regex", "regex_pattern": LAST_NUMBER}] if skill == "math" else []
    return {
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": [END, "\n"], "max_gen_toks": LONGEST_ANSWERS[skill], "do_sample": False},
        "filter_list": [
            {"name": "answer", "filter": [*worked, {"function": "remove_whitespace"}, {"function": "take_first"}]}
        ],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }


def _reading() -> dict[str, Any]:
    return {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    }


def _write_task(folder: Path, name: str, items: Iterable[Mapping[str, str]], particular: Mapping[str, Any]) -> None:
    data = folder / f"{name}.jsonl"
    _write_lines(data, items)
    source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
    text = yaml.safe_dump({"task": task(name), **source, **particular}, sort_keys=False)
    (folder / f"{name}.yaml").write_text(text, encoding="utf-8")


def write_texts(folder: Path) -> None:
    """Write the texts that merges are solved and relaxed with.

    For each skill: its own, its own without the answers, and its own in turn with general ones; and the general ones.
    """
    _, general = general_texts()
    _write_texts(folder / f"{GENERAL}.jsonl", general)
    for skill in SKILLS:
        items = training_items(skill)[:TEXTS]
        own = [prompt(item.question) + item.answer + END for item in items]
        _write_texts(folder / f"{skill}.jsonl", own)
        _write_texts(folder / f"{skill}-prompts.jsonl", [prompt(item.question) for item in items])
        both = [text for pair in zip(own, general, strict=False) for text in pair]
        _write_texts(folder / f"{skill}-and-general.jsonl", both)


def _write_texts(file: Path, texts: Iterable[str]) -> None:
    _write_lines(file, ({"text": text} for text in texts))


def _write_lines(file: Path, rows: Iterable[Mapping[str, str]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def settle(work: Path) -> None:
    """Write down what the models of a work folder are made and measured with, or compare it with what is there.

    Raises SystemExit if the folder is of a study with other items, texts or training.
    """
    items = {skill: [[asdict(item) for item in some(skill)] for some in (training_items, held_out)] for skill in SKILLS}
    made_with = [STEPS, ITEMS_A_STEP, RATE, items, general_texts()]
    digest = hashlib.sha256(json.dumps(made_with, sort_keys=True).encode()).hexdigest()
    work.mkdir(parents=True, exist_ok=True)
    file = work / "study.json"
    if file.exists() and json.loads(file.read_text(encoding="utf-8"))["digest"] != digest:
        raise SystemExit(f"`{work}` is of a study with other items, texts or training: name another folder")
    file.write_text(json.dumps({"digest": digest}) + "\n", encoding="utf-8")
