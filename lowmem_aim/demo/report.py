"""The demo from end to end: make, merge, compare, answer. The table shows what comes out, whatever it is."""

from __future__ import annotations

import io
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import transformers
from rich.console import Console
from rich.table import Table

from lowmem_aim.demo.evaluate import accuracies, answer, load
from lowmem_aim.demo.merges import OMEGA, calibrate, mean_factor, merge, write_recipe
from lowmem_aim.demo.models import Echo, Models, make
from lowmem_aim.demo.settings import Settings
from lowmem_aim.demo.skills import SKILLS, Example, evaluation
from lowmem_aim.view.wrapping import columns_of

QUESTIONS = 400  # of each skill
ANSWERS = 2  # of each skill, shown at the end


def show(folder: Path, settings: Settings, echo: Echo) -> None:
    """Do everything that `lowmem-aim demo FOLDER` does. Raises UsageError if `folder` is not the demo's."""
    transformers.utils.logging.disable_progress_bar()  # transformers shows one for every file that it writes
    models = make(folder, settings, echo)
    echo("")
    merged, factor = _merge(folder, models, echo)
    questions = {skill: evaluation(skill, QUESTIONS, settings.seed) for skill in SKILLS}
    rows = {"base": models.base, **{f"expert: {skill}": name for skill, name in models.experts.items()}, **merged}
    scores = {label: accuracies(folder / name, questions) for label, name in rows.items()}
    echo("")
    echo(table(scores))
    echo(
        f"Answers of {QUESTIONS} held-out questions a skill that are right to the last letter, in percent. AIM keeps "
        f"{factor:.1%} of the\ndelta on average; the control keeps that share of every element alike. "
        "Differences of a few points may be chance."
    )
    echo("")
    _answer(folder / "merged-aim", questions, echo)
    echo(f"\nEverything is in `{folder}`: the models, the recipes, and the merges with their model cards.")


def _merge(folder: Path, models: Models, echo: Echo) -> tuple[dict[str, str], float]:
    """(label -> folder of each merge, AIM's mean factor)."""
    calibrate(folder, models, echo)
    factor = mean_factor(folder, models)
    plain = write_recipe(folder, "ties.yml", models, aim=False)
    aim = write_recipe(folder, "ties-aim.yml", models, aim=True)
    control = write_recipe(folder, "ties-control.yml", models, aim=False, scale=factor)
    for recipe, out in ((plain, "merged"), (aim, "merged-aim"), (control, "merged-control")):
        merge(folder, recipe, out, echo)
    labels = ("merge (ties)", f"merge + AIM (omega {OMEGA:g})", f"control: merge, delta x {factor:.3f}")
    return dict(zip(labels, ("merged", "merged-aim", "merged-control"), strict=True)), factor


def table(scores: Mapping[str, Mapping[str, float]]) -> str:
    """A table in percent, with the mean of each row, from model -> skill -> share."""
    skills = list(next(iter(scores.values())))
    drawn = Table("model")
    for skill in (*skills, "mean"):
        drawn.add_column(skill, justify="right")
    for label, row in scores.items():
        shares = [row[skill] for skill in skills]
        drawn.add_row(label, *(f"{100 * share:.1f}" for share in (*shares, sum(shares) / len(shares))))
    text = io.StringIO()
    width = min(columns_of(sys.stdout) or 100, 100)
    Console(file=text, width=width, force_terminal=False, color_system=None).print(drawn)
    return text.getvalue().rstrip()


def _answer(folder: Path, questions: Mapping[str, Sequence[Example]], echo: Echo) -> None:
    model, tokenizer = load(folder)
    echo(f"The merged model with AIM, loaded by transformers from `{folder}`, answers:")
    for examples in questions.values():
        for example in examples[:ANSWERS]:
            written = answer(model, tokenizer, example.prompt)
            verdict = "right" if written == example.answer else f"wrong, {example.answer} is right"
            echo(f"  {example.prompt}{written}   ({verdict})")
