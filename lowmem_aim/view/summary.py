"""The end of a run: the closing lines, the next commands, and run.json.

run.json holds what differs from run to run (times, rates, peaks, warnings), for each run that wrote to the log of an
output, killed runs included. It follows from the log alone.
"""

from __future__ import annotations

import itertools
import json
import os
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lowmem_aim.errors import DiskError, printable
from lowmem_aim.events import RunEnded, Sampled
from lowmem_aim.output.folder import FACTS, LOG, PRIVATE, SUMS, outputs_in
from lowmem_aim.output.heatmap import Scale, inside, shares_by
from lowmem_aim.system.files import real, write_file
from lowmem_aim.system.interrupts import GOES_ON
from lowmem_aim.units import clock, shown
from lowmem_aim.view.progress import STAGES, Progress, seen
from lowmem_aim.view.record import runs_in
from lowmem_aim.view.wrapping import wrapped, wrapped_command

FORMAT = "lowmem-aim run 1"
MOST_WARNINGS = 10
INDENT = 12  # columns


def write_facts(private: Path) -> None:
    """Write run.json beside a run's log; if the disk has no space for it, leave it out."""
    runs = [facts(seen(run)) for run in runs_in(private / LOG)]
    if runs:
        try:
            write_file(private / FACTS, (json.dumps({"format": FORMAT, "runs": runs}, indent=2) + "\n").encode())
        except DiskError:
            return


def facts(run: Progress) -> dict[str, Any]:
    """The facts of one run, as run.json holds them."""
    started, planned, latest = run.started, run.planned, run.latest
    ended = run.ended or RunEnded("interrupted", -1)  # -1: killed, by an unknown cause
    found: dict[str, Any] = {
        "job": started.job if started else "",
        "started": started.started if started else "",
        "version": started.version if started else "",
        "command": started.command if started else "",
        "outcome": ended.outcome,
        "exit_code": ended.exit_code,
        "problems": list(ended.problems),
        "seconds": round(run.now, 3),
        "paused_seconds": round(run.idle, 3),
        "start_seconds": round(run.starting, 3),
        "plan_seconds": round(run.planning, 3),
        "phases": {name: round(seen.seconds(run.now), 3) for name, seen in run.phases.items()},
        "tensors": {"finished": run.tensors, "earlier": run.earlier},
        "warnings": run.warnings,
    }
    if planned:
        found |= {"title": planned.title, "device": planned.device, "threads": planned.threads}
    if planned and latest:
        found["ram"] = {"peak": latest.ram_peak, "budget": planned.ram_budget}
        if latest.vram_peak is not None:
            found["vram"] = {"peak": latest.vram_peak, "budget": planned.vram_budget}
    if latest:
        found["bytes"] = {stage: getattr(latest, f"{stage}_bytes") for stage in STAGES}
        found["busy_seconds"] = {stage: getattr(latest, f"{stage}_seconds") for stage in STAGES}
    if (share := run.kept_share()) is not None:
        outputs = {name: kept.share for name, kept in run.kept_by_output.items() if name}
        layers = _in_order(run.kept_by(0))
        found["kept"] = {"delta": share, "layers": layers, "kinds": run.kept_by(1), "outputs": outputs}
    if effects := run.effects.facts(run.expert_names()):
        found["effects"] = effects
    return found


def summary_lines(run: Progress, width: int | None = None) -> Iterator[str]:
    """The lines of the closing summary, broken at spaces where they have more than `width` columns."""
    yield from wrapped(_summary(run, width), width, INDENT)
    if run.ended and run.ended.outcome == "interrupted" and run.started and run.started.command:
        label = "resume" if run.ended.hint == GOES_ON else "again"
        yield from wrapped_command(printable(run.started.command, 10_000), width, f"  {label:<{INDENT - 2}}")


def _summary(run: Progress, width: int | None) -> Iterator[str]:
    yield _outcome(run)
    latest, planned = run.latest, run.planned
    for problem in run.ended.problems if run.ended else ():
        yield f"  problem   {printable(problem, 500)}"
    if run.ended and run.ended.hint and run.ended.hint != GOES_ON:  # the command itself says that
        yield f"  hint      {printable(run.ended.hint, 500)}"
    if latest and latest.write_bytes:
        yield f"  moved     {', '.join(_moved(run, latest))}"
    if latest and planned:
        peaks = [f"RAM {shown(latest.ram_peak)} of {shown(planned.ram_budget)}"]
        if latest.vram_peak is not None:
            peaks.append(f"VRAM {shown(latest.vram_peak)} of {shown(planned.vram_budget or 0)}")
        yield f"  peaks     {', '.join(peaks)} (the budget)"
    yield from _kept(run, width)
    if effects := run.effects.facts(run.expert_names()):
        shares = ", ".join(f"{printable(one['model'], 40)} {one['kept']:.1%}" for one in effects)
        yield f"  effects   {shares} of what each expert does on its own texts"
    for text in run.warnings[:MOST_WARNINGS]:
        yield f"  warning   {printable(text, 500)}"
    if len(run.warnings) > MOST_WARNINGS:
        yield f"  warning   ... and {len(run.warnings) - MOST_WARNINGS} more, in the log"


