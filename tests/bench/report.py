"""results.json as a table in docs/performance.md, between its markers, and as a bar chart."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
COLOURS = {"mergekit": "#b0b7c3", "ours": "#2f6fde", "disk": "#e0a040"}
LABELS = {"mergekit": "mergekit", "ours": "lowmem-aim", "disk": "disk limit"}
ROW, BAR, LEFT, WIDTH = 16, 12, 130, 760


def draw(results: dict[str, Any], page: Path, chart: Path) -> None:
    text = page.read_text() if page.is_file() else f"{BEGIN}\n{END}\n"
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    drawn = "\n".join(_markdown(results))
    page.write_text(f"{before}{BEGIN}\n\n{drawn}\n\n{END}{after}")
    methods = results.get("scales", {}).get("1b", {}).get("methods") or _first_methods(results)
    if methods:
        chart.write_text(_chart(methods))


def _first_methods(results: dict[str, Any]) -> dict[str, Any]:
    return next((found["methods"] for found in results.get("scales", {}).values() if "methods" in found), {})


def _markdown(results: dict[str, Any]) -> Iterator[str]:
    machine = results["machine"]
    yield (
        f"{machine['processor']} ({machine['instructions']}), {machine['cores']} cores, "
        f"{machine['memory'] / 2**30:.0f} GiB; torch {machine['torch']}, mergekit {machine['mergekit']}."
    )
    for scale, found in results.get("scales", {}).items():
        if "methods" in found:
            yield from ("", f"### {scale}", "")
            yield from _merge_table(found["methods"])
        if "calibration" in found:
            yield from ("", f"### {scale}: calibration", "")
            yield from _calibration_table(found["calibration"])


def _merge_table(methods: dict[str, Any]) -> Iterator[str]:
    yield (
        "| method | wall s: ours | mergekit | ratio | disk limit | ours / limit | + AIM / without "
        "| CPU s: ours | mergekit | anonymous MB: ours | mergekit | resident MB: ours | mergekit |"
    )
    yield "|" + "---|" * 13
    for method, ways in methods.items():
        ours, theirs, disk, aim = (ways.get(name, {}) for name in ("ours", "mergekit", "disk", "aim"))
        cells = [
            method,
            _number(ours, "wall"),
            _number(theirs, "wall"),
            _ratio(ours, theirs),
            _number(disk, "wall"),
            _ratio(ours, disk),
            _ratio(aim, ours),
            _number(ours, "cpu"),
            _number(theirs, "cpu"),
            *(_megabytes(way, key) for key in ("anonymous", "resident") for way in (ours, theirs)),
        ]
        yield "| " + " | ".join(cells) + " |"


def _calibration_table(found: dict[str, Any]) -> Iterator[str]:
    ratio = _ratio(found["ours"], found["whole model"])
    yield f"{found['blocks']} blocks of 512 tokens, {found['dtype']}; wall ratio {ratio}."
    yield ""
    yield "| | wall s | CPU s | anonymous MB | resident MB |"
    yield "|---|---|---|---|---|"
    for name, label in (("ours", "block by block (ours)"), ("whole model", "whole model in memory, hooks")):
        way = found[name]
        cells = [_number(way, "wall"), _number(way, "cpu"), _megabytes(way, "anonymous"), _megabytes(way, "resident")]
        yield f"| {label} | " + " | ".join(cells) + " |"


def _number(way: dict[str, Any], key: str) -> str:
    return f"{way[key]:.1f}" if key in way else "-"


def _megabytes(way: dict[str, Any], key: str) -> str:
    return f"{way[key] / 1e6:,.0f}" if key in way else "-"


def _ratio(a: dict[str, Any], b: dict[str, Any]) -> str:
    return f"{a['wall'] / b['wall']:.2f}" if "wall" in a and "wall" in b else "-"


def _chart(methods: dict[str, Any]) -> str:
    """Horizontal bars of wall seconds and of peak resident memory."""
    panels = [
        ("seconds", "wall", 1.0, ("mergekit", "ours", "disk")),
        ("GB resident", "resident", 1e9, ("mergekit", "ours")),
    ]
    parts: list[str] = []
    top = 24
    for title, key, unit, names in panels:
        largest = max(way[key] / unit for ways in methods.values() for n, way in ways.items() if n in names)
        parts.append(f'<text x="8" y="{top}" font-weight="bold">{title}</text>')
        top += 10
        for method, ways in methods.items():
            shown = [name for name in names if name in ways]
            parts.append(f'<text x="8" y="{top + ROW * len(shown) / 2 + 4:.0f}">{method}</text>')
            for name in shown:
                value = ways[name][key] / unit
                length = max(1.0, value / largest * (WIDTH - LEFT - 150))
                parts.append(f'<rect x="{LEFT}" y="{top}" width="{length:.1f}" height="{BAR}" fill="{COLOURS[name]}"/>')
                label = f"{value:.1f} {LABELS[name]}"
                parts.append(f'<text x="{LEFT + length + 6:.1f}" y="{top + BAR - 2}">{label}</text>')
                top += ROW
            top += 6
        top += 24
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{top}" font-family="sans-serif" '
        f'font-size="11">\n<rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'
    )
