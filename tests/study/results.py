"""The table of the study, from the files of scores."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from recipes import Merge
from runs import Study, of_form
from skills import SKILLS
from transformers import AutoTokenizer
from written import GENERAL, general_texts, task

NOT_MERGED = "-"  # in place of a form


@dataclass(frozen=True)
class Row:
    """A model's scores, each with its standard error."""

    merge: str
    form: str  # how it is relaxed
    skills: dict[str, tuple[float, float]]  # exact match, a fraction
    nll: tuple[float, float]  # of the general texts, nats a token


def write(study: Study, merges: Sequence[Merge]) -> str:
    """Write results.json and results.md of all models that are scored; returns the table."""
    rows = list(_rows(study, merges))
    (study.work / "results.json").write_text(
        json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8"
    )
    text = "\n".join(_table(rows))
    (study.work / "results.md").write_text(text + "\n", encoding="utf-8")
    return text


def _rows(study: Study, merges: Sequence[Merge]) -> Iterator[Row]:
    named = [(name, NOT_MERGED, study.scores(name)) for name in ("base", *SKILLS)]
    named += [(one.name, form, study.scores(of_form(one, form))) for one in merges for form in one.forms]
    listed = {file for _, _, file in named}
    others = sorted(study.scores("any").parent.glob("*.json"))
    named += [(file.stem, NOT_MERGED, file) for file in others if file not in listed]
    nats = _nats_a_token(study)
    for name, form, file in named:
        if file.exists():
            yield _row(name, form, json.loads(file.read_text(encoding="utf-8"))["scores"], nats)


def _row(name: str, form: str, scores: dict[str, Any], nats: float) -> Row:
    value, error = _value(scores[task(GENERAL)])
    return Row(name, form, {skill: _value(scores[task(skill)]) for skill in SKILLS}, (value * nats, error * nats))


def _value(score: dict[str, Any]) -> tuple[float, float]:
    return float(score["value"]), float(score["stderr"] or 0.0)


def _nats_a_token(study: Study) -> float:
    """Nats a token that one bit a byte is, on the general texts that are asked: the same factor for every model."""
    tokenizer = AutoTokenizer.from_pretrained(study.places.base)
    texts = general_texts()[0][: study.items]
    tokens = sum(len(tokenizer.encode(text)) for text in texts)
    return math.log(2) * sum(len(text.encode()) for text in texts) / tokens


def _table(rows: Sequence[Row]) -> Iterator[str]:
    yield f"| merge | form | {' | '.join(f'{skill} %' for skill in SKILLS)} | general NLL |"
    yield "|---|---|" + "---|" * (len(SKILLS) + 1)
    for row in rows:
        skills = [f"{100 * value:.1f} ± {100 * error:.1f}" for value, error in row.skills.values()]
        value, error = row.nll
        yield f"| {row.merge} | {row.form} | {' | '.join(skills)} | {value:.3f} ± {error:.3f} |"
