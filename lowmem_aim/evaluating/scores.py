"""scores.json: what a model scored on each task, and what model it is; read, checked and written.

A file with the key `schema` has every key of `Scores`. One without it is written by hand: it needs `name` and `scores`
alone, and a score may be a bare number. Scores are fractions; one that has a unit, such as a perplexity, is none.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lowmem_aim.errors import ModelError, UsageError, did_you_mean, printable
from lowmem_aim.models.config import load_json
from lowmem_aim.recipe.words import CONTROLS
from lowmem_aim.system.files import write_file

SCHEMA = 1
MAX_BYTES = 10_000_000  # of a file; a recipe with a filter for every tensor has some hundred kB
_HINT = "docs/evaluation.md describes the file"
# What an evaluation was made with: scores of other settings are not compared. A hand-written file may lack any.
SETTINGS = ("seed", "limit", "num_fewshot", "chat_template", "settings")
# The harness' metrics that are no fractions -> their unit, and whether more is better.
UNITS = {
    "perplexity": ("perplexity", False),
    "word_perplexity": ("perplexity of a word", False),
    "byte_perplexity": ("perplexity of a byte", False),
    "bits_per_byte": ("bits per byte", False),
    "brier_score": ("Brier score", False),
    "mcc": ("correlation", True),
    "bleu": ("BLEU points", True),
    "chrf": ("chrF points", True),
    "ter": ("TER points", False),
}


@dataclass(frozen=True)
class Score:
    """A model's score on one task: a fraction in [0, 1], or a number with a unit."""

    value: float
    stderr: float | None = None  # standard error of the value, in its unit; None if it is not known
    metric: str = ""
    n: int | None = None  # items that were scored
    unit: str = ""  # "": the value is a fraction
    higher_is_better: bool = True

    @classmethod
    def of_metric(cls, metric: str, value: float, stderr: float | None, n: int | None) -> Score:
        """The score by a metric of the harness, with the unit that the metric has."""
        return cls(value, stderr, metric, n, *UNITS.get(metric, ("", True)))

    @property
    def in_volume(self) -> bool:
        """Whether the score can be a side of a hypervolume: a fraction of which more is better."""
        return not self.unit and self.higher_is_better

    def as_json(self) -> dict[str, Any]:
        """The score as it stands in a file: a unit and a direction only where they are not the usual ones."""
        table, usual = asdict(self), Score.of_metric(self.metric, self.value, None, None)
        if not self.unit:
            del table["unit"]
        if self.higher_is_better == usual.higher_is_better:
            del table["higher_is_better"]
        return table


@dataclass(frozen=True)
class Scores:
    """The content of a scores.json: a model, where it came from, and its score on each task."""

    name: str
    scores: Mapping[str, Score]  # by task
    model: str | None = None  # folder or Hub id
    digest: str | None = None  # of the model's tensors, config and tokenizer
    method: str | None = None  # that merged it
    models: tuple[str, ...] = ()  # that were merged
    recipe: Any = None  # as normalised: a mapping, or a list of one for each stage
    aim: Mapping[str, Any] | None = None
    acm: Mapping[str, Any] | None = None
    control: str | None = None  # that replaced AIM's factors
    # Digest of what identifies the unrelaxed merge. A merge has the same one relaxed or not; of a model that another
    # tool has merged, the relaxed one has the `digest` of what was relaxed. A hand-written file names its parent.
    parent: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)  # of the packages that evaluated it
    settings: Mapping[str, Any] = field(default_factory=dict)  # those of SETTINGS that are known

    @property
    def relaxed(self) -> bool:
        """Whether the model is a merge that was relaxed, by AIM, a control of AIM, or ACM."""
        return any(value is not None for value in (self.aim, self.acm, self.control))

    def as_json(self) -> dict[str, Any]:
        """The file's content, by the keys in their documented order."""
        table = {name: getattr(self, name) for name in _KEYS} | {"models": list(self.models)}
        table["scores"] = {task: score.as_json() for task, score in self.scores.items()}
        settings = dict.fromkeys(SETTINGS[:3]) | dict(self.settings)
        return {"schema": SCHEMA, **table, "versions": dict(self.versions), **settings}


_KEYS = ("name", "model", "digest", "method", "models", "recipe", "aim", "acm", "control", "parent")
_EVERY = ("schema", *_KEYS, "scores", "versions", *SETTINGS)
_REQUIRED = ("schema", *_KEYS, "scores", "versions", *SETTINGS[:3])


def write_scores(file: Path, scores: Scores) -> None:
    """Write a scores.json, whole or not at all. Raises DiskError, and UsageError for scores that could not be read."""
    scores_of(table := scores.as_json(), file)
    write_file(file, (json.dumps(table, indent=2) + "\n").encode())


def read_scores(file: Path) -> Scores:
    """Read a scores.json, or a hand-written file of scores. Raises UsageError with everything that is wrong with it."""
    try:
        table = load_json(file, MAX_BYTES)
    except ModelError as error:
        raise UsageError(
            error.problems, [_HINT if hint == error.usual_hint else hint for hint in error.hints]
        ) from error
    return scores_of(table, file)


