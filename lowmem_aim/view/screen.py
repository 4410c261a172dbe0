"""One picture of a run: a Progress drawn into so many columns and rows. Pure, so that a recorded run looks the same.

Each line has a rank; in a short window the lines of the lowest rank go first. Lines are cut to the width, never
wrapped. Nothing relies on colour alone: a number says the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rich.style import Style
from rich.text import Text

from lowmem_aim.errors import printable
from lowmem_aim.events import Planned, Sampled, Stage
from lowmem_aim.output.heatmap import colour_of, heat_rows
from lowmem_aim.units import clock, shown
from lowmem_aim.view.progress import STAGES, Progress

LABEL = 10  # columns of a line's label
SPARK = "▁▂▃▄▅▆▇█"
MOST_WARNINGS = 3
MOST_ROWS_OF_HEAT = 16
WIDE, NARROW = 100, 72  # columns from which more is shown


@dataclass(frozen=True)
class Line:
    """One line of the picture."""

    rank: int  # the higher, the longer it stays
    text: Text


def screen(progress: Progress, width: int, height: int, keys: bool = False) -> Text:
    """Draw at most `height` lines of at most `width` columns. `keys`: whether the run listens to the keyboard."""
    lines = list(_lines(progress, width, keys))
    while len(lines) > height:
        lines.remove(min(reversed(lines), key=lambda line: line.rank))
    cut = []
    for line in lines:
        line.text.truncate(width, overflow="ellipsis")
        cut.append(line.text)
    joined = Text("\n", no_wrap=True, end="").join(cut)
    joined.no_wrap, joined.overflow = True, "crop"
    return joined


def _lines(run: Progress, width: int, keys: bool) -> Iterator[Line]:
    yield Line(90, _heading(run, width))
    yield Line(80, _phases(run))
    yield Line(100, _bar(run, width))
    if run.item and not run.ended:
        yield Line(70, _now(run, width))
    if run.latest and not run.ended:
        yield from (Line(50, _rate(run, stage, width)) for stage in STAGES)
    if run.latest:
        yield from _memory(run, run.latest, width)
    yield from _layers(run, width)
    for text in run.warnings[-MOST_WARNINGS:]:
        yield Line(40, _labelled("warning", Text(printable(text, 500)), "yellow"))
    if not run.ended:
        yield Line(30, _footer(run, keys))


def _labelled(label: str, text: Text, style: str = "dim") -> Text:
    return Text.assemble((f"{label:<{LABEL}}", style), text)


def _two_ends(left: Text, right: str, width: int, style: str = "") -> Text:
    """A line with `right` at its end; `left` is cut if the two would meet."""
    room = max(width - len(right) - 1, 0)
    left.truncate(room, overflow="ellipsis")
    return Text.assemble(left, " " * (width - left.cell_len - len(right)), (right, style))


def _heading(run: Progress, width: int) -> Text:
    title = printable(run.planned.title) if run.planned else run.started.job if run.started else ""
    out = f" -> {printable(run.started.out)}" if run.started else ""
    return _two_ends(Text.assemble(("lowmem-aim ", "bold"), title, (out, "dim")), clock(run.now), width)


def _phases(run: Progress) -> Text:
    """The phases (plan, calibrate, merge, finish), each marked as done, under way or to come."""
    planned = run.planned.phases if run.planned else ()
    names = ["plan", *dict.fromkeys([*planned, *run.phases])]
    parts = Text()
    for name in names:
        parts.append("  " if parts else "")
        parts.append_text(_phase(run, name))
    return parts


def _phase(run: Progress, name: str) -> Text:
    seen = next((seen for phase, seen in run.phases.items() if phase == name), None)
    if name == "plan":
        done = run.planned is not None or bool(run.phases)
        return Text("✓ plan", "green") if done else Text("▶ plan", "bold cyan")
    if seen is None:
        return Text(f"· {name}", "dim")
    if seen.ended is None:
        return Text(f"▶ {name}", "bold cyan")
    return Text(f"✓ {name} {clock(seen.ended - seen.begun)}", "green")


def _bar(run: Progress, width: int) -> Text:
    current = run.current
    if run.ended:
        return _labelled(run.ended.outcome, Text("; ".join(printable(text) for text in run.ended.problems)), "bold")
    if current is None or not current.total:
        return _labelled("plan" if not run.phases else "", Text("reading headers" if not run.phases else ""), "bold")
    share = min(current.done / current.total, 1.0)
    left = run.left()
    eta = "paused" if run.paused else f"{clock(left)} left" if left is not None else ""
    if current.unit == "bytes":
        amount = f"{shown(current.done)} of {shown(current.total)}"
    else:
        amount = f"{current.done:.1f} of {current.total} {current.unit}"
    figures = f" {share:>4.0%}  {amount}  {eta:>10}"
    room = max(width - LABEL - len(figures), 5)
    return Text.assemble((f"{current.phase:<{LABEL}}", "bold"), _filled(share, room, "cyan"), figures)


def _filled(share: float, columns: int, style: str, mark: float | None = None) -> Text:
    """A bar filled to `share`; `mark` puts a tick at another share."""
    eighths = round(min(max(share, 0.0), 1.0) * columns * 8)
    full, part = divmod(eighths, 8)
    filled = "█" * full + ("▏▎▍▌▋▊▉"[part - 1] if part else "")
    text = Text.assemble((filled, style), ("░" * (columns - len(filled)), "dim"))
    if mark is not None:
        place = min(int(min(mark, 1.0) * columns), columns - 1)
        if place >= len(filled):
            text = Text.assemble(text[:place], ("│", style), text[place + 1 :])
    return text


def _now(run: Progress, width: int) -> Text:
    shape = " x ".join(map(str, run.shape))
    method = printable(run.planned.title) if run.planned and run.shape else ""
    right = "  ".join(part for part in (shape, method) if part)
    item = printable(run.item, 300)
    room = width - LABEL - len(right) - 2
    if len(item) > room > 8:  # the end of a name says more than its beginning
        item = f"…{item[len(item) - room + 1 :]}"
    return _labelled("now", _two_ends(Text(item), right, width - LABEL, "dim"))


def _rate(run: Progress, stage: Stage, width: int) -> Text:
    """A stage's speed now and before, and how busy it is. The busiest stage is the one that the others wait for."""
    rate, slowest = run.rate(stage), run.bottleneck() == stage
    columns = 40 if width >= WIDE else 16 if width >= NARROW else 8
    pointed = "  <- the bottleneck" if width >= NARROW else " <-"
    return Text.assemble(
        (f"{stage:<{LABEL}}", "dim"),
        f"{shown(rate) + '/s' if rate else '':>11}  ",
        (_spark(run.history(stage, columns), columns), "magenta" if slowest else "blue"),
        (f"  busy {run.busy(stage):>4.0%}", "bold magenta" if slowest else "dim"),
        (pointed if slowest else "", "magenta"),
    )