def _outcome(run: Progress) -> str:
    """The outcome of the run and its duration, divided into parts that add up to the whole."""
    whole = _whole_seconds(run.spent(), run.phases)
    told = {name: "reused" if run.is_reused(name) else clock(took) for name, took in whole.items()}
    parts = [
        f"{printable(name, 60)} {text}"
        for name, text in told.items()
        if whole[name] or name in run.phases or text == "reused"
    ]
    earlier = f", {run.earlier} of {run.tensors} tensors by earlier runs" if run.earlier else ""
    outcome = run.ended.outcome if run.ended else "still running"
    when = "in" if outcome == "finished" else "after"
    return f"{outcome} {when} {clock(sum(whole.values()))} ({', '.join(parts)}){earlier}"


def _whole_seconds(parts: Mapping[str, float], phases: Collection[str]) -> dict[str, int]:
    """The parts in whole seconds, which add up to their rounded sum, or to that of the phases, if that is more.

    Those of phases are rounded as everywhere else; what is left over goes to the others, the largest fractions first.
    """
    whole = {name: round(part) if name in phases else int(part) for name, part in parts.items()}
    others = sorted(whole.keys() - phases, key=lambda name: (whole[name] - parts[name], name))
    for number in range(round(sum(parts.values())) - sum(whole.values())):
        whole[others[number % len(others)]] += 1
    return whole


def _folded(shares: Sequence[float], most: int) -> list[float]:
    """The shares, or, of more than `most`, the means of neighbours: a strip must fit its line."""
    each = -(-len(shares) // max(most, 1))
    cells = [shares[first : first + each] for first in range(0, len(shares), each)]
    return [sum(cell) / len(cell) for cell in cells]


def _in_order(layers: Mapping[str, float]) -> dict[str, float]:
    """By layer, ascending: tensors are merged in the order of their names, in which 10 comes before 2."""
    return {name: layers[name] for name in sorted(layers, key=lambda name: int(name or -1))}


def _moved(run: Progress, latest: Sampled) -> Iterator[str]:
    """Bytes read and written, each with the mean speed over the phases that move them."""
    for name, nbytes, phases in (
        ("read", latest.read_bytes, ("calibrate", "compare", "merge")),
        ("written", latest.write_bytes, ("merge",)),
    ):
        took = sum(seen.seconds(run.now) for seen in run.phases.values() if seen.phase in phases)
        yield f"{name} {shown(nbytes)} ({shown(nbytes / max(took, 0.001))}/s)"


def _kept(run: Progress, width: int | None) -> Iterator[str]:
    """Lines with the share of the delta that is left: of all of it, by kind of module, and by layer."""
    share = run.kept_share()
    if share is None:
        return
    several = {name: kept.share for name, kept in run.kept_by_output.items() if name}
    if len(several) > 1:
        yield "  kept      " + ", ".join(f"{name} {part:.1%}" for name, part in several.items() if part is not None)
    else:
        yield f"  kept      {share:.1%} of the delta"
    if len(several) > 1:
        yield f"  of {next(iter(several))} alone:"
    kinds = shares_by(inside(run.kept), 1)
    if kinds:
        yield "  by kind   " + ", ".join(f"{printable(kind, 40)} {part:.0%}" for kind, part in kinds.items())
    layers = {name: part for name, part in run.kept_by(0).items() if name}
    if layers:
        least, most = min(layers, key=lambda name: layers[name]), max(layers, key=lambda name: layers[name])
        scale = Scale.of(layers.values())
        strip = "".join(map(scale.block, _folded([*_in_order(layers).values()], (width or 1000) - INDENT)))
        extremes = f"least in {least} ({layers[least]:.1%}), most in {most} ({layers[most]:.1%})"
        yield f"  by layer  {strip} from {scale}; {extremes}"


def next_commands(made: Path, width: int | None = None) -> Iterator[str]:
    """Lines with commands for a merged model: evaluate, convert, upload. With several outputs, for the first.

    Lines of more than `width` columns are broken; what can be pasted stays so.
    """
    out, *others = outputs_in(made)
    folder, name = quoted(out), quoted(Path(real(out).name), inside=True)
    digests = f"  digests   {printable(str(out / PRIVATE / SUMS), 1000)} (`lowmem-aim verify` checks them)"
    yield from wrapped([digests], width, INDENT)
    for label, command in (
        ("evaluate", f"lm_eval --model hf --model_args pretrained={folder} --tasks gsm8k --batch_size auto"),
        ("convert", f"python llama.cpp/convert_hf_to_gguf.py {folder} --outfile {name}.gguf"),
        ("upload", f"hf upload YOU/{name} {folder} --exclude '*{PRIVATE}/*'"),  # the journal and the log are private
    ):
        yield from wrapped_command(command, width, f"  {label:<{INDENT - 2}}")
    if others:
        yield from wrapped([f"            and likewise {', '.join(printable(o.name) for o in others)}"], width, INDENT)


def commands_for(recipe: Path, program: str) -> Iterator[str]:
    """Lines with commands for a recipe that has been written: plan and merge, into a folder that is not there yet."""
    out = free_name("merged")
    yield f"  plan      {program} plan {quoted(recipe)} {out}"
    yield f"  merge     {program} merge {quoted(recipe)} {out}"


def free_name(stem: str, suffix: str = "") -> str:
    """A name that nothing in the current folder has: `stem`, or `stem-2` and so on, with the suffix."""
    names = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
    return next(f"{name}{suffix}" for name in names if not os.path.lexists(f"{name}{suffix}"))


def quoted(path: Path, inside: bool = False) -> str:
    """A path quoted for a shell. One that looks like a flag becomes `./-x`, unless it is `inside` another word."""
    text = str(path)
    if not text.isprintable():
        return "$'" + text.encode("unicode_escape").decode().replace("'", "\\'") + "'"
    return shlex.quote(f"./{text}" if text.startswith("-") and not inside else text)
