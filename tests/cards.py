"""What a model card and a terminal must never show, whatever names the models' makers chose."""

from __future__ import annotations

import re

import yaml


def assert_plain(text: str) -> None:
    """Assert that no line has a character that a terminal would obey."""
    assert all(line.isprintable() for line in text.split("\n"))


def assert_card(card: str) -> None:
    """Assert one front matter of our keys, our headings alone, and no markup of others outside code."""
    assert_plain(card)
    _, front, body = card.split("---\n", 2)
    assert list(yaml.safe_load(front)) == ["base_model", "library_name", "tags"]
    prose = re.sub(r"(?ms)^(`{3,})(?:yaml|text)\n.*?^\1$|`[^`\n]*`", "", body)
    prose = prose.replace("![The share that is left, layers by kinds of module](delta-kept.png)", "", 1)
    assert not set("<>`[") & set(prose)
    headings = re.findall(r"^#+ (\w+)", prose, re.MULTILINE)
    how = ["How"] * ("\n## How much of the delta is left\n" in prose)
    assert headings in (["A", *how, "Recipe", "Digests"], ["A", *how, "Recipe", "Digests", "Elements"])
