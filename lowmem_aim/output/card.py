"""The model card, README.md: what was merged and how, how much of the delta is left, recipe, digests, versions.

All of it follows from the inputs alone: the same merge twice gives the same bytes. Models are named by their folder's
name or Hub id, never by a local path.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from lowmem_aim.errors import printable
from lowmem_aim.output.heatmap import MOST_KINDS, Modules, block_map, heat_rows, joined, shares_by
from lowmem_aim.output.portable import calibration_label
from lowmem_aim.recipe.recipe import Acm, Aim, Recipe
from lowmem_aim.recipe.words import PERMUTED
from lowmem_aim.relaxing.delta_sampler import SAMPLED_ELEMENTS
from lowmem_aim.units import counted

PICTURE = "delta-kept.png"


def yaml_text(value: Any) -> str:
    """A value as YAML, keys in their order; if a character is invisible or misleading, such characters are escaped."""
    text = str(yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=110))
    return text if is_printable(text) else str(yaml.safe_dump(value, sort_keys=False, width=110))


def documents_text(stages: Sequence[Mapping[str, Any]], recipe: Mapping[str, Any]) -> str:
    """A recipe as YAML: a document for each of its stages, and the last one for the output."""
    return "---\n".join(yaml_text(document) for document in (*stages, recipe))


def json_bytes(value: Any) -> bytes:
    """A value as indented JSON; if a character is invisible or misleading, all beyond ASCII are escaped."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    if not is_printable(text):
        text = json.dumps(value, indent=2)
    return (text + "\n").encode()


def is_printable(text: str) -> bool:
    """Whether every character of a text is visible as what it is: no direction marks, no halves of a surrogate pair."""
    return all(line.isprintable() for line in text.split("\n"))


def delta_left(recipe: Recipe, kept: Modules, picture: bytes | None) -> str:
    """The card's section on the delta that is left; the heat map in it is `picture` or, without one, text.

    Empty if nothing was relaxed.
    """
    share = joined(kept.values()).share
    if share is None:
        return ""
    drawn = f"![The share that is left, layers by kinds of module]({PICTURE})"
    if not picture:
        drawn = _fenced("".join(f"{line}\n" for line in block_map(kept)), "text")
    outside = shares_by({key: part for key, part in kept.items() if not key[0]}, 1)
    rows = [f"- {inline(kind)}: {share:.1%}" for kind, share in list(outside.items())[:MOST_KINDS]]
    parts = [drawn] * any(heat_rows(kept)) + ["Outside the layers:", "\n".join(rows)] * bool(rows)
    return (
        f"\n## How much of the delta is left\n\n{_relaxed_by(recipe)} left {share:.1%} of the merged delta: the sum of "
        "the absolute values afterwards, divided by the sum before, over the weights that are relaxed, estimated from "
        f"some {SAMPLED_ELEMENTS // 1000 * 1000:,} evenly spread elements of each.\n\n" + "\n\n".join(parts) + "\n"
    )


def card_text(facts: dict[str, Any], portable: str, recipe: Recipe, left: str) -> str:
    """The model card as markdown.

    `facts` are those of lowmem_aim.json, `portable` is the YAML of the recipe as others may run it, `left` is the text
    of `delta_left`.
    """
    inputs = _inputs(facts)
    models = list(dict.fromkeys(item["model"] for item in inputs))
    tags = ["merge", "lowmem-aim", recipe.method.name]
    tags += ["aim-control" if recipe.aim.control else "aim"] if recipe.aim else []
    tags += ["acm"] if recipe.acm else []
    named = [part.partition("@")[0] for model in models for part in model.split("+")]  # adapters too
    front = {"base_model": list(dict.fromkeys(named)), "library_name": "transformers", "tags": tags}
    relaxed = _by_channel(facts, recipe.aim) if recipe.aim else ""
    if recipe.acm:
        relaxed += _consensus(facts, recipe.acm)
    rows = [f"| {inline(item['model'])} | input | xxh3-128 `{item['xxh3_128']}` |" for item in inputs]
    rows += [f"| {inline(item['file'])} | output | sha256 `{item['sha256']}` |" for item in facts["outputs"]]
    used = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    return (
        f"---\n{yaml_text(front)}---\n\n# A merge by {recipe.method.name}{_with(recipe)}\n\n"
        f"Made with lowmem-aim from {', '.join(inline(m) for m in models)} "
        f"by the method `{recipe.method.name}` ({recipe.method.source}), seed {facts['seed']}.\n"
        f"{_warning(recipe)}{relaxed}{left}{_effects(facts)}{_singular(facts)}\n"
        f"## Recipe\n\n{_fenced(portable, 'yaml')}\n\n"
        f"## Digests\n\n| file or model | role | digest |\n|---|---|---|\n" + "\n".join(rows) + "\n\n"
        f"Versions: {used}.\n{_replaced(facts)}{_changes(facts)}"
    )


def _effects(facts: dict[str, Any]) -> str:
    """The section on what is kept of each expert, if texts were measured."""
    found = facts.get("effects", [])
    if not found:
        return ""
    rows = []
    for one in found:
        least = min(one["layers"], key=one["layers"].__getitem__, default="")
        where = f"{one['layers'][least]:.0%} in layer {least}" if least else ""
        rows.append(f"| {inline(one['model'])} | {one['kept']:.1%} | {where} |")
    return (
        "\n## What is kept of each expert\n\nAn expert's effect is what its delta adds to the outputs of a linear, for "
        "texts of its own. The share of it that this model has too, as the mean over the linears, estimated from some "
        "outputs of each: 100 % is all of it, 0 % what the base has.\n\n| expert | kept | least |\n|---|---|---|\n"
        + "\n".join(rows)
        + "\n"
    )


