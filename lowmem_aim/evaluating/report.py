"""A comparison as files: report.md, report.csv, report.json and pictures, in a new folder.

The folder appears under its name once everything is in it.
"""

from __future__ import annotations

import csv
import io
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lowmem_aim.errors import UsageError, printable
from lowmem_aim.evaluating.columns import legend_of
from lowmem_aim.evaluating.comparison import Change, Comparison, Row
from lowmem_aim.evaluating.families import curves_of, omega_of
from lowmem_aim.evaluating.fronts import Front
from lowmem_aim.evaluating.plots import omega_figure, pareto_figure
from lowmem_aim.evaluating.table import markdown_rows
from lowmem_aim.output.card import inline
from lowmem_aim.output.drawing import drawing, png_of, svg_of
from lowmem_aim.output.folder import check_writable
from lowmem_aim.system.files import disk_errors, sync_folder, write_file

MARKDOWN, CSV, JSON = "report.md", "report.csv", "report.json"


def check_new(out: Path) -> None:
    """Raise UsageError if anything is at `out`, or no folder to make it in; DiskError if that cannot be written to."""
    if os.path.lexists(out):
        raise UsageError(f"`{printable(str(out))}` exists already", hint="name a new folder, or remove that one")
    if not os.path.isdir(above := out.absolute().parent):
        raise UsageError(f"there is no folder `{printable(str(above))}`", hint="make it first")
    check_writable(above)


def write_report(found: Comparison, fronts: Sequence[Front], out: Path) -> None:
    """Write the report of a comparison into the new folder `out`. Raises UsageError or DiskError; see `check_new`."""
    pictures = _pictures(found, fronts)
    files = {name: content for picture in pictures.values() for name, content in picture.items()}
    files |= {MARKDOWN: _markdown(found, fronts, pictures).encode(), CSV: csv_text(found).encode()}
    files[JSON] = (json.dumps(as_json(found), indent=2) + "\n").encode()
    check_new(out)
    partial = out.absolute().parent / f".{out.name}.{secrets.token_hex(4)}.partial"
    try:
        with disk_errors(out):
            partial.mkdir()
            for name, content in files.items():
                write_file(partial / name, content)
            partial.rename(out)
            sync_folder(out.absolute().parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _pictures(found: Comparison, fronts: Sequence[Front]) -> dict[str, dict[str, bytes]]:
    """The pictures: what each shows, in words -> its files."""
    curves = curves_of([row.model for row in found.rows], {row.name: row.parent for row in found.rows if row.parent})
    drawn: dict[str, dict[str, bytes]] = {}
    with drawing():
        if fronts:
            drawn["Pareto fronts"] = _files("pareto", pareto_figure(found, fronts))
        for number, curve in enumerate(curves, start=1):
            name = "omega" if len(curves) == 1 else f"omega-{number}"
            drawn[f"{inline(curve.name)} over AIM's omega"] = _files(name, omega_figure(found, curve))
    return drawn


def _files(name: str, figure: Any) -> dict[str, bytes]:
    return {f"{name}.png": png_of(figure), f"{name}.svg": svg_of(figure)}


# --- JSON and CSV -----------------------------------------------------------------------------------------------------


def as_json(found: Comparison) -> dict[str, Any]:
    """The comparison as JSON values, every number with all its digits."""
    return {
        "population": [row.name for row in found.population],
        "models": [_model(row) for row in found.rows],
        "tasks": list(found.tasks),
        "volume": list(found.volume),
        "notes": list(found.notes),
    }


def _model(row: Row) -> dict[str, Any]:
    return {
        "name": row.name,
        "scores": {task: score.value for task, score in row.model.scores.items()},
        "change": {task: change.value for task, change in row.changes.items()} if row.parent else None,
        "hv_gain": row.gain.value if row.gain else None,
        "parent": row.parent.name if row.parent else None,
        "stderr": {task: score.stderr for task, score in row.model.scores.items()},
        "change_stderr": {task: change.stderr for task, change in row.changes.items()} if row.parent else None,
        "hv_gain_stderr": row.gain.stderr if row.gain else None,
        "hv_gain_change": row.gain.change.value if row.gain and row.gain.change else None,
        "hv_gain_change_stderr": row.gain.change.stderr if row.gain and row.gain.change else None,
    }


def csv_text(found: Comparison) -> str:
    """The comparison as CSV: a line for each model, the population's too, every number with all its digits."""
    text = io.StringIO()
    rows = [_flat(row, found) for row in found.every]
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _flat(row: Row, found: Comparison) -> dict[str, Any]:
    model, omega = row.model, omega_of(row.model)
    flat: dict[str, Any] = {
        "name": row.name,
        "in_population": int(row in found.population),
        "method": model.method or "",
        "models": "; ".join(model.models),
        "omega": omega,
        "control": model.control or "",
        "acm": int(model.acm is not None),
        "parent": row.parent.name if row.parent else "",
    }
    for task, score in model.scores.items():
        flat |= _numbers(task, score.value, score.stderr, row.changes.get(task))
    gain = row.gain
    return flat | (_numbers("hv_gain", gain.value, gain.stderr, gain.change) if gain else _numbers("hv_gain"))


def _numbers(
    name: str, value: float | None = None, stderr: float | None = None, change: Change | None = None
) -> dict[str, float | None]:
    """A number with its error and its change, as cells; of what is not known, csv leaves the cell empty."""
    own = {name: value, f"{name} stderr": stderr}
    if change is None:
        return own | dict.fromkeys((f"{name} change", f"{name} change stderr"))
    return own | {f"{name} change": change.value, f"{name} change stderr": change.stderr}


# --- markdown ---------------------------------------------------------------------------------------------------------


def _markdown(found: Comparison, fronts: Sequence[Front], pictures: dict[str, dict[str, bytes]]) -> str:
    return "\n".join(_markdown_lines(found, fronts, pictures)) + "\n"


def _markdown_lines(found: Comparison, fronts: Sequence[Front], pictures: dict[str, dict[str, bytes]]) -> Iterator[str]:
    yield f"# {len(found.rows)} model{'s' * (len(found.rows) != 1)} compared\n"
    yield from markdown_rows(found)
    yield ""
    for line in (*legend_of(found), *found.notes):
        yield f"- {_escaped(line)}"
    if fronts:
        yield "\n## Pareto fronts\n"
        yield "The models that no other one is at least as good as on both tasks and better on one.\n"
        for front in fronts:
            yield f"- {' and '.join(map(inline, front.pair))}: {', '.join(inline(row.name) for row in front.rows)}"
    for title, files in pictures.items():
        yield f"\n## {title}\n" if title != "Pareto fronts" else ""
        yield f"![{_escaped(title)}]({next(iter(files))})"


def _escaped(text: str) -> str:
    """Text as markdown that shows it as it is, but for code in backticks."""
    parts = text.split("`")
    if len(parts) % 2 == 0:
        return inline(text)
    return "`".join(part if at % 2 else _without_markup(part) for at, part in enumerate(parts))


def _without_markup(text: str) -> str:
    return "".join(f"\\{c}" if c in r"\*_[]<>#|~&" else c for c in text)
