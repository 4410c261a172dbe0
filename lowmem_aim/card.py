"""What stands beside the weights: config and tokenizer, the model card, mergekit_config.yml, and provenance.

All of it follows from the inputs alone: the same merge twice gives the same bytes in every file. Models are named by
their folder's name or Hub id, never by a local path.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml

import lowmem_aim
from lowmem_aim.activations import Activations
from lowmem_aim.checkpoint import INDEX, Checkpoint
from lowmem_aim.config import CONFIG
from lowmem_aim.errors import printable
from lowmem_aim.heatmap import MOST_KINDS, Modules, block_map, by_module, heat_rows, inside, joined, shares_by
from lowmem_aim.inputs import Inputs
from lowmem_aim.merge import Merged
from lowmem_aim.methods import Method
from lowmem_aim.picture import drawn_with, heatmap_png
from lowmem_aim.plan import Plan
from lowmem_aim.recipe import Acm, Aim, ModelEntry, Recipe, Setting
from lowmem_aim.relaxation import LOOKED_AT, Consensus
from lowmem_aim.texts import BUILTIN, PILE, is_activations_file

# Copied from the reference as they are, where it has them. Plain data only: no code, no weights.
COPIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
LARGEST_COPY = 200_000_000
PICTURE = "delta-kept.png"


def copied_files(reference: Checkpoint) -> dict[str, bytes]:
    """Tokenizer, chat template and the like, by name. Raises ModelError for a file that is no such thing."""
    return {name: content for name in COPIED if (content := reference.small_file(name, LARGEST_COPY)) is not None}


def output_files(
    plan: Plan,
    inputs: Inputs,
    activations: Activations | None,
    merged: Merged,
    copied: dict[str, bytes],
    environments: list[dict[str, str]] | None = None,
    consensus: Consensus | None = None,
) -> dict[str, bytes]:
    """Every small file of the output by name, config.json last. `copied` is from `copied_files`.

    `environments`: versions and devices, where there was more than one on the way to this output.
    """
    files = dict(copied)
    if len(plan.shards) > 1:
        files[INDEX] = plan.index()
    recipe = portable_recipe(plan.recipe, inputs)
    facts = provenance(plan, inputs, activations, merged, recipe)
    if consensus:
        groups = {
            group: {"mutual_information": math.fsum(m) / len(m), "kept": 1.0 - consensus.freezing[group]}
            for group, m in consensus.information.items()
        }
        facts["acm"] = {"texts": consensus.texts, "tokens": consensus.tokens, "groups": groups}
    kept = _kept(plan, merged)
    if joined(kept.values()).before:
        facts["kept"] = _shares(kept)
    if picture := heatmap_png(kept):
        facts["versions"] |= drawn_with()
        files[PICTURE] = picture
    if environments:
        facts["environments"] = environments
    files["mergekit_config.yml"] = _yaml(recipe).encode()
    files["lowmem_aim.json"] = _json(facts)
    files["README.md"] = _card(facts, recipe, plan.recipe, _left(plan.recipe, kept, picture)).encode()
    files[CONFIG] = _json(_config(inputs.reference, plan))
    return files


def _json(value: Any) -> bytes:
    text = json.dumps(value, indent=2, ensure_ascii=False)
    if not _is_plain(text):
        text = json.dumps(value, indent=2)
    return (text + "\n").encode()


def _yaml(value: Any) -> str:
    text = str(yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=110))
    return text if _is_plain(text) else str(yaml.safe_dump(value, sort_keys=False, width=110))


def _is_plain(text: str) -> bool:
    """Whether all is as it looks: no direction marks, no halves of a surrogate pair."""
    return all(line.isprintable() for line in text.split("\n"))


def _config(reference: Checkpoint, plan: Plan) -> dict[str, Any]:
    """The reference's config.json with the dtype that most of the output has, and nothing that would run code."""
    config = {key: value for key, value in reference.config.items() if key not in ("auto_map", "_name_or_path")}
    sizes: dict[torch.dtype, int] = {}
    for task in plan.tasks:
        if task.dtype.is_floating_point:
            sizes[task.dtype] = sizes.get(task.dtype, 0) + task.nbytes
    if sizes:
        name = str(max(sizes, key=lambda dtype: sizes[dtype])).removeprefix("torch.")
        keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
        config |= dict.fromkeys(keys, name)
    return config


# --- the recipe as others may run it --------------------------------------------------------------------------------


def portable_recipe(recipe: Recipe, inputs: Inputs) -> dict[str, Any]:
    """The recipe as mergekit's YAML, with labels for local paths."""
    portable: dict[str, Any] = {"merge_method": recipe.method.name}
    if inputs.base:
        portable["base_model"] = inputs.base.label
    labels = [expert.label for expert in inputs.experts]
    portable["models"] = [_model(entry, label) for entry, label in zip(recipe.models, labels, strict=True)]
    if recipe.parameters:
        portable["parameters"] = _settings(recipe.parameters)
    if recipe.dtype:
        portable["dtype"] = recipe.dtype
    if recipe.tokenizer_source:
        portable["tokenizer_source"] = recipe.tokenizer_source
    if recipe.aim:
        aim = {key: _plain(value) for key, value in vars(recipe.aim).items() if value not in ("", ())}
        assert isinstance(recipe.aim.omega, Setting)
        omega, calibration = _setting(recipe.aim.omega), _calibration_label(recipe.aim.calibration)
        portable["aim"] = aim | {"omega": omega, "calibration": calibration}
    if recipe.acm:
        acm = {key: value for key, value in vars(recipe.acm).items() if value != ""}
        portable["acm"] = acm | {"calibration": _calibration_label(recipe.acm.calibration)}
    return portable


