"""The merges of the study, as recipes: each method, and what of its texts and parameters matters."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skills import SKILLS

import lowmem_aim

PLAIN = "plain"
# What `lowmem-aim relax` is given for each form. The controls shrink the delta as much as AIM does, but everywhere.
FORMS = {
    PLAIN: [],
    "AIM-0.4": ["--omega", "0.4"],
    "uniform-0.4": ["--omega", "0.4", "--control", "uniform"],
    "AIM-0": ["--omega", "0"],
    "uniform-0": ["--omega", "0", "--control", "uniform"],
}
USUAL = (PLAIN, "AIM-0.4", "uniform-0.4")
NOBODYS = "general"  # texts that are nobody's own
OWN = "{skill}"


@dataclass(frozen=True)
class Places:
    """The folders that recipes name."""

    base: Path
    experts: Mapping[str, Path]  # skill -> folder
    texts: Path


@dataclass(frozen=True)
class Merge:
    """A merge of the three experts."""

    name: str
    recipe: Mapping[str, Any]
    forms: tuple[str, ...] = USUAL  # of FORMS


def not_known(merge: Merge) -> str:
    """What of a recipe this lowmem-aim does not know, in its words; nothing if it can be made."""
    try:
        lowmem_aim.read_recipe(dict(merge.recipe))
    except lowmem_aim.errors.RecipeError as error:
        return error.problems[0]
    return ""


def merges(places: Places) -> list[Merge]:
    """All merges, in the order of the table."""
    return [*_plain(places), *_without_texts(places), *_with_texts(places), *_further(places)]


def chosen(found: Sequence[Merge], patterns: Sequence[str]) -> list[Merge]:
    """The merges whose names match one of the patterns, as a shell's. Raises SystemExit if one matches nothing."""
    for pattern in patterns:
        if not fnmatch.filter([merge.name for merge in found], pattern):
            raise SystemExit(f"no merge is called `{pattern}`; there are {', '.join(merge.name for merge in found)}")
    return [merge for merge in found if any(fnmatch.fnmatch(merge.name, pattern) for pattern in patterns)]


def _plain(places: Places) -> Iterator[Merge]:
    yield Merge("average", _recipe(places, "linear", weight=1))
    yield Merge("task-arithmetic", _recipe(places, "task_arithmetic", weight=0.5))
    # Weight 1 and normalised, as in mergekit's examples: the mean of those experts that agree about a sign.
    yield Merge("ties", _recipe(places, "ties", weight=1, density=0.3, normalize=True))


def _without_texts(places: Places) -> Iterator[Merge]:
    yield Merge("covariance", _recipe(places, "covariance"), tuple(FORMS))
    yield Merge("covariance-lambda-0.8", _recipe(places, "covariance", **{"lambda": 0.8}))
    for ridge in (1e-3, 1e-1):
        yield Merge(f"covariance-ridge-{ridge:g}", _recipe(places, "covariance", ridge=ridge))
    yield Merge("covariance-rest-task-arithmetic", _recipe(places, "covariance", rest="task_arithmetic"))


def _with_texts(places: Places) -> Iterator[Merge]:
    for method in ("regmean", "regmean_plus"):
        yield Merge(method, _solved(places, method))
    yield Merge("solved", _solved(places, "task_arithmetic", weight="solved"))
    for method in ("regmean", "regmean_plus"):
        yield Merge(f"{method}-prompts", _solved(places, method, texts="{skill}-prompts"))
        yield Merge(f"{method}-and-general", _solved(places, method, texts="{skill}-and-general", samples=128))
        yield Merge(f"{method}-general", _solved(places, method, texts=NOBODYS))
        yield Merge(f"{method}-others", _solved(places, method, texts="{other}"))
    yield Merge("solved-general", _solved(places, "task_arithmetic", texts=NOBODYS, weight="solved"))


def _further(places: Places) -> Iterator[Merge]:
    for samples in (8, 16, 32, 128, 256):
        yield Merge(f"regmean-{samples}-texts", _solved(places, "regmean", samples=samples))
    for shrink in (0.5, 0.7, 0.8, 0.95, 1.0):
        yield Merge(f"regmean-shrink-{shrink:g}", _solved(places, "regmean", shrink=shrink))
    for ridge in (1e-3, 1e-2):
        yield Merge(f"regmean-ridge-{ridge:g}", _solved(places, "regmean", ridge=ridge))


def _recipe(places: Places, method: str, **parameters: Any) -> dict[str, Any]:
    return {
        "merge_method": method,
        "base_model": str(places.base),
        "models": [{"model": str(folder)} for folder in places.experts.values()],
        "parameters": parameters,
        "dtype": "float32",
    }


def _solved(places: Places, method: str, texts: str = OWN, samples: int = 64, **parameters: Any) -> dict[str, Any]:
    """A recipe by a method that runs texts; of the name `texts`, `{other}` stands for the next expert's skill."""
    recipe = _recipe(places, method, **parameters)
    skills = list(SKILLS)
    for model, skill, other in zip(recipe["models"], skills, [*skills[1:], skills[0]], strict=True):
        model["calibration"] = str(places.texts / f"{texts.format(skill=skill, other=other)}.jsonl")
    # Texts are run one by one: joined, each would read what stands before it.
    recipe["solve"] = {"samples": samples, "block_size": 512, "pack": False}
    return recipe
