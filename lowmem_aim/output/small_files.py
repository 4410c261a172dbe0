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
from lowmem_aim.output.card import PICTURE, card_text, delta_left, json_bytes, yaml_text
from lowmem_aim.output.code_keys import without_code
from lowmem_aim.output.heatmap import joined
from lowmem_aim.output.merged import Merged
from lowmem_aim.output.picture import drawn_with, heatmap_png
from lowmem_aim.output.portable import how_to_run, portable_recipe
from lowmem_aim.output.provenance import kept_by_module, kept_shares, provenance
from lowmem_aim.output.token_ids import with_vocabulary
from lowmem_aim.planning.tasks import Plan
from lowmem_aim.relaxing.activations import Activations
from lowmem_aim.relaxing.relaxation import Consensus


def output_files(
    plan: Plan,
    inputs: Inputs,
    activations: Activations | None,
    merged: Merged,
    copied: Mapping[str, bytes],
    config: Mapping[str, Any],
    environments: Sequence[Mapping[str, str]] | None = None,
    consensus: Consensus | None = None,
) -> dict[str, bytes]:
    """Every small file of the output by name, config.json last. `copied` is from `copied.copied_files`; `config` is the
    reference's, or from `layer_settings.restacked`.

    `environments` are versions and devices, if there was more than one on the way to this output.
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
    kept = kept_by_module(plan, merged)
    if joined(kept.values()).before:
        facts["kept"] = kept_shares(kept)
    if picture := heatmap_png(kept):
        facts["versions"] |= drawn_with()
        files[PICTURE] = picture
    if environments:
        facts["environments"] = environments
    files["mergekit_config.yml"] = (how_to_run(plan, inputs) + yaml_text(recipe)).encode()
    files["lowmem_aim.json"] = json_bytes(facts)
    files["README.md"] = card_text(facts, recipe, plan.recipe, delta_left(plan.recipe, kept, picture)).encode()
    # Last: without it, no loader takes the folder for a model.
    files[CONFIG] = json_bytes(_config(with_vocabulary(config, inputs), plan))
    return files


def _config(given: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """The config with the dtype that most of the output has, and nothing that would run code."""
    plain, _ = without_code(given)
    kept = {key: value for key, value in plain.items() if key != "_name_or_path"}
    sizes: dict[str, int] = {}
    for task in plan.tasks:
        if task.dtype.is_floating_point:
            sizes[task.dtype.name] = sizes.get(task.dtype.name, 0) + task.nbytes
    if sizes:
        name = max(sizes, key=lambda dtype: sizes[dtype])
        keys = [key for key in ("dtype", "torch_dtype") if key in kept] or ["dtype"]
        kept |= dict.fromkeys(keys, name)
    return kept
