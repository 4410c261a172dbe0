"""A plan as lines for people: models, method, tensors by kind, bytes, needs, time.

A Survey (`planning.survey`, also in the event Planned) and a Forecast (`jobs.forecast`) are plain data, which
`plan --json` prints unchanged; this module turns them into lines.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lowmem_aim.errors import printable
from lowmem_aim.units import clock, shown

INDENT = 10  # columns of a heading
KINDS_LISTED = 40  # shown; a model of many different modules has more
MOST_LEFT_OUT = 5  # names shown for one reason
STARTING_SECONDS = 3.0  # importing torch, opening the models
EXPERT_LABEL = 24  # columns of an expert's name above its shares


def survey_lines(survey: Mapping[str, Any]) -> Iterator[str]:
    """The lines of a Survey, as JSON has it; those of the recipe's named stages come first."""
    for name, stage in survey.get("stages", {}).items():
        yield f"stage     {printable(name)}"
        yield from survey_lines(stage)
        yield ""
    yield f"method    {printable(survey['title'])} ({printable(survey['source'])})"
    if survey["settings"]:
        yield f"          {printable(_listed(survey['settings']), 1000)}"
    if aim := survey["aim"]:
        yield f"AIM       omega {_listed(aim['omega'])}, scaling {aim['scaling']}, {_texts(aim)}"
        yield from _control_lines(aim)
    if acm := survey["acm"]:
        yield f"ACM       theta {acm['theta']:g}, normalised by {acm['normalise']}, {_texts(acm)}"
    for model in survey["models"]:
        yield f"{printable(model['role']):<10}{_model(model)}"
    yield from _kind_lines(survey["kinds"])
    for why, names in survey["left_out"].items():
        more = f" and {len(names) - MOST_LEFT_OUT} more" if len(names) > MOST_LEFT_OUT else ""
        yield f"          {why}: {', '.join(printable(name) for name in names[:MOST_LEFT_OUT])}{more}"
    files = f" in {survey['shards']} files" if survey["shards"] > 1 else ""
    outputs = f", {len(survey['outputs'])} outputs" if survey["outputs"] else ""
    read, write = shown(survey["read_bytes"]), shown(survey["write_bytes"])
    yield f"bytes     in all {read} to read (more if memory is tight), {write} to write{files}{outputs}"


def _control_lines(aim: Mapping[str, Any]) -> Iterator[str]:
    if control := aim.get("control"):
        seed = f" (seed {aim['control_seed']})" if "control_seed" in aim else ""
        yield f"control   {control}{seed} factors in place of AIM's: to judge AIM by, not a model to use"


def _listed(values: Any) -> str:
    if isinstance(values, Mapping):
        return ", ".join(f"{name} {value}" for name, value in values.items())
    return ", ".join(map(str, values)) if isinstance(values, list | tuple) else f"{values}"


def _texts(table: Mapping[str, Any]) -> str:
    source = printable(table["calibration"]) or "the authors' Pile set"
    if source.endswith(".safetensors"):
        return f"activations from {source}"
    length = f", at most {table['block_size']} tokens at a time" if "block_size" in table else ""
    return f"at most {table['samples']} texts of {source}{length}"


def _model(model: Mapping[str, Any]) -> str:
    parts = [
        f"{printable(model['label'])}: {count(model['parameters'])} parameters",
        printable("/".join(model["dtypes"])),
        printable(model.get("adapter", "")),  # recorded runs of earlier versions have none
        f"{model['layers']} layers",
        f"{model['vocabulary']} tokens{', tied' if model['tied'] else ''}",
        f"licence {printable(model['licence'], 100)}" if model["licence"] else "",
        f"{shown(model['missing_bytes'])} to download" if model["missing_bytes"] else "",
    ]
    return ", ".join(part for part in parts if part)


def count(number: float) -> str:
    """A number of parameters as text: `13.0 B`, `161 M`, `35 k`."""
    if number >= 1e9:
        return f"{number / 1e9:.1f} B"
    return f"{number / 1e6:.0f} M" if number >= 1e6 else f"{number / 1e3:.0f} k" if number >= 1e4 else f"{number:.0f}"