def _calibration_label(calibration: str) -> str:
    if calibration in ("", BUILTIN):
        return calibration or PILE
    local = is_activations_file(calibration) or calibration.endswith((".jsonl", ".txt"))
    return Path(calibration).name if local else calibration


def _model(entry: ModelEntry, label: str) -> dict[str, Any]:
    return {"model": label} | ({"parameters": _settings(entry.parameters)} if entry.parameters else {})


def _settings(settings: Mapping[str, Setting]) -> dict[str, Any]:
    return {name: _setting(setting) for name, setting in settings.items()}


def _setting(setting: Setting) -> Any:
    if not setting.filtered:
        return _plain(setting.value)
    return [({"filter": pattern} if pattern else {}) | {"value": _plain(value)} for pattern, value in setting.value]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


# --- provenance and card --------------------------------------------------------------------------------------------


def provenance(
    plan: Plan, inputs: Inputs, activations: Activations | None, merged: Merged, recipe: dict[str, Any]
) -> dict[str, Any]:
    """lowmem_aim.json: what was merged, how, with what, and the digests of what was read and written."""
    facts: dict[str, Any] = {
        "format": "lowmem-aim provenance 1",
        "versions": versions(plan.recipe.method),
        "recipe": recipe,
        "seed": plan.seed,
        "inputs": [{"model": label, "xxh3_128": value} for label, value in dict.fromkeys(merged.models)],
        "outputs": [{"file": name, "sha256": value} for name, value in merged.shards.items()],
        "tensors": {
            "merged": sum(task.action == "merge" for task in plan.tasks),
            "copied": [task.name for task in plan.tasks if task.action == "copy"],
            "dropped": sorted(inputs.dropped),
        },
    }
    if plan.nonfinite == "base":
        facts["nonfinite"] = [
            {"model": label, "tensor": tensor, "elements": count} for label, tensor, count in merged.replaced
        ]
    if activations:
        facts["calibration"] = {
            "sequences": activations.sequences,
            "tokens": activations.tokens,
            "tokens_xxh3_128": activations.tokens_digest,
            "dtype": activations.dtype,
        }
    return facts


def versions(method: Method | None = None) -> dict[str, str]:
    """Of what is installed, and of the package that brings the method; asked without importing it, which is slow."""
    others = {name: metadata.version(name) for name in ("transformers", "safetensors")}
    if method is not None and method.package:
        package, _, version = method.package.rpartition(" ")
        others[package] = version
    return {"lowmem-aim": lowmem_aim.__version__, "torch": str(torch.__version__), **others}


# --- how much of the delta is left ----------------------------------------------------------------------------------


def _kept(plan: Plan, merged: Merged) -> Modules:
    """By module; one that was not relaxed is there, with no delta."""
    return by_module((task.layer, task.kind, merged.kept.get(task.name, (0.0, 0.0))) for task in plan.tasks)


def _shares(kept: Modules) -> dict[str, Any]:
    """In four decimals: what follows is no more exact, and does not depend on the order of tensors."""
    layers, kinds = shares_by(inside(kept), 0), shares_by(kept, 1)
    return {
        "delta": round(joined(kept.values()).share or 0.0, 4),
        "layers": {layer: round(layers[layer], 4) for layer in sorted(layers, key=int)},
        "kinds": {kind: round(share, 4) for kind, share in kinds.items()},
    }


def _left(recipe: Recipe, kept: Modules, picture: bytes | None) -> str:
    """The card's section; the heat map in it as a picture or, without one, as text."""
    share = joined(kept.values()).share
    if share is None:
        return ""
    drawn = f"![The share that is left, layers by kinds of module]({PICTURE})"
    if not picture:
        drawn = _fenced("".join(f"{line}\n" for line in block_map(kept)), "text")
    outside = shares_by({key: part for key, part in kept.items() if not key[0]}, 1)
    rows = [f"- {_inline(kind)}: {share:.1%}" for kind, share in list(outside.items())[:MOST_KINDS]]
    parts = [drawn] * any(heat_rows(kept)) + ["Outside the layers:", "\n".join(rows)] * bool(rows)
    return (
        f"\n## How much of the delta is left\n\n{_relaxed_by(recipe)} left {share:.1%} of the merged delta: the sum of "
        "the absolute values afterwards over the sum before, in the weights that are relaxed, estimated on some "
        f"{LOOKED_AT // 1000 * 1000:,} elements of each, evenly spread.\n\n" + "\n\n".join(parts) + "\n"
    )