def _singular(facts: dict[str, Any]) -> str:
    """The section on tensors whose systems could not be solved as they are, if there are any."""
    rows = [f"| {inline(one['tensor'])} | {inline(one['done'])} |" for one in facts.get("singular", [])]
    if not rows:
        return ""
    return (
        "\n## Singular systems\n\nThe weights of these tensors could not be solved for with the recipe's ridge.\n\n"
        "| tensor | instead |\n|---|---|\n" + "\n".join(rows) + "\n"
    )


def _inputs(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """The models that were merged, of all stages: a stage's result is none of them."""
    stages = facts.get("stages", {})
    listed = [item for part in (*stages.values(), facts) for item in part["inputs"] if item["model"] not in stages]
    return [item for place, item in enumerate(listed) if item not in listed[:place]]


def _with(recipe: Recipe) -> str:
    return f" with {_relaxed_by(recipe)}" if recipe.relaxed else ""


def _relaxed_by(recipe: Recipe) -> str:
    return " and ".join(recipe.relaxations)


def _warning(recipe: Recipe) -> str:
    """A paragraph that says so if the model, or a stage that it was made of, is a control."""
    stages = [name for name, merge in recipe.in_order.items() if merge.aim and merge.aim.control]
    if not stages:
        return ""
    what = "it" if "" in stages else f"its stage {inline(stages[0])}"
    return (
        f"\n**This is not a model to use:** {what} is a control, made to judge AIM by. A gain that a control has as "
        "well is not due to AIM's choice of channels.\n"
    )


def _by_channel(facts: dict[str, Any], aim: Aim) -> str:
    """The paragraph on AIM, or on its control."""
    measured = f"Calibration: {inline(calibration_label(aim.calibration))}, {_tokens(facts)}."
    if not aim.control:
        return (
            "\nThe merged delta was relaxed by Activation-Informed Merging (AIM, arXiv 2502.02421) with "
            f"{_omega(aim)}: the more active an input channel of the base, the less of the delta it keeps. {measured}\n"
        )
    weaker = facts["control"]["weaker_than_aim"]
    told = f" In {counted(len(weaker), 'weight')} this takes back less than AIM." if weaker else ""
    return (
        "\nThe merged delta was relaxed by other factors in the place of those of Activation-Informed Merging (AIM, "
        f"arXiv 2502.02421) with {_omega(aim)}. Control {inline(aim.control)}: {_of_control(aim)}.{told} {measured}\n"
    )


def _of_control(aim: Aim) -> str:
    return {
        "uniform": "all channels of a weight have the mean of AIM's factors",
        PERMUTED: f"the channels of a weight have AIM's factors in a random order, drawn with seed {aim.control_seed}",
        "inverted": "the less active an input channel of the base, the less of the delta it keeps, with AIM's mean",
    }[aim.control]


def _consensus(facts: dict[str, Any], acm: Acm) -> str:
    """The paragraph and the table on ACM, layer by layer."""
    rows = [
        f"| {group} | {found['mutual_information']:.4f} | {found['kept']:.4f} |"
        for group, found in facts["acm"]["groups"].items()
    ]
    return (
        f"\nThen each layer's delta was scaled by Activation-Guided Consensus Merging (ACM, arXiv 2505.14009), theta "
        f"{acm.theta:g}, normalised over {acm.normalise}, by the mutual information between the base's and the "
        f"merged model's outputs for {facts['acm']['tokens']} tokens in {facts['acm']['texts']} texts of "
        f"{inline(calibration_label(acm.calibration))}.\n\n"
        "| layer | mutual information, nats | share of the delta kept |\n|---|---|---|\n" + "\n".join(rows) + "\n"
    )


def _omega(aim: Aim) -> str:
    omega = "the recipe's omegas" if aim.omega.filtered else f"omega {aim.omega.value:g}"
    return omega if aim.scaling == "identity" else f"{omega} and the scaling {aim.scaling}"


def _replaced(facts: dict[str, Any]) -> str:
    """The section on elements that took the base's value, if the run was to replace what is not finite."""
    if "nonfinite" not in facts:
        return ""
    if not facts["nonfinite"]:
        return "\nNo element of a model was NaN or Inf (`--nonfinite base`).\n"
    rows = [f"| {inline(i['model'])} | {inline(i['tensor'])} | {i['elements']} |" for i in facts["nonfinite"]]
    return (
        "\n## Elements that were not finite\n\nThese elements were NaN or Inf, and the base's value is used instead "
        "(`--nonfinite base`): the model contributes nothing there.\n\n| model | tensor | elements |\n|---|---|---|\n"
        + "\n".join(rows)
        + "\n"
    )


def _changes(facts: dict[str, Any]) -> str:
    if "environments" not in facts:
        return ""
    steps = [", ".join(f"{name} {value}" for name, value in step.items()) for step in facts["environments"]]
    listed = "\n".join(f"- {inline(step)}" for step in steps)
    return f"\nThe run was interrupted and resumed in another environment, which may change the low bits:\n\n{listed}\n"


def _tokens(facts: dict[str, Any]) -> str:
    calibration = facts.get("calibration", {})
    return f"{calibration.get('tokens', 0)} tokens in {calibration.get('sequences', 0)} sequences"


def _fenced(text: str, language: str) -> str:
    """A code block that nothing in the text can close: its fence is longer than any run of backticks inside."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}{fence}"


def inline(text: str) -> str:
    """A name from outside as markdown code, without markup or line breaks of its own."""
    return f"`{printable(text).replace('`', chr(39)).replace('|', '/')}`"