def _kind_lines(kinds: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    names = [printable(kind["kind"], 40) for kind in kinds[:KINDS_LISTED]]
    width = max(map(len, names), default=0)
    if names:
        yield f"tensors   {'':<{width}} number  parameters"
    for name, kind in zip(names, kinds, strict=False):
        own = f"  {printable(_listed(kind['settings']), 500)}" if kind["settings"] else ""
        numbers = f"{kind['tensors']:>6} {count(kind['parameters']):>11}"
        yield f"{'':<10}{name:<{width}} {numbers} {kind['action']}{own}"
    if len(kinds) > KINDS_LISTED:
        yield f"          ... and {len(kinds) - KINDS_LISTED} more kinds"


def forecast_lines(forecast: Mapping[str, Any]) -> Iterator[str]:
    """The lines of a Forecast, as JSON has it: what fits, how long it takes, and the verdict."""
    yield from need_lines(forecast["needs"])
    if forecast["steps"]:
        total = STARTING_SECONDS + sum(step["seconds"] for step in forecast["steps"])
        yield f"time      about {clock(total)} on {forecast['device']}: {steps(forecast)}"
        yield f"          {measured(forecast)}"
    yield from verdict_lines(forecast)


def need_lines(needs: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The lines of what a job needs, as JSON has it."""
    for need in needs:
        verdict = "fits" if need["fits"] else "DOES NOT FIT"
        amounts = f"{shown(need['least'])} at least, {shown(need['there'])} available"
        yield f"{need['what']:<10}{amounts}: {verdict} ({need['why']})"


def steps(forecast: Mapping[str, Any]) -> str:
    """The phases of a Forecast with their times, in one line."""
    parts = [f"{printable(step['phase'])} {clock(step['seconds'])}{_slowest(step)}" for step in forecast["steps"]]
    return ", ".join(parts)


def measured(forecast: Mapping[str, Any]) -> str:
    """The speeds that times follow from, in one line."""
    return f"measured: {', '.join(_speed(name, value) for name, value in forecast['speeds'].items())}"


def verdict_lines(forecast: Mapping[str, Any]) -> Iterator[str]:
    """The lines of what is to be noted, and whether a job would run."""
    for note in forecast["notes"]:
        yield f"note      {note}"
    verdict = "it fits" if forecast["needs"] else "nothing is left to do"
    yield f"verdict   {verdict if forecast['fits'] else 'it would not run: see below'}"


def effect_lines(effects: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The lines of what each output would keep of each expert, as JSON has it: a table of layers and experts."""
    for output in effects:
        name, experts = printable(output["output"]), output["experts"]
        of = f"{name}: " if name else ""
        yield f"effects   {of}kept of each expert's effect on its own texts; 100% is all, 0% what the base has"
        labels = [_cut(printable(expert["model"])) for expert in experts]
        widths = [max(len(label), 7) for label in labels]
        layers = dict.fromkeys(layer for expert in experts for layer in expert["layers"])
        rows = [("layer", labels), ("in all", [_percent(expert["kept"]) for expert in experts])]
        rows += [(layer, [_percent(expert["layers"].get(layer)) for expert in experts]) for layer in layers]
        for title, cells in rows:
            shown_cells = "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
            yield f"{'':<{INDENT}}{title:<6}  {shown_cells}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def _cut(label: str) -> str:
    return label if len(label) <= EXPERT_LABEL else f"{label[: EXPERT_LABEL - 1]}…"


def _slowest(step: Mapping[str, Any]) -> str:
    limits = step["limits"]
    return f" (limit: {max(limits, key=limits.__getitem__)})" if len(limits) > 1 else ""


def _speed(name: str, value: float) -> str:
    if name.startswith("compute"):  # `compute by ties` where there are several methods
        return f"{name.replace('compute', 'computing', 1)} {value / 1e6:.0f} M elements/s"
    if name.startswith(("forward", "matrix products")):
        return f"{name} {value / 1e9:.0f} GFLOP/s"
    return f"{name} {shown(value)}/s"
