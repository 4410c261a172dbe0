"""scores.json: what is written is read again, and everything that is wrong with a file is told at once."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from lowmem_aim.errors import UsageError
from lowmem_aim.evaluating.scores import UNITS, Score, Scores, read_scores, write_scores

EVALUATED = Scores(
    name="ties-0.4",
    scores={
        "gsm8k": Score(0.25, 0.0125, "exact_match", 1200),
        "wikitext": Score.of_metric("word_perplexity", 12.5, None, 62),
        "own": Score(3.5, 0.1, "length", 10, unit="words", higher_is_better=False),
        "errors": Score(0.1, None, "error_rate", 10, higher_is_better=False),
    },
    model="merged/ties-0.4",
    digest="d0",
    method="ties",
    models=("math", "code"),
    recipe={"merge_method": "ties", "aim": {"omega": 0.4}},
    aim={"omega": 0.4, "calibration": "builtin"},
    control="uniform",
    parent="p0",
    versions={"lm_eval": "0.4.13"},
    settings={"seed": 0, "limit": 100, "num_fewshot": None, "chat_template": True, "settings": {"gen_kwargs": "x"}},
)
PAGE = Path(__file__).parents[2] / "docs" / "evaluation.md"


def written(file: Path, value: Any) -> Path:
    file.write_text(json.dumps(value))
    return file


def wrong(file: Path) -> tuple[str, ...]:
    """The problems of a file, without its name."""
    with pytest.raises(UsageError) as raised:
        read_scores(file)
    assert all(problem.startswith(f"`{file}`") for problem in raised.value.problems)
    return tuple(problem.removeprefix(f"`{file}`").removeprefix(": ") for problem in raised.value.problems)


def test_scores_that_were_written_are_read_as_they_were(tmp_path: Path) -> None:
    write_scores(tmp_path / "scores.json", EVALUATED)
    assert read_scores(tmp_path / "scores.json") == EVALUATED


def test_a_metric_that_is_no_fraction_keeps_its_unit(tmp_path: Path) -> None:
    for metric, (unit, higher) in UNITS.items():
        file = written(tmp_path / "by-hand.json", {"name": "a", "scores": {"t": {"value": 12.5, "metric": metric}}})
        read = read_scores(file).scores["t"]
        assert (read.unit, read.higher_is_better, read.in_volume) == (unit, higher, False)


def test_a_hand_written_file_needs_a_name_and_numbers_alone(tmp_path: Path) -> None:
    file = written(tmp_path / "by-hand.json", {"name": "Code", "scores": {"mbpp": 0.316, "humaneval": 1}})
    assert read_scores(file) == Scores("Code", {"mbpp": Score(0.316), "humaneval": Score(1.0)})


def test_what_no_later_reader_would_take_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="lies between 0 and 1"):
        write_scores(tmp_path / "scores.json", Scores("a", {"mbpp": Score(31.6)}))
    assert not list(tmp_path.iterdir())


def test_percent_is_not_taken_for_a_fraction(tmp_path: Path) -> None:
    file = written(tmp_path / "by-hand.json", {"name": "Code", "scores": {"mbpp": 31.6, "mmlu": 52.91, "ifeval": -0.1}})
    with pytest.raises(UsageError) as raised:
        read_scores(file)
    told = dict(zip(raised.value.problems, raised.value.hints, strict=True))
    assert [("31.6" in p, "52.91" in p, "-0.1" in p) for p in told] == [(1, 0, 0), (0, 1, 0), (0, 0, 1)]
    assert ["percent? divide by 100" in hint for hint in told.values()] == [True, True, False]


def test_all_that_is_wrong_with_a_file_is_told_at_once(tmp_path: Path) -> None:
    table = EVALUATED.as_json() | {"name": " ", "models": "math", "seed": "0", "limit": 0, "versions": []}
    del table["digest"]
    table["parnet"] = table.pop("parent")
    table["scores"] = {
        "a": None,
        "b": True,
        "c": {"value": 0.1, "stderr": -1, "n": 1.5},
        "d": {"value": 1e400, "metric": "perplexity"},
        "e": {"value": 0.5, "higher_is_better": "yes"},
    }
    problems = wrong(written(tmp_path / "scores.json", table))
    assert "it has no `digest`, `parent`" in problems
    assert "`parnet` is no key; did you mean `parent`?" in problems
    for key in ("name", "models", "seed", "limit", "versions", "a", "b"):
        assert [problem for problem in problems if problem.startswith(f"`{key}` is ")]
    assert "`c`: `stderr` is -1, not a number that is not negative" in problems
    assert "`c`: `n` is 1.5, not a whole number" in problems
    assert "`d` is Infinity, not a number" in problems
    assert "`e`: `higher_is_better` is neither true nor false" in problems
    assert len(problems) == 13


@pytest.mark.parametrize("text", ["", "[]", "{", '{"schema": 2}', '{"name": "a"}', '{"name": "a", "scores": {}}'])
def test_what_is_no_file_of_scores_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "scores.json"
    file.write_text(text)
    assert len(wrong(file)) == 1


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert wrong(tmp_path / "none.json") == (" cannot be read: there is no such file or folder",)


def test_keys_of_later_versions_are_left_alone(tmp_path: Path) -> None:
    table = EVALUATED.as_json() | {"carbon_kg": 1}
    assert read_scores(written(tmp_path / "scores.json", table)) == EVALUATED


def test_the_page_tells_every_key_and_no_other() -> None:
    section = PAGE.read_text().partition("## Files of scores\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `([^`]+)`", section, re.M)
    score = EVALUATED.as_json()["scores"]["own"]
    assert rows == [*EVALUATED.as_json(), *score]