def scores_of(table: Any, file: Path) -> Scores:
    """The scores in a file's JSON value. Raises UsageError with everything that is wrong with it."""
    problems = list(_problems(table))
    if problems:
        shown = printable(str(file))
        raise UsageError([f"`{shown}`: {problem}" for problem, _ in problems], [hint or _HINT for _, hint in problems])
    return Scores(
        name=table["name"],
        scores={task: _score(value) for task, value in table["scores"].items()},
        **{key: table.get(key) for key in _KEYS if key not in ("name", "models")},
        models=tuple(table.get("models") or ()),
        versions=table.get("versions") or {},
        settings={key: table[key] for key in SETTINGS if key in table},
    )


def _score(value: Any) -> Score:
    if not isinstance(value, dict):
        return Score(float(value))
    unit, higher = UNITS.get(value.get("metric") or "", ("", True))
    return Score(
        value=float(value["value"]),
        stderr=None if value.get("stderr") is None else float(value["stderr"]),
        metric=value.get("metric") or "",
        n=value.get("n"),
        unit=value.get("unit") or unit,
        higher_is_better=value.get("higher_is_better", higher),
    )


# --- checks -----------------------------------------------------------------------------------------------------------

_Problem = tuple[str, str]  # and its hint, or ""


def _is_number(value: Any) -> bool:
    """Whether it is a finite number; JSON as Python reads it has NaN and infinities, and numbers without end."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value.strip() != ""


def _is_table(value: Any) -> bool:
    return isinstance(value, dict)


# Key -> what its value must be if it is not null, and in words.
_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("model", "digest", "method", "parent"), (_is_text, "a text")),
    "control": (lambda value: value in CONTROLS, f"one of {', '.join(CONTROLS)}"),
    **dict.fromkeys(("aim", "acm", "versions", "settings"), (_is_table, "a table")),
    "models": (_is_texts, "a list of texts"),
    "recipe": (lambda value: isinstance(value, dict | list), "a table"),
    "seed": (lambda value: type(value) is int, "a whole number"),
    "limit": (lambda value: _is_number(value) and value > 0, "a positive number"),
    "num_fewshot": (_is_count, "a whole number"),
    "chat_template": (lambda value: isinstance(value, bool | str), "true, false or a text"),
}
_OF_A_SCORE: dict[str, tuple[Callable[[Any], bool], str]] = {
    "stderr": (lambda value: _is_number(value) and value >= 0, "a number that is not negative"),
    "metric": (lambda value: isinstance(value, str), "a text"),
    "n": (_is_count, "a whole number"),
    "unit": (lambda value: isinstance(value, str), "a text"),
}


def _problems(table: Any) -> Iterator[_Problem]:
    if not isinstance(table, dict):
        yield "it is not a JSON object", ""
        return
    if table.get("schema", SCHEMA) != SCHEMA:
        yield f"its `schema` is {_shown(table['schema'])}, and this version reads {SCHEMA}", "update lowmem-aim"
        return
    missing = [key for key in (_REQUIRED if "schema" in table else ("name", "scores")) if key not in table]
    if missing:
        yield f"it has no {', '.join(f'`{key}`' for key in missing)}", ""
    unknown = [key for key in table if key not in _EVERY]  # those of later versions are left alone, slips are not
    yield from ((f"`{printable(key)}` is no key{near}", "") for key in unknown if (near := did_you_mean(key, _EVERY)))
    if not _is_text(table.get("name", "-")):
        yield f"`name` is {_shown(table['name'])}, not a text", ""
    yield from _of_kinds(table, _KINDS, "")
    scores = table.get("scores", {"": 0})
    if not _is_table(scores) or not scores:
        yield f"`scores` is {_shown(scores)}, not a table with a score for each task", ""
        return
    for task, value in scores.items():
        yield from _wrong_score(f"`{printable(task)}`", value)


def _of_kinds(
    table: Mapping[str, Any], kinds: Mapping[str, tuple[Callable[[Any], bool], str]], where: str
) -> Iterator[_Problem]:
    for key, (fits, what) in kinds.items():
        if table.get(key) is not None and not fits(table[key]):
            yield f"{where}`{key}` is {_shown(table[key])}, not {what}", ""


def _wrong_score(task: str, value: Any) -> Iterator[_Problem]:
    table = value if _is_table(value) else {"value": value}
    if not _is_number(table.get("value")):
        yield f"{task} is {_shown(table.get('value'))}, not a number", ""
        return
    wrong = list(_of_kinds(table, _OF_A_SCORE, f"{task}: "))
    if not isinstance(table.get("higher_is_better", True), bool):
        wrong.append((f"{task}: `higher_is_better` is neither true nor false", ""))
    yield from wrong
    if not wrong and not _score(table).unit and not 0 <= table["value"] <= 1:
        percent = f"percent? divide by 100; {_HINT}" if 1 < table["value"] <= 100 else _HINT
        yield f"{task} is {_shown(table['value'])}, and a fraction lies between 0 and 1", percent


def _shown(value: Any) -> str:
    return printable(json.dumps(value), 60)