def _spark(values: Sequence[float], columns: int) -> str:
    top = max(values, default=0.0)
    if not top:
        return " " * columns
    drawn = "".join(SPARK[min(int(value / top * len(SPARK)), len(SPARK) - 1)] for value in values)
    return drawn[-columns:].rjust(columns)


def _memory(run: Progress, latest: Sampled, width: int) -> Iterator[Line]:
    planned = run.planned
    budget = planned.ram_budget if planned else 0
    cache = f"  file cache {shown(latest.file_cache)}" if width >= NARROW else ""
    yield Line(60, _used("RAM", latest.ram, latest.ram_peak, budget, cache, width))
    if latest.vram is not None and latest.vram_peak is not None:
        budget = planned.vram_budget or 0 if planned else 0
        yield Line(58, _used("VRAM", latest.vram, latest.vram_peak, budget, "", width))
    if latest.disk_free is not None:
        yield Line(20, _labelled("disk", Text(f"{shown(latest.disk_free)} free")))


def _used(label: str, used: int, peak: int, budget: int, beside: str, width: int) -> Text:
    figures = f"  {shown(used)}, peak {shown(peak)}" + (f" of {shown(budget)}" if budget else "") + beside
    room = min(max(width - LABEL - len(figures), 5), 32)
    style = "red" if budget and peak > budget else "green"
    bar = _filled(used / budget, room, style, peak / budget) if budget else Text("")
    return Text.assemble((f"{label:<{LABEL}}", "dim"), bar, figures)


