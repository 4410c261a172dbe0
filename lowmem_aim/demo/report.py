"""The demo from end to end: make, merge, compare, answer. The table shows what comes out, whatever it is."""

from __future__ import annotations

import io
import math
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import transformers
from rich.console import Console
from rich.table import Table

from lowmem_aim.demo.evaluate import accuracies, answer, load
from lowmem_aim.demo.merges import OMEGA, calibrate, merge, peak, write_recipe
from lowmem_aim.demo.models import Echo, Models, make
from lowmem_aim.demo.settings import Settings
from lowmem_aim.demo.skills import SKILLS, Example, evaluation
from lowmem_aim.view.summary import free_name, quoted
from lowmem_aim.view.wrapping import columns_of

QUESTIONS = 400  # of each skill
AIM_RECIPE = "ties-aim.yml"
WIDTH = 100  # columns of the text
ANSWERS = 2  # of each skill, shown at the end
CONTROL = "uniform"
_OF_THE_TABLE = (
    f"Exactly right answers to {QUESTIONS} held-out questions per skill, in percent. The control takes back as much of "
    "each tensor's delta as AIM, from all channels alike: a gain that it has as well is not AIM's."
)


def show(folder: Path, settings: Settings, echo: Echo, program: str) -> None:
    """Do everything that `lowmem-aim demo FOLDER` does. Raises UsageError if `folder` is not the demo's."""
    echo("the whole demo takes some four minutes on two cores, most of them for training; later runs reuse the models")
    models = _made(folder, settings, echo)
    echo(f"\n$ cd {quoted(folder)}")
    merged = _merge(folder, models, echo)
    questions = {skill: evaluation(skill, QUESTIONS, settings.seed) for skill in SKILLS}
    rows = {"base": models.base, **{f"expert: {skill}": name for skill, name in models.experts.items()}, **merged}
    echo(f"\nasking {len(rows)} models {QUESTIONS} questions of each skill")
    scores = {label: accuracies(folder / name, questions) for label, name in rows.items()}
    echo("")
    echo(table(scores))
    plain, aim, _ = (scores[label] for label in merged)
    for text in (_OF_THE_TABLE, what_can_be_told(plain, aim, QUESTIONS), _of_small_models(folder)):
        echo(textwrap.fill(text, min(columns_of(sys.stdout) or WIDTH, WIDTH)))
    echo("")
    _answer(folder / "merged-aim", questions, echo)
    echo(f"\nEverything is in `{folder}`: the models, the recipes, and the merges with their model cards.")
    again = free_name("merged-omega-0.2")
    echo("\nThe merge with AIM again, with less of the delta:")
    echo(f"    {program} merge {quoted(folder / AIM_RECIPE)} {again} --omega 0.2")
    _next(folder, models, echo, program)


def show_models(folder: Path, settings: Settings, echo: Echo, program: str) -> None:
    """Make the models alone, and print commands to try merges on them. Raises UsageError as `show`."""
    models = _made(folder, settings, echo)
    echo(f"The base and three experts are in `{folder}`. They have learnt little and only serve to try merges.")
    _next(folder, models, echo, program)


def _made(folder: Path, settings: Settings, echo: Echo) -> Models:
    transformers.utils.logging.disable_progress_bar()  # transformers shows one for every file that it writes
    return make(folder, settings, echo)


def _next(folder: Path, models: Models, echo: Echo, program: str) -> None:
    """Print the commands for a merge of the user's own, which work from the current folder."""
    recipe, out = free_name("recipe", ".yml"), free_name("merged")
    experts = " ".join(f"--expert {quoted(folder / expert)}" for expert in models.experts.values())
    echo("\nYour own merge of these models:")
    echo(f"    {program} init ties --base {quoted(folder / models.base)} {experts} -o {recipe}")
    echo(f"    {program} plan {recipe} {out}")
    echo(f"    {program} merge {recipe} {out}")


def what_can_be_told(plain: Mapping[str, float], aim: Mapping[str, float], questions: int) -> str:
    """Whether two rows of the table differ by more than chance, by two standard errors, counting each row by itself.

    Shares by skill, each of so many questions. That the rows answer the same questions can only make chance smaller.
    """
    variances = [(p * (1 - p) + q * (1 - q)) / questions for p, q in zip(plain.values(), aim.values(), strict=True)]
    skill, mean = 2 * math.sqrt(max(variances)), 2 * math.sqrt(sum(variances)) / len(variances)
    difference = (sum(aim.values()) - sum(plain.values())) / len(variances)
    verdict = "more than" if abs(difference) > mean else "no more than"
    return (
        f"The smallest difference that {questions} questions per skill can show (two standard errors): "
        f"{100 * skill:.1f} points in a skill, {100 * mean:.1f} in the mean. "
        f"With AIM, the mean differs by {100 * difference:+.1f} points: {verdict} chance."
    )


def _of_small_models(folder: Path) -> str:
    return (
        "This says nothing about AIM on large models. There, a few input channels are far more active than the others, "
        "and AIM keeps the merge close to the base in those. Models this small have no such channels: in a typical "
        f"module here, the most active one is only {peak(folder):.1f} times as active as the median."
    )


def _merge(folder: Path, models: Models, echo: Echo) -> dict[str, str]:
    """Make the merges; returns label -> folder of each."""
    calibrate(folder, models, echo)
    plain = write_recipe(folder, "ties.yml", models, aim=False)
    aim = write_recipe(folder, AIM_RECIPE, models, aim=True)
    control = write_recipe(folder, "ties-control.yml", models, aim=True, control=CONTROL)
    for recipe, out in ((plain, "merged"), (aim, "merged-aim"), (control, "merged-control")):
        merge(folder, recipe, out, echo)
    labels = ("merge (ties)", f"merge + AIM (omega {OMEGA:g})", f"control of AIM ({CONTROL})")
    return dict(zip(labels, ("merged", "merged-aim", "merged-control"), strict=True))


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
