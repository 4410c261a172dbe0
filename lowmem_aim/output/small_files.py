"""The small files of an output: config, tokenizer, index, recipe, provenance, card.

All of them follow from the inputs alone: the same merge twice gives the same bytes in every file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lowmem_aim.models.config import CONFIG
from lowmem_aim.models.folder import INDEX
from lowmem_aim.models.inputs import Inputs
from lowmem_aim.output.card import PICTURE, card_text, delta_left, documents_text, json_bytes
from lowmem_aim.output.code_keys import without_code
from lowmem_aim.output.drawing import drawn_with
from lowmem_aim.output.heatmap import joined
from lowmem_aim.output.merged import Merged
from lowmem_aim.output.picture import heatmap_png
from lowmem_aim.output.portable import StageFacts, how_to_run, portable_recipe
from lowmem_aim.output.provenance import effects_of, kept_by_module, kept_shares, provenance
from lowmem_aim.output.token_ids import with_vocabulary
from lowmem_aim.planning.tasks import Plan
from lowmem_aim.relaxing.activations import Activations
from lowmem_aim.relaxing.relaxation import Consensus

PROVENANCE = "lowmem_aim.json"


def output_files(
    plan: Plan,
    inputs: Inputs,
    activations: Activations | None,
    merged: Merged,
    copied: Mapping[str, bytes],
    config: Mapping[str, Any],
    environments: Sequence[Mapping[str, str]] | None = None,
    consensus: Consensus | None = None,
    weaker: Sequence[str] = (),
    stages: Sequence[StageFacts] = (),
) -> dict[str, bytes]:
    """Every small file of the output by name, config.json last. `copied` is from `copied.copied_files`; `config` is the
    reference's, or from `layer_settings.restacked`.

    `environments` are versions and devices, if there was more than one on the way to this output; `weaker` are the
    weights of which a control of AIM takes back less than AIM would; `stages` are the recipe's named stages that it was
    made of, those further back included.
    """
    files = dict(copied)
    if len(plan.shards) > 1:
        files[INDEX] = plan.index()
    recipe = portable_recipe(plan.recipe, inputs)
    facts = provenance(plan, inputs, activations, merged, recipe)
    if stages:
        facts["stages"] = {stage.name: stage.facts for stage in stages}
    if consensus:
        groups = {
            group: {"mutual_information": math.fsum(m) / len(m), "kept": 1.0 - consensus.freezing[group]}
            for group, m in consensus.information.items()
        }
        facts["acm"] = {"texts": consensus.texts, "tokens": consensus.tokens, "groups": groups}
    if plan.recipe.aim and plan.recipe.aim.control:
        facts["control"] = {"name": plan.recipe.aim.control, "weaker_than_aim": list(weaker)}
    kept = kept_by_module(plan, merged)
    if joined(kept.values()).before:
        facts["kept"] = kept_shares(kept)
    if merged.singular:
        facts["singular"] = [{"tensor": name, "done": done} for name, done in merged.singular.items()]
    if effects := effects_of(plan, inputs, merged):
        facts["effects"] = effects
    if picture := heatmap_png(kept):
        facts["versions"] |= drawn_with()
        files[PICTURE] = picture
    if environments:
        facts["environments"] = environments
    local = [label for stage in stages for label in stage.local]
    documents = documents_text([stage.document for stage in stages], recipe)
    files["mergekit_config.yml"] = (how_to_run(plan, inputs, local) + documents).encode()
    files[PROVENANCE] = json_bytes(facts)
    files["README.md"] = card_text(facts, documents, plan.recipe, delta_left(plan.recipe, kept, picture)).encode()
    files[CONFIG] = config_bytes(config, plan, inputs)  # last: without it, no loader takes the folder for a model
    return files


def config_bytes(given: Mapping[str, Any], plan: Plan, inputs: Inputs) -> bytes:
    """config.json: the config with the output's vocabulary and most frequent dtype, and nothing that would run code."""
    plain, _ = without_code(with_vocabulary(given, inputs))
    kept = {key: value for key, value in plain.items() if key != "_name_or_path"}
    sizes: dict[str, int] = {}
    for task in plan.tasks:
        if task.dtype.is_floating_point:
            sizes[task.dtype.name] = sizes.get(task.dtype.name, 0) + task.nbytes
    if sizes:
        name = max(sizes, key=lambda dtype: sizes[dtype])
        keys = [key for key in ("dtype", "torch_dtype") if key in kept] or ["dtype"]
        kept |= dict.fromkeys(keys, name)
    return json_bytes(kept)


def files_to_plan_with(
    plan: Plan, inputs: Inputs, copied: Mapping[str, bytes], config: Mapping[str, Any]
) -> dict[str, bytes]:
    """The small files of an output from which its layers, its vocabulary and its settings are known, by name."""
    index = {INDEX: plan.index()} if len(plan.shards) > 1 else {}
    return {**copied, **index, CONFIG: config_bytes(config, plan, inputs)}