def _card(facts: dict[str, Any], portable: dict[str, Any], recipe: Recipe, left: str) -> str:
    models = list(dict.fromkeys([*([portable["base_model"]] if "base_model" in portable else []), *_names(portable)]))
    tags = (
        ["merge", "lowmem-aim", recipe.method.name] + (["aim"] if recipe.aim else []) + (["acm"] if recipe.acm else [])
    )
    front = {"base_model": [m.partition("@")[0] for m in models], "library_name": "transformers", "tags": tags}
    relaxed = ""
    if recipe.aim:
        relaxed = (
            f"\nThe merged delta was relaxed by Activation-Informed Merging (AIM, arXiv 2502.02421) with "
            f"{_omega(recipe.aim)}: the more active an input channel of the base, the less of the delta it takes. "
            f"Calibration: {_inline(_calibration_label(recipe.aim.calibration))}, {_tokens(facts)}.\n"
        )
    if recipe.acm:
        relaxed += _consensus(facts, recipe.acm)
    rows = [f"| {_inline(item['model'])} | input | xxh3-128 `{item['xxh3_128']}` |" for item in facts["inputs"]]
    rows += [f"| {_inline(item['file'])} | output | sha256 `{item['sha256']}` |" for item in facts["outputs"]]
    used = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    return (
        f"---\n{_yaml(front)}---\n\n# A merge by {recipe.method.name}{_with(recipe)}\n\n"
        f"Made with lowmem-aim from {', '.join(_inline(m) for m in models)} "
        f"by the method `{recipe.method.name}` ({recipe.method.source}), seed {facts['seed']}.\n{relaxed}{left}\n"
        f"## Recipe\n\n{_fenced(_yaml(portable), 'yaml')}\n\n"
        f"## Digests\n\n| file or model | role | digest |\n|---|---|---|\n" + "\n".join(rows) + "\n\n"
        f"Versions: {used}.\n{_replaced(facts)}{_changes(facts)}"
    )


def _with(recipe: Recipe) -> str:
    return f" with {_relaxed_by(recipe)}" if recipe.aim or recipe.acm else ""


def _relaxed_by(recipe: Recipe) -> str:
    return " and ".join(name for name, table in (("AIM", recipe.aim), ("ACM", recipe.acm)) if table)


def _consensus(facts: dict[str, Any], acm: Acm) -> str:
    """What ACM did, layer by layer."""
    rows = [
        f"| {group} | {found['mutual_information']:.4f} | {found['kept']:.4f} |"
        for group, found in facts["acm"]["groups"].items()
    ]
    return (
        f"\nThen each layer's delta was scaled by Activation-Guided Consensus Merging (ACM, arXiv 2505.14009), theta "
        f"{acm.theta:g}, normalised over {acm.normalise}, by the mutual information between the base's and the "
        f"merged model's outputs for {facts['acm']['tokens']} tokens in {facts['acm']['texts']} texts of "
        f"{_inline(_calibration_label(acm.calibration))}.\n\n"
        "| layer | mutual information, nats | share of the delta kept |\n|---|---|---|\n" + "\n".join(rows) + "\n"
    )


def _omega(aim: Aim) -> str:
    assert isinstance(aim.omega, Setting)
    omega = "the recipe's omegas" if aim.omega.filtered else f"omega {aim.omega.value:g}"
    return omega if aim.scaling == "identity" else f"{omega} and the scaling {aim.scaling}"


def _replaced(facts: dict[str, Any]) -> str:
    """Which elements the base's stand in for, where the run was to replace what is not finite (`--nonfinite base`)."""
    if "nonfinite" not in facts:
        return ""
    if not facts["nonfinite"]:
        return "\nNo element of a model was NaN or Inf (`--nonfinite base`).\n"
    rows = [f"| {_inline(i['model'])} | {_inline(i['tensor'])} | {i['elements']} |" for i in facts["nonfinite"]]
    return (
        "\n## Elements that were not finite\n\nThese elements were NaN or Inf, and the base's value stands in for them "
        "(`--nonfinite base`): the model has no say there.\n\n| model | tensor | elements |\n|---|---|---|\n"
        + "\n".join(rows)
        + "\n"
    )


def _changes(facts: dict[str, Any]) -> str:
    if "environments" not in facts:
        return ""
    steps = [", ".join(f"{name} {value}" for name, value in step.items()) for step in facts["environments"]]
    listed = "\n".join(f"- {_inline(step)}" for step in steps)
    return (
        f"\nThe run was interrupted and went on in another environment, which may show in the low bits:\n\n{listed}\n"
    )


def _names(portable: dict[str, Any]) -> list[str]:
    return [entry["model"] for entry in portable["models"]]


def _tokens(facts: dict[str, Any]) -> str:
    calibration = facts.get("calibration", {})
    return f"{calibration.get('tokens', 0)} tokens in {calibration.get('sequences', 0)} sequences"


def _fenced(text: str, language: str) -> str:
    """A block that nothing in it can close: its fence is longer than any run of backticks inside."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}{fence}"


def _inline(text: str) -> str:
    """A name from outside as markdown code: no markup of its own, no line break."""
    return f"`{printable(text).replace('`', chr(39)).replace('|', '/')}`"
