"""The table of docs/architectures.md: written from results, and read to see whether a result is worse."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import transformers
from workers import Result

PAGE = Path(__file__).resolve().parents[2] / "docs" / "architectures.md"
OUTCOMES = {
    "right": "every tensor is what the plain computation gives",
    "notice": "right, with a notice of what is slower or stays as merged",
    "refused": "AIM is refused with a reason before any work; a merge without AIM works",
    "unbuilt": "no tiny model could be built, so nothing is known",
    "wrong": "a fault",
}
_BEST_FIRST = list(OUTCOMES)
_ROW = re.compile(r"^\| `([^`]+)` \| (\w+) \| (.*) \|$", re.MULTILINE)


def documented() -> dict[str, Result]:
    """The results that the page has, by model type."""
    rows = _ROW.findall(PAGE.read_text()) if PAGE.is_file() else []
    return {row[0]: Result(*row) for row in rows}


def worse_than_documented(result: Result, known: Mapping[str, Result]) -> Iterator[str]:
    """Yield a line for a result that is wrong, or worse than the page says."""
    before = known[result.model_type].outcome if result.model_type in known else "unbuilt"
    if result.outcome == "wrong" or _BEST_FIRST.index(result.outcome) > _BEST_FIRST.index(before):
        yield f"{result.model_type}: {result.outcome}, was {before}: {result.text}"


def write(results: Sequence[Result]) -> None:
    """Write the page: these results, and of other model types those that the page had."""
    table = documented() | {result.model_type: result for result in results}
    rows = [f"| `{r.model_type}` | {r.outcome} | {r.text.replace('|', '/')} |" for _, r in sorted(table.items())]
    meanings = [f"- **{outcome}**: {meaning}" for outcome, meaning in OUTCOMES.items() if outcome != "wrong"]
    page = _PAGE.format(
        version=transformers.__version__,
        count=len(table),
        summary=summary([*table.values()]),
        meanings="\n".join(meanings),
        rows="\n".join(rows),
    )
    PAGE.write_text(page)


def summary(results: Sequence[Result]) -> str:
    """Count the results of each outcome."""
    counts = Counter(result.outcome for result in results)
    return ", ".join(f"{counts[outcome]} {outcome}" for outcome in OUTCOMES if counts[outcome])


_PAGE = """# Architectures

A merge works for every architecture that transformers knows. AIM and ACM also run the base, block by block, and how
well that goes depends on the architecture. This table is written by `make test-architectures`: each of the {count}
causal language models of transformers {version} is built tiny with random weights, two experts of it are merged with
ties and AIM in float32, and every tensor is compared with a plain computation: the whole model in memory, hooks on its
modules, then the formulas.

A merge without AIM and ACM runs no model. `make test-loading` merges 47 models of all kinds, vision-language models and
encoders among them: each result is loaded by transformers, compared and run.

{summary}.

{meanings}

| model type | outcome | what was seen |
|---|---|---|
{rows}
"""
