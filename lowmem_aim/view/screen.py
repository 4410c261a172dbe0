"""One picture of a run: a Progress drawn into so many columns and rows. Pure, so that a recorded run looks the same.

Each block of lines has a rank; in a short window the blocks of the lowest rank go first. Lines are cut to the width,
never wrapped, except the phases and the command that resumes the run, which are whole or not there. Nothing relies on
colour alone: a height or a number says the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.text import Text

from lowmem_aim.errors import printable
from lowmem_aim.events import Sampled, Stage
from lowmem_aim.output.heatmap import BLOCKS
from lowmem_aim.units import clock, shown
from lowmem_aim.view.layer_rows import LABEL, effect_rows, heat_map, layer_row
from lowmem_aim.view.point_rows import point_rows
from lowmem_aim.view.progress import STAGES, PhaseSeen, Progress
from lowmem_aim.view.wrapping import wrapped, wrapped_command

MOST_WARNINGS = 3
WIDE, NARROW = 100, 72  # columns from which more is shown
SHORTEST_BAR, LONGEST_USE = 5, 32  # columns


@dataclass(frozen=True)
class Block:
    """Some lines of the picture, which stay or go together."""

    rank: int  # the higher, the longer they stay
    lines: Sequence[Text]


def screen(progress: Progress, width: int, height: int, keys: bool = False) -> Text:
    """Draw at most `height` lines of at most `width` columns. `keys`: whether the run listens to the keyboard."""
    blocks = list(_blocks(progress, width, keys))
    while sum(len(block.lines) for block in blocks) > height:
        blocks.remove(min(reversed(blocks), key=lambda block: block.rank))
    lines = [line for block in blocks for line in block.lines]
    for line in lines:
        line.truncate(width, overflow="ellipsis")
    joined = Text("\n", no_wrap=True, end="").join(lines)
    joined.no_wrap, joined.overflow = True, "crop"
    return joined


def _blocks(run: Progress, width: int, keys: bool) -> Iterator[Block]:
    yield Block(90, [_heading(run, width)])
    yield Block(80, _phases(run, width))
    yield Block(100, [_bar(run, width)])
    if run.ended and run.ended.problems:
        yield Block(95, [Text(f"{'':{LABEL}}{line}") for line in _problems(run.ended.problems, width - LABEL)])
    if run.current and run.current.phase == "calibrate" and not run.ended:
        yield Block(55, [_saved(run)])
    if run.item and not run.ended:
        yield Block(70, [_now(run, width)])
    if run.latest and run.phases and not run.ended:
        yield from (Block(50, [_rate(run, stage, width)]) for stage in STAGES)
    if run.latest:
        yield from _memory(run, run.latest, width)
    if row := layer_row(run, width):
        yield Block(65, [row])
    for row in effect_rows(run, width):
        yield Block(64, [row])
    for number, row in enumerate(point_rows(run, width)):
        yield Block(68 - number, [row])
    for number, row in enumerate(heat_map(run, width)):
        yield Block(10 - number // 4, [row])
    for text in run.warnings[-MOST_WARNINGS:]:
        yield Block(40, [_labelled("warning", Text(printable(text, 500)), "yellow")])
    if not run.ended:
        yield Block(30, _footer(run, width, keys))


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


def _phases(run: Progress, width: int) -> list[Text]:
    """The phases (plan, calibrate, merge, finish), each marked as done, under way or to come."""
    planned = run.planned.labels if run.planned else ()
    lines = [Text()]
    for name in ["plan", *dict.fromkeys([*planned, *run.phases])]:
        part = _phase(run, name, printable(name, 60))
        if lines[-1] and lines[-1].cell_len + 2 + part.cell_len > width:
            lines.append(Text())
        lines[-1].append("  " if lines[-1] else "").append_text(part)
    return lines


def _phase(run: Progress, name: str, told: str) -> Text:
    seen = run.phases.get(name)
    if name == "plan":
        done = run.planned is not None or bool(run.phases)
        return Text(f"✓ plan {clock(run.planning)}", "green") if done else Text("▶ plan", "bold cyan")
    if run.is_reused(name):
        return Text(f"✓ {told} reused", "green")
    if seen is None:
        return Text(f"· {told}", "dim")
    if seen.ended is None:
        return Text(f"▶ {told}", "bold cyan")
    return Text(f"✓ {told} {clock(seen.seconds(run.now))}", "green")


def _bar(run: Progress, width: int) -> Text:
    current = run.current
    if run.ended:
        so_far = (
            f"  {printable(current.label, 60)} {_share(current):.0%}, {_amount(current)}"
            if current and current.total
            else ""
        )
        return Text.assemble((f"{run.ended.outcome:<{LABEL - 2}}", "bold"), so_far)
    if current is None or not current.total:
        paused = ", then paused" * run.paused  # what is checked is not worth keeping half done
        label, text = ("", "") if run.phases else ("plan", f"checking everything before work{paused}")
        return _labelled(label, Text(text), "bold")
    left = run.left()
    eta = "paused" if run.paused else f"{clock(left)} left" if left is not None else ""
    figures = (f" {_share(current):>4.0%}  {_amount(current)}  {eta:>10}", f" {_share(current):>4.0%}  {eta:>10}")
    told = next((text for text in figures if LABEL + SHORTEST_BAR + len(text) <= width), figures[-1])
    room = max(width - LABEL - len(told), SHORTEST_BAR)
    return Text.assemble((f"{current.phase:<{LABEL}}", "bold"), _filled(_share(current), room, "cyan"), told)


def _share(phase: PhaseSeen) -> float:
    return min(phase.done / phase.total, 1.0)


def _amount(phase: PhaseSeen) -> str:
    if phase.unit == "bytes":
        return f"{shown(phase.done)} of {shown(phase.total)}"
    done = f"{phase.done:.1f}" if phase.unit == "blocks" else f"{phase.done:.0f}"
    return f"{done} of {phase.total} {phase.unit}"


def _problems(problems: Sequence[str], width: int) -> list[str]:
    return list(wrapped([printable(text, 1000) for text in problems], width))


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
    method = printable(run.planned.title) if run.planned and run.shape and width >= NARROW else ""
    right = "  ".join(part for part in (shape, method) if part)
    item = printable(run.item, 300)
    room = width - LABEL - len(right) - 2
    if len(item) > room > 8:  # the end of a name says more than its beginning
        item = f"…{item[len(item) - room + 1 :]}"
    return _labelled("now", _two_ends(Text(item), right, width - LABEL, "dim"))


def _saved(run: Progress) -> Text:
    """The part of the work that a killed run would not have to do again."""
    if run.snapshot is None:
        return _labelled("saved", Text("nothing yet; q and Ctrl-C save first"))
    made, blocks = run.snapshot
    return _labelled("saved", Text(f"{blocks:.1f} blocks, {clock(run.now - made)} ago"))


def _rate(run: Progress, stage: Stage, width: int) -> Text:
    """A stage's speed now and before, and how busy it is. The busiest stage is the one that the others wait for."""
    rate, slowest, busy = run.rate(stage), run.bottleneck() == stage, f"  busy {run.busy(stage):>4.0%}"
    columns = 40 if width >= WIDE else 16 if width >= NARROW else max(0, min(8, width - LABEL - 31))
    pointed = "  <- the bottleneck" if width >= NARROW else " <-"
    return Text.assemble(
        (f"{stage:<{LABEL}}", "dim"),
        f"{shown(rate) + '/s' if rate else '':>11}  ",
        (_spark(run.history(stage, columns), columns), "magenta" if slowest else "blue"),
        (busy if run.is_measured else "", "bold magenta" if slowest else "dim"),
        (pointed if slowest else "", "magenta"),
    )


