"""A plan of a sweep, or of a search, as lines for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lowmem_aim.errors import printable
from lowmem_aim.units import clock, counted, shown
from lowmem_aim.view.plan_lines import measured, need_lines, steps, verdict_lines

MOST_POINTS = 12  # whose names are shown


def sweep_lines(plan: Mapping[str, Any]) -> Iterator[str]:
    """The lines of a SweepPlan, as JSON has it: the points, the merges, what they need, and the evaluations."""
    kinds = [f"{plan['families']} unrelaxed", f"{plan['relaxed']} relaxed", f"{plan['controls']} controls"]
    scored = f"; {plan['scored']} are scored already" if plan["scored"] else ""
    yield f"points    {len(plan['points'])}: {', '.join(kinds)}{scored}"
    more = f" and {len(plan['points']) - MOST_POINTS} more" if len(plan["points"]) > MOST_POINTS else ""
    yield f"          {', '.join(map(printable, plan['points'][:MOST_POINTS]))}{more}"
    yield _scored_line(plan)
    batches = [len(batch["output_bytes"]) for batch in plan["batches"]]
    if batches:
        times = "once" if len(batches) == 1 else f"{len(batches)} times, for {', '.join(map(str, batches))} points"
        yield f"inputs    read {times}: {shown(plan['read_bytes'])} in all"
        yield f"models    {shown(plan['disk_bytes'])} of disk at most"
    yield from _cost_lines(plan)


def search_lines(plan: Mapping[str, Any]) -> Iterator[str]:
    """The lines of a SearchPlan, as JSON has it."""
    finished = f"; {plan['finished']} are scored already" if plan["finished"] else ""
    yield f"search    {counted(plan['trials'], 'trial')}{finished}"
    for method, parameters in plan["space"]["methods"].items():
        values = {**parameters, "omega": plan["space"]["aim.omega"]}
        listed = [f"{printable(name)} {_values(domain)}" for name, domain in values.items() if domain is not None]
        yield f"          {printable(method)}: {', '.join(listed) or 'as the recipe says'}"
    yield f"          for {', '.join(map(printable, plan['objectives'])) or 'the HV gain over the experts'}"
    yield _scored_line(plan)
    if plan["merged"]:
        most = f" ({counted(plan['judges'], 'merge')} at most to judge the recommended ones by)" * bool(plan["judges"])
        yield f"inputs    read for each of {counted(plan['merged'], 'merge')}{most}: {shown(plan['read_bytes'])} in all"
        yield f"models    {shown(plan['disk_bytes'])} of disk at most, of each process that searches"
    yield from _cost_lines(plan)


def _values(domain: Any) -> str:
    return domain.replace(":", " to ") if isinstance(domain, str) else ", ".join(map(printable, domain))


def _scored_line(plan: Mapping[str, Any]) -> str:
    experts, tasks = (", ".join(map(printable, plan[key])) for key in ("experts", "tasks"))
    return f"scored    {experts} first; {counted(plan['time']['models'], 'model')} on {tasks}"


def _cost_lines(plan: Mapping[str, Any]) -> Iterator[str]:
    if merges := plan["merges"]:
        yield from need_lines([need for need in merges["needs"] if need["what"] != "disk"])
        if merges["steps"]:
            yield f"merges    about {clock(plan['time']['merges'])} on {merges['device']}: {steps(merges)}"
            yield f"          {measured(merges)}"
    yield from _time_lines(plan["time"])
    if merges:
        yield from verdict_lines(merges)


def _time_lines(time: Mapping[str, Any]) -> Iterator[str]:
    each, models = time["each"], counted(time["models"], "model")
    if each is not None:
        yield from _task_lines(each)
    if time["seconds"] is None:
        yield f"time      unknown: `{printable(each['model']) if each else 'a model'}` is not run block by block here"
        return
    parts = [f"start {clock(time['start'])}", f"merges {clock(time['merges'])}"]
    parts += [f"{models} on the tasks {clock(time['models'] * each['seconds'])}"] if each else []
    yield f"time      about {clock(time['seconds'])} in all, an estimate: {', '.join(parts)}"
    if each and each["writing"]:
        most = time["writing_seconds"]
        told = "for an unknown time" if most is None else f"for up to {clock(most)}"
        yield f"          and then {models} write {told}: as if each text were as long as its task allows"


def _task_lines(each: Mapping[str, Any]) -> Iterator[str]:
    label, known = printable(each["model"]), each["seconds"]
    about = "" if known is None else f"about {clock(known)} a model, measured with `{label}`: "
    for kind in each["likelihoods"]:
        what = f"{counted(kind['requests'], 'request')}, {kind['computed']} tokens after sharing"
        yield f"tasks     {about}{what}, in {counted(kind['rounds'], 'round')}"
        about = "and "
    if writing := each["writing"]:
        most = "" if writing["seconds"] is None else f", up to {clock(writing['seconds'])} a model"
        what = f"{counted(writing['texts'], 'text')} of {writing['written']} tokens at most"
        yield f"writing   {what}, after {writing['read']} tokens{most}"
