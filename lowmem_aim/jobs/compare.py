"""The comparison of models by their scores, from files to a report."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from lowmem_aim.errors import LowmemAimError, UsageError, noted, printable, raise_all

if TYPE_CHECKING:
    from lowmem_aim.evaluating.comparison import Comparison
    from lowmem_aim.evaluating.fronts import Front, Pair


def compare(
    scores: Sequence[Path],
    against: Sequence[Path] = (),
    output: Path | None = None,
    *,
    tasks: Sequence[str] = (),
    pairs: Sequence[str] = (),  # `gsm8k,humaneval` each
    sort: str = "family",
    force: bool = False,
) -> tuple[Comparison, list[Front]]:
    """Compare models by their files of scores, and write the report into the new folder `output`, if that is given.

    Raises UsageError, with all that forbids it, and DiskError.
    """
    from lowmem_aim.evaluating.comparison import compared, read_all
    from lowmem_aim.evaluating.fronts import check_pairs, fronts_of
    from lowmem_aim.evaluating.report import check_new, write_report

    errors: list[LowmemAimError] = []
    with noted(errors):
        _check_installed(["moocore"] * bool(against) + ["matplotlib"] * (output is not None))
    if output is not None:
        with noted(errors):
            check_new(output)
    with noted(errors):
        chosen = [_pair(text) for text in pairs]
    with noted(errors):
        models, population = read_all(scores, against)
        found = compared(models, population, tasks=tasks, sort=sort, forced=force)
        if not errors:
            check_pairs(chosen, found.tasks)
    raise_all(errors)
    fronts = fronts_of(found, chosen)
    if output is not None:
        write_report(found, fronts, output)
    return found, fronts


def _check_installed(packages: Sequence[str]) -> None:
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise UsageError(
            f"`compare` needs {' and '.join(missing)} for this", hint="install them: pip install 'lowmem-aim[report]'"
        )


def _pair(text: str) -> Pair:
    first, comma, second = (word.strip() for word in text.partition(","))
    if not (first and comma and second) or "," in second:
        raise UsageError(f"`--pair {printable(text)}` is not two tasks", hint="write `--pair gsm8k,humaneval`")
    return first, second
