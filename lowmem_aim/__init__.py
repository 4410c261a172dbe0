"""Activation-informed merging of large language models, streamed from disk in little memory.

    import lowmem_aim
    lowmem_aim.merge("recipe.yml", "out")

Importing the package imports neither torch nor anything else that is slow: what `__all__` names comes when it is used.
docs/python.md has examples; docs/architecture.md says where everything lies.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowmem_aim import errors, events
    from lowmem_aim.errors import LowmemAimError
    from lowmem_aim.jobs.api import calibrate, compare, evaluate, merge, plan, read_recipe, relax, sweep, verify
    from lowmem_aim.jobs.forecast import Forecast
    from lowmem_aim.recipe.recipe import Recipe
    from lowmem_aim.system.options import Options

__version__ = "0.1.0"
__all__ = [
    "Forecast",
    "LowmemAimError",
    "Options",
    "Recipe",
    "calibrate",
    "compare",
    "errors",
    "evaluate",
    "events",
    "merge",
    "plan",
    "read_recipe",
    "relax",
    "sweep",
    "verify",
]

_HOMES = {
    "Forecast": "lowmem_aim.jobs.forecast",
    "LowmemAimError": "lowmem_aim.errors",
    "Options": "lowmem_aim.system.options",
    "Recipe": "lowmem_aim.recipe.recipe",
    **dict.fromkeys(
        ("calibrate", "compare", "evaluate", "merge", "plan", "read_recipe", "relax", "sweep", "verify"),
        "lowmem_aim.jobs.api",
    ),
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is used for the first time."""
    if name in ("errors", "events"):
        return importlib.import_module(f"lowmem_aim.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module `lowmem_aim` has no attribute `{name}`")
    found = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