def _spark(values: Sequence[float], columns: int) -> str:
    top = max(values, default=0.0)
    if not top or not columns:
        return " " * columns
    drawn = "".join(BLOCKS[min(int(value / top * len(BLOCKS)), len(BLOCKS) - 1)] for value in values)
    return drawn[-columns:].rjust(columns)


def _memory(run: Progress, latest: Sampled, width: int) -> Iterator[Block]:
    planned = run.planned
    budget = planned.ram_budget if planned else 0
    cache = f"  file cache {shown(latest.file_cache)}" if width >= NARROW else ""
    yield Block(60, [_used("RAM", latest.ram, latest.ram_peak, budget, cache, width)])
    if latest.vram is not None and latest.vram_peak is not None:
        budget = planned.vram_budget or 0 if planned else 0
        yield Block(58, [_used("VRAM", latest.vram, latest.vram_peak, budget, "", width)])
    if latest.disk_free is not None:
        yield Block(20, [_labelled("disk", Text(f"{shown(latest.disk_free)} free"))])


def _used(label: str, used: int, peak: int, budget: int, beside: str, width: int) -> Text:
    of = f" of {shown(budget)}" if budget else ""
    figures = f"{shown(used)}, peak {shown(peak)}{of}{beside}"
    if LABEL + len(figures) > width:
        figures = f"peak {shown(peak)}{of}"
    room = min(width - LABEL - len(figures) - 2, LONGEST_USE)
    style = "red" if budget and peak > budget else "green"
    if not budget or room < SHORTEST_BAR:
        return _labelled(label, Text(figures))
    bar = _filled(used / budget, room, style, peak / budget)
    return Text.assemble((f"{label:<{LABEL}}", "dim"), bar, "  ", figures)


def _footer(run: Progress, width: int, keys: bool) -> list[Text]:
    """The keys, and the command that resumes the run after a stop: on one line, or on lines of its own."""
    pressed = f"q stops, p {'resumes' if run.paused else 'pauses'}" if keys else ""
    command = printable(run.started.command, 10_000) if run.started else ""
    if not command:
        return [Text(pressed, "dim")] if pressed else []
    after = f"after a stop: {command}"
    if len(pressed) + 2 + len(after) <= width:
        return [Text("; ".join(part for part in (pressed, after) if part), "dim")]
    lines = [pressed] * bool(pressed) + wrapped_command(command, width, "after a stop: ")
    return [Text(line, "dim") for line in lines]
