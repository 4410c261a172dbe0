"""Several merges of the same models, one pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowmem_aim.errors import LowmemAimError
from lowmem_aim.events import Emit
from lowmem_aim.jobs.merge import _merge
from lowmem_aim.recipe.recipe import Recipe
from lowmem_aim.system.options import Options
from lowmem_aim.view.feed import AnyFeed


def merge_many(recipes: Mapping[str, Recipe], out: Path, options: Options, feed: AnyFeed) -> None:
    """Shim."""
    for name, recipe in recipes.items():
        _merge(recipe, out / name, options, feed)  # type: ignore[arg-type]


@dataclass
class ManyForecast:
    problems: tuple[str, ...] = ()
    largest_output: int = 1000

    def error(self) -> LowmemAimError: ...  # type: ignore[empty-body]


def plan_many(recipes: Mapping[str, Recipe], out: Path, options: Options, emit: Emit, **_: Any) -> ManyForecast:
    return ManyForecast()
