"""All merge methods by name: importing this file registers the package's own.

Other packages bring theirs by entry points of the group `lowmem_aim.methods`. Such a package is imported only when its
method is asked for, or when all methods are listed.
"""

from __future__ import annotations

import dataclasses
from importlib.metadata import EntryPoint, entry_points

from lowmem_aim.errors import UsageError, printable
from lowmem_aim.methods import (  # noqa: F401  (imported for what they register)
    arcee_fusion,
    breadcrumbs,
    covariance,
    dare,
    della,
    karcher,
    linear,
    model_stock,
    multislerp,
    nearswap,
    nuslerp,
    ram,
    regmean,
    sce,
    slerp,
    task_arithmetic,
    ties,
    widen,
)
from lowmem_aim.methods.method import METHODS, Method

__all__ = ["METHODS", "find_method", "names"]

GROUP = "lowmem_aim.methods"


def find_method(name: str) -> Method | None:
    """The method of that name, from this package or another; None if there is none.

    Raises UsageError if another package offers the method but fails to register it, or if several packages offer it.
    """
    if name not in METHODS and (offers := list(entry_points(group=GROUP, name=name))):
        _load(name, offers)
    return METHODS.get(name)


def names() -> list[str]:
    """The names of all methods, sorted. No other package is imported for this."""
    return sorted({*METHODS, *(point.name for point in entry_points(group=GROUP))})


def _load(name: str, offers: list[EntryPoint]) -> None:
    packages = sorted({_package(point) for point in offers})
    shown = " and ".join(f"`{printable(package)}`" for package in packages)
    if len(packages) > 1:
        raise UsageError(
            f"the merge method `{printable(name)}` comes from {shown}", hint="uninstall all but one of them"
        )
    own = set(METHODS)
    try:
        offers[0].load()
    except (Exception, SystemExit) as error:  # whatever a foreign module raises
        raise UsageError(
            f"the merge method `{printable(name)}` of {shown} cannot be loaded: {printable(str(error))}",
            hint="update or uninstall that package",
        ) from error
    if name not in METHODS:
        raise UsageError(
            f"{shown} offers the merge method `{printable(name)}`, but its module `{printable(offers[0].value)}` "
            "registers no method of that name",
            hint="the entry point's name and that of `@merge_method` must be the same",
        )
    for brought in METHODS.keys() - own:
        METHODS[brought] = dataclasses.replace(METHODS[brought], package=packages[0])


def _package(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else point.module
