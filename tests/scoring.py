"""Models with scores, as records and as files, for tests of comparisons."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowmem_aim.evaluating.scores import Score, Scores, write_scores

# Percent, as the AIM paper prints them (Llama-2-13B): two experts, their merge by DARE task arithmetic, without and
# with AIM.
TASKS = ("humaneval", "mbpp", "mmlu", "minerva_math", "gsm8k", "ifeval")
CODE = (17.07, 31.60, 52.91, 6.00, 24.10, 26.25)
MATH = (15.24, 27.60, 51.89, 13.10, 59.10, 21.58)
DARE = (16.46, 28.60, 51.96, 15.10, 64.70, 22.02)
DARE_AIM = (15.85, 29.60, 52.50, 14.80, 64.10, 21.91)


def fractions(percent: tuple[float, ...]) -> list[float]:
    """Percent as fractions, the doubles that the decimals stand for."""
    return [float(f"{value / 100:.4f}") for value in percent]


def model(name: str, scores: Mapping[str, float | Score], stderr: float | None = None, **facts: Any) -> Scores:
    """A model with scores by task, bare numbers with this standard error; `facts` are further fields of Scores."""
    full = {
        task: score if isinstance(score, Score) else Score(score, stderr, "acc", 100) for task, score in scores.items()
    }
    return Scores(name, full, **{"settings": {"seed": 0, "limit": None, "num_fewshot": None}, **facts})


def merge(name: str, scores: Mapping[str, float | Score], omega: float | None = None, **facts: Any) -> Scores:
    """A merge of the parent `p`, relaxed by AIM if there is an omega."""
    relaxed = {} if omega is None else {"aim": {"omega": omega, "calibration": "builtin"}}
    return model(name, scores, **{"method": "ties", "models": ("a", "b"), "parent": "p", **relaxed, **facts})


def written(folder: Path, *models: Scores) -> list[Path]:
    """The models as files of scores, each called after its model."""
    files = [folder / f"{found.name}.json" for found in models]
    for file, found in zip(files, models, strict=True):
        write_scores(file, found)
    return files


def by_hand(folder: Path, name: str, percent: tuple[float, ...], **facts: Any) -> Path:
    """A hand-written file of the paper's tasks."""
    file = folder / f"{name}.json"
    scores = dict(zip(TASKS, fractions(percent), strict=True))
    file.write_text(json.dumps({"name": name, "scores": scores, **facts}))
    return file


def paper(folder: Path) -> tuple[list[Path], list[Path]]:
    """The paper's rows as hand-written files: (the merge and the same with AIM, the experts)."""
    facts = {"method": "dare_linear", "models": ["Code", "Math"]}
    merges = [
        by_hand(folder, "DARE", DARE, **facts),
        by_hand(folder, "DARE + AIM", DARE_AIM, **facts, parent="DARE", aim={"omega": 0.4}),
    ]
    return merges, [by_hand(folder, "Code", CODE), by_hand(folder, "Math", MATH)]
