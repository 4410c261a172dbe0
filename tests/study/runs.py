"""Merges and their scores, by the commands that a user would type; what is scored is not made again."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from recipes import FORMS, PLAIN, Merge, Places
from skills import SKILLS
from written import GENERAL, folds, task

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Study:
    """Where a study lies, and how much is asked of each model."""

    work: Path
    places: Places
    items: int  # of each skill
    batch: int  # answers that are written at a time

    def scores(self, name: str) -> Path:
        """The file of a model's scores: scores of other items are others."""
        return self.work / "scores" / f"{self.items}-items" / f"{name}.json"


def of_form(merge: Merge, form: str) -> str:
    """The name of a merge in one of its forms."""
    return merge.name if form == PLAIN else f"{merge.name}-{form}"


def merged_and_scored(merge: Merge, forms: Sequence[str], study: Study) -> None:
    """Make a merge in those of its forms that are not scored yet, score each, and remove them again."""
    left = [form for form in merge.forms if form in forms and not study.scores(of_form(merge, form)).exists()]
    if not left:
        return
    plain = study.work / "merged" / merge.name
    _merge(merge, plain, study)
    for form in left:
        model = plain if form == PLAIN else _relaxed(merge, form, plain, study)
        score(model, of_form(merge, form), study)
        if model != plain:
            shutil.rmtree(model)
    shutil.rmtree(plain)


def _merge(merge: Merge, out: Path, study: Study) -> None:
    recipe = study.work / "recipes" / f"{merge.name}.yml"
    recipe.parent.mkdir(parents=True, exist_ok=True)
    recipe.write_text(yaml.safe_dump(dict(merge.recipe), sort_keys=False), encoding="utf-8")
    out.parent.mkdir(parents=True, exist_ok=True)
    with _timed(f"{merge.name}: merged"):
        _command("merge", str(recipe), str(out))


def _relaxed(merge: Merge, form: str, plain: Path, study: Study) -> Path:
    """The merge in a relaxed form. It is relaxed afterwards, so that a method that takes long runs once."""
    base, activations = str(study.places.base), study.work / "activations.safetensors"
    if not activations.exists():
        texts = str(study.places.texts / f"{GENERAL}.jsonl")
        few = ["--samples", "40", "--calibration-dtype", "bfloat16"]
        _command("calibrate", base, "--calibration", texts, *few, "-o", str(activations))
    out = plain.with_name(of_form(merge, form))
    _command("relax", str(plain), str(out), "--base", base, "--calibration", str(activations), *FORMS[form])
    return out


def score(model: Path, name: str, study: Study) -> None:
    """Score a model on all tasks, unless that is done."""
    out = study.scores(name)
    if out.exists():
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    tasks = ["--tasks", ",".join(map(task, (*SKILLS, *folds()))), "--include-path", str(study.work / "tasks")]
    many = ["--limit", str(study.items), "--batch-size", str(study.batch)]
    # In bfloat16 it takes half as long, and people run such models in it.
    with _timed(f"{name}: scored"):
        _command("evaluate", str(model), *tasks, *many, "--dtype", "bfloat16", "--no-cache", "-o", str(out))


@contextlib.contextmanager
def _timed(what: str) -> Iterator[None]:
    begun = time.monotonic()
    yield
    print(f"{what} in {time.monotonic() - begun:.0f} s", flush=True)


def _command(*words: str) -> None:
    """Run lowmem-aim on the CPU, so that scores of different machines are alike but for rounding."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "lowmem_aim", *words, "--device", "cpu", "--format", "quiet"]
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
