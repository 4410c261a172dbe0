"""The table of the study, from the files of scores."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from recipes import Merge
from runs import Study, of_form
from skills import SKILLS
from transformers import AutoTokenizer
from written import folds, general_texts, task

NOT_MERGED = "-"  # in place of a form


@dataclass(frozen=True)
class Size:
    """How long the texts of a fold are together."""

    tokens: int
    bytes: int


@dataclass(frozen=True)
class Row:
    """A model's scores, those of skills with their standard errors."""

    merge: str
    form: str  # how it is relaxed
    skills: dict[str, tuple[float, float]]  # exact match, a fraction
    nll: float  # of the general texts, nats a token
    change: tuple[float, float]  # of `nll` against the base, fold by fold, and its standard error


def write(study: Study, merges: Sequence[Merge]) -> str:
    """Write results.json and results.md of all models that are scored; returns the table."""
    rows = list(_rows(study, merges))
    told = (
        f"{study.items} held-out items of each skill: exact match, with its standard error. General texts: loss in "
        "nats a token, and its change against the base, with the standard error of the change over the texts' folds."
    )
    text = "\n".join([told, "", *_table(rows)]) + "\n"
    (study.work / "results.json").write_text(json.dumps([asdict(row) for row in rows], indent=1), encoding="utf-8")
    (study.work / "results.md").write_text(text, encoding="utf-8")
    return text


def _rows(study: Study, merges: Sequence[Merge]) -> Iterator[Row]:
    named = [(name, NOT_MERGED, study.scores(name)) for name in ("base", *SKILLS)]
    named += [(one.name, form, study.scores(of_form(one, form))) for one in merges for form in one.forms]
    listed = {file for _, _, file in named}
    others = sorted(study.scores("any").parent.glob("*.json"))
    named += [(file.stem, NOT_MERGED, file) for file in others if file not in listed]
    sizes = _sizes(study)
    base = _losses(_read(study.scores("base")), sizes)
    for name, form, file in named:
        if file.exists():
            yield _row(name, form, _read(file), base, sizes)


def _read(file: Path) -> dict[str, Any]:
    scores: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))["scores"]
    return scores


def _row(name: str, form: str, scores: dict[str, Any], base: Sequence[float], sizes: Sequence[Size]) -> Row:
    losses = _losses(scores, sizes)
    changes = [loss - before for loss, before in zip(losses, base, strict=True)]
    spread = statistics.stdev(changes) / math.sqrt(len(changes))
    skills = {skill: (float(scores[task(skill)]["value"]), float(scores[task(skill)]["stderr"])) for skill in SKILLS}
    return Row(name, form, skills, _mean(losses, sizes), (_mean(changes, sizes), spread))


def _losses(scores: dict[str, Any], sizes: Sequence[Size]) -> list[float]:
    """The loss of each fold of the general texts, nats a token, from bits a byte."""
    bits = [float(scores[task(fold)]["value"]) for fold in folds()]
    return [value * math.log(2) * size.bytes / size.tokens for value, size in zip(bits, sizes, strict=True)]


def _mean(values: Sequence[float], sizes: Sequence[Size]) -> float:
    """The mean over tokens of a value of each fold."""
    return statistics.fmean(values, weights=[size.tokens for size in sizes])


def _sizes(study: Study) -> list[Size]:
    tokenizer = AutoTokenizer.from_pretrained(study.places.base)
    return [
        Size(sum(len(tokenizer.encode(text)) for text in fold), sum(len(text.encode()) for text in fold))
        for fold in general_texts()[0]
    ]


def _table(rows: Sequence[Row]) -> Iterator[str]:
    yield f"| merge | form | {' | '.join(f'{skill} %' for skill in SKILLS)} | general NLL | change |"
    yield "|---|---|" + "---|" * (len(SKILLS) + 2)
    for row in rows:
        skills = [f"{100 * value:.1f} ± {100 * error:.1f}" for value, error in row.skills.values()]
        change, error = row.change
        yield f"| {row.merge} | {row.form} | {' | '.join(skills)} | {row.nll:.3f} | {change:+.3f} ± {error:.3f} |"
