"""The table of a comparison: the paper's digits, what is chance is marked, and it fits every terminal."""

from __future__ import annotations

from pathlib import Path

import pytest
from scoring import merge, model, paper

from lowmem_aim.evaluating.columns import legend_of, shown_change, shown_value
from lowmem_aim.evaluating.comparison import Change, compared, read_all
from lowmem_aim.evaluating.scores import Score
from lowmem_aim.evaluating.table import markdown_rows, table_lines

PLAIN = merge("plain", {"a": 0.5, "b": 0.5}, stderr=0.03)
RELAXED = merge("relaxed", {"a": 0.6, "b": 0.7}, omega=0.4, stderr=0.04)


def test_the_papers_rows_to_the_last_printed_digit(tmp_path: Path) -> None:
    rows = list(markdown_rows(compared(*read_all(*paper(tmp_path)))))
    assert rows[4:] == [
        "| `DARE` | `dare_linear` | `Code, Math` | - | **16.46** | 28.60 | 51.96 | **15.10** | **64.70** | **22.02** | "
        "**0.2310** |",
        "| `DARE + AIM` | `dare_linear` | `Code, Math` | AIM 0.4 | 15.85 (-0.61) | **29.60 (+1.00)** | "
        "**52.50 (+0.54)** | 14.80 (-0.30) | 64.10 (-0.60) | 21.91 (-0.11) | 0.2272 (-1.65 %) |",
    ]
    assert rows[2].startswith("| `Code` | `(population)` | - | - | 17.07 | 31.60 | 52.91 | 6.00 | 24.10 | 26.25 | - |")


def test_the_documents_table_is_what_is_printed(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
    lines = table_lines(compared(*read_all(*paper(tmp_path))), None)
    assert "```\n" + "\n".join(lines) + "\n```\n" in page


def test_what_is_chance_is_marked_and_the_marks_are_explained() -> None:
    known = compared([PLAIN, RELAXED], [model("expert", {"a": 0.4, "b": 0.4}, stderr=0.03)])
    text, legend = "\n".join(table_lines(known, None)), "\n".join(legend_of(known))
    assert "+10.00≈" in text
    assert "+20.00" in text
    assert "+20.00≈" not in text
    assert "≈ smaller than two standard errors of the difference" in legend
    assert "?" not in text + legend
    mixed = compared([PLAIN, merge("relaxed", {"a": 0.6, "b": Score(0.7, None, "acc", 100)}, omega=0.4, stderr=0.04)])
    assert "+20.00?" in "\n".join(table_lines(mixed, None))
    assert "? no standard error is known" in "\n".join(legend_of(mixed))


def test_without_any_standard_error_one_line_says_it_for_all(tmp_path: Path) -> None:
    found = compared(*read_all(*paper(tmp_path)))
    assert not {"≈", "?"} & set("\n".join(table_lines(found, None)))
    assert "no standard error is known: may be chance" in list(legend_of(found))


def test_the_best_of_the_compared_models_is_marked() -> None:
    lines = list(table_lines(compared([PLAIN, RELAXED], [model("expert", {"a": 0.9, "b": 0.1})]), None, str.upper))
    assert "60.00*" in lines[-1]
    assert not [line for line in lines[:-1] if "*" in line], "neither the population nor who is alone"
    assert not [line for line in table_lines(compared([PLAIN]), None) if "*" in line]
    control = merge("control", {"a": 0.8, "b": 0.8}, omega=0.4, control="uniform")
    lines = list(table_lines(compared([PLAIN, RELAXED, control]), None, str.upper))
    assert "60.00*" in lines[-2]
    assert "*" not in lines[-1], "a control is no model to choose"


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120, 160, None])
def test_it_fits_the_terminal_and_keeps_every_number(width: int | None) -> None:
    tasks = {f"leaderboard_task_{number}": 0.1 * number + 0.01234 for number in range(9)}
    names = [f"a-model-with-a-long-name-that-differs-at-its-end-{end}" for end in ("one", "two")]
    found = compared([merge(name, tasks, omega, stderr=0.01) for name, omega in zip(names, (None, 0.2), strict=True)])
    lines = list(table_lines(found, width))
    assert max(map(len, lines)) <= (width or 1000)
    text = "\n".join(lines)
    for number in range(9):
        assert f"{100 * (0.1 * number + 0.01234):.2f}" in text
    first = [line.split()[0] for line in lines if line.startswith("a-")]
    assert len(set(first)) == 2, "a name that is cut still says which of the two it is"


def test_names_from_files_do_not_reach_the_terminal_or_markdown_raw() -> None:
    wild = model("\x1b[2J|`**x**`\n", {"\x1b[1m<b>": 0.5}, method="\x1b|", models=("a|b\x07",))
    found = compared([wild], [model("p\x1b", {"\x1b[1m<b>": 0.5})])
    rows = list(markdown_rows(found))
    text = "\n".join((*table_lines(found, 60), *rows, *legend_of(found), *found.notes))
    assert text.replace("\n", "").isprintable()
    assert {row.count("|") for row in rows} == {rows[0].count("|")}


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [(0.1646, "", "16.46"), (1.0, "", "100.00"), (12.5, "w", "12.50"), (0.6543, "w", "0.6543"), (1234.4, "w", "1234")],
)
def test_fractions_are_shown_in_percent_and_others_in_their_unit(value: float, unit: str, text: str) -> None:
    assert shown_value(value, unit) == text


def test_a_change_that_rounds_to_nothing_has_no_sign() -> None:
    assert [shown_change(Change(value, None), "") for value in (1e-9, -1e-9, 0.0, -0.00005)] == ["0.00"] * 3 + ["-0.01"]
    assert shown_change(Change(-0.25, None), "bits") == "-0.25"
