"""Tiny data sets with the fields of those that the six tasks of the AIM paper read, as folders of the Hub.

Every item is invented here. The layout is the real one: parquet files below a folder for each configuration, which the
README names, or one .jsonl file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from datasets import ClassLabel, Dataset, Features, Value, disable_progress_bars
from datasets import Sequence as Listed

Row = dict[str, Any]
Splits = Mapping[str, Sequence[Row]]

# What functions are to return, and what their tests say of it.
FUNCTIONS = {
    "add": ("a + b", "(1, 2) == 3"),
    "less": ("a - b", "(5, 2) == 3"),
}
SUMS = [(1, 2), (2, 2), (3, 4)]
MATHS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)
# The keyword arguments of IFEval's instructions: every row has all of them, most null.
IFEVAL = {"num_words": "int64", "relation": "string", "num_sentences": "int64", "num_highlights": "int64"}


def humaneval() -> Splits:
    """`openai/openai_humaneval`: functions to be completed."""
    rows = [
        {
            "task_id": f"Made/{number}",
            "prompt": f"def {name}(a, b):\n",
            "canonical_solution": f"    return {value}\n",
            "test": f"def check(candidate):\n    assert candidate{call}\n",
            "entry_point": name,
        }
        for number, (name, (value, call)) in enumerate(FUNCTIONS.items())
    ]
    return {"test": rows}


def mbpp() -> Splits:
    """`google-research-datasets/mbpp`, `full`: programs to be written from a sentence and three tests."""
    rows = [
        {
            "task_id": 9000 + number,
            "text": f"Write a function {name} of two numbers.",
            "code": f"def {name}(a, b):\n    return {value}",
            "test_list": [f"assert {name}{call}"] * 3,
            "test_setup_code": "",
            "challenge_test_list": [],
        }
        for number, (name, (value, call)) in enumerate(FUNCTIONS.items())
    ]
    return {"test": rows, "train": rows, "validation": rows, "prompt": rows}


def mmlu(subject: str) -> Splits:
    """One subject of `cais/mmlu`: questions with four answers."""
    rows = [
        {
            "question": f"In {subject}, what is {a} plus {b}?",
            "subject": subject,
            "choices": [str(a + b + more) for more in range(4)],
            "answer": 0,
        }
        for a, b in SUMS[:2]
    ]
    return {"test": rows, "validation": rows, "dev": rows}


def mathematics(subject: str) -> Splits:
    """One subject of `EleutherAI/hendrycks_math`: problems whose solutions end with a boxed answer."""
    rows = [
        {
            "problem": f"What is ${a} + {b}$?",
            "level": "Level 1",
            "type": subject,
            "solution": f"It is $\\boxed{{{a + b}}}$.",
        }
        for a, b in SUMS[:2]
    ]
    return {"train": rows, "test": rows}


def gsm8k() -> Splits:
    """`openai/gsm8k`, `main`: sums in words, whose answers end with the number."""
    rows = [{"question": f"I have {a} and get {b}?", "answer": f"That is all.\n#### {a + b}"} for a, b in SUMS]
    return {"train": rows * 3, "test": rows}


def ifeval() -> Sequence[Row]:
    """`google/IFEval`: requests with instructions that can be checked."""
    asked: list[tuple[str, list[tuple[str, Row]]]] = [
        ("Write at least one word.", [("length_constraints:number_words", {"num_words": 1, "relation": "at least"})]),
        (
            "Write one sentence without commas.",
            [
                ("length_constraints:number_sentences", {"num_sentences": 3, "relation": "less than"}),
                ("punctuation:no_comma", {}),
            ],
        ),
    ]
    return [
        {
            "key": key,
            "prompt": prompt,
            "instruction_id_list": [name for name, _ in instructions],
            "kwargs": [dict.fromkeys(IFEVAL) | arguments for _, arguments in instructions],
        }
        for key, (prompt, instructions) in enumerate(asked, start=1)
    ]


MMLU_FEATURES = Features(
    {
        "question": Value("string"),
        "subject": Value("string"),
        "choices": Listed(Value("string")),
        "answer": ClassLabel(names=["A", "B", "C", "D"]),
    }
)


def write_data_sets(folder: Path, subjects: Sequence[str] = ("anatomy",)) -> dict[str, Path]:
    """Write all of them below `folder`, of MMLU these subjects; returns their folders by their names on the Hub."""
    disable_progress_bars()
    configurations: dict[str, tuple[dict[str, Splits], Features | None]] = {
        "openai/openai_humaneval": ({"openai_humaneval": humaneval()}, None),
        "google-research-datasets/mbpp": ({"full": mbpp()}, None),
        "cais/mmlu": ({subject: mmlu(subject) for subject in subjects}, MMLU_FEATURES),
        "EleutherAI/hendrycks_math": ({subject: mathematics(subject) for subject in MATHS}, None),
        "openai/gsm8k": ({"main": gsm8k(), "socratic": gsm8k()}, None),
    }
    for name, (tables, features) in configurations.items():
        _write_parquet(folder / name, tables, features)
    lines = folder / "google/IFEval" / "ifeval_input_data.jsonl"
    lines.parent.mkdir(parents=True)
    lines.write_text("".join(json.dumps(row) + "\n" for row in ifeval()))
    return {name: folder / name for name in (*configurations, "google/IFEval")}


def _write_parquet(folder: Path, tables: Mapping[str, Splits], features: Features | None) -> None:
    """Write the splits of each configuration, and the README that says where they are."""
    for name, splits in tables.items():
        (folder / name).mkdir(parents=True)
        for split, rows in splits.items():
            Dataset.from_list(list(rows), features=features).to_parquet(
                folder / name / f"{split}-00000-of-00001.parquet"
            )
    configurations = [
        {
            "config_name": name,
            "data_files": [{"split": split, "path": f"{name}/{split}-*"} for split in splits],
        }
        for name, splits in tables.items()
    ]
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configurations})}---\n")