# --- layers -----------------------------------------------------------------------------------------------------------


def _layers(run: Progress, width: int) -> Iterator[Line]:
    layers = [name for name in run.planned.layers if name] if run.planned else []
    if run.planned is None or not layers:
        return
    kept, shares = run.kept_share(), run.kept_by(0)
    told = f"  {_relaxed_by(run)} kept {kept:.0%}" if kept is not None else ""
    room = max(width - LABEL - len(told), 8)
    yield Line(65, Text.assemble((f"{'layers':<{LABEL}}", "dim"), _strip(run, run.planned, layers, shares, room), told))
    if kept is None:
        return
    for number, (kind, row) in enumerate(heat_rows(run.kept)):
        if number < MOST_ROWS_OF_HEAT and len(layers) * 2 + 28 <= width:
            yield Line(10 - number // 4, _heat_line(kind, row, width))


def _relaxed_by(run: Progress) -> str:
    title = run.planned.title if run.planned else ""
    return " + ".join(name for name in ("AIM", "ACM") if name in title) or "relaxing"


def _strip(run: Progress, planned: Planned, layers: Sequence[str], shares: Mapping[str, float], room: int) -> Text:
    """A strip with a cell for each layer, or for several layers if there are more of them than columns."""
    each = -(-len(layers) // room)  # layers a cell
    columns = max(1, min(3, room // max(-(-len(layers) // each), 1)))
    text = Text()
    for first in range(0, len(layers), each):
        names = layers[first : first + each]
        done = _done(run, planned, names)
        known = [shares[name] for name in names if name in shares]
        plain = "cyan" if "merge" not in run.phases else "green"
        style = Style(color=colour_of(sum(known) / len(known))) if known else Style(color=plain)
        cell = "·" if not done else SPARK[min(int(done * len(SPARK)), len(SPARK) - 1)]
        text.append(cell * columns, style if done else "dim")
    return text


def _done(run: Progress, planned: Planned, layers: Sequence[str]) -> float:
    """The share of some layers that is done: of their tensors, or, during calibration, of the layers as blocks."""
    current = run.current
    if current and current.unit == "blocks":
        return sum(min(max(current.done - int(name), 0.0), 1.0) for name in layers) / len(layers)
    of = sum(planned.layers[name] for name in layers)
    return sum(run.layers[name] for name in layers) / of if of else 0.0


def _heat_line(kind: str, row: Sequence[float | None], width: int) -> Text:
    text = Text(f"{printable(kind, 24):<{LABEL + 18}}", "dim")
    for share in row:
        text.append("  " if share is None else "██", "" if share is None else Style(color=colour_of(share)))
    known = [share for share in row if share is not None]
    text.append(f" {sum(known) / len(known):.0%}" if known else "", "dim")
    return text


def _footer(run: Progress, keys: bool) -> Text:
    command = printable(run.started.command, 1000) if run.started else ""
    pressed = Text.assemble(("q", "bold"), " stops, ", ("p", "bold"), f" {'goes on' if run.paused else 'pauses'}  ")
    told = Text.assemble(pressed if keys else "", ("goes on with: ", "dim"), (command, "dim"))
    return told if command else (pressed if keys else Text(""))
