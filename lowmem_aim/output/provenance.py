"""The provenance of an output, lowmem_aim.json: what was merged, how, with which versions, and all digests."""

from __future__ import annotations

from importlib import metadata
from typing import Any

import lowmem_aim
from lowmem_aim.methods.method import Method
from lowmem_aim.models.inputs import Inputs
from lowmem_aim.output.effects import DIGITS, EffectShares
from lowmem_aim.output.heatmap import Modules, by_module, inside, joined, shares_by
from lowmem_aim.output.merged import Merged
from lowmem_aim.planning.tasks import Plan
from lowmem_aim.relaxing.activations import Activations
from lowmem_aim.system.on_demand import torch


def provenance(
    plan: Plan, inputs: Inputs, activations: Activations | None, merged: Merged, recipe: dict[str, Any]
) -> dict[str, Any]:
    """The content of lowmem_aim.json: what was merged, how, with what, and digests of what was read and written."""
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
    """Versions of what is installed, and of the package that brings the method, without importing it, which is slow."""
    others = {name: metadata.version(name) for name in ("transformers", "safetensors")}
    if method is not None and method.package:
        package, _, version = method.package.rpartition(" ")
        others[package] = version
    return {"lowmem-aim": lowmem_aim.__version__, "torch": str(torch.__version__), **others}


def kept_by_module(plan: Plan, merged: Merged) -> Modules:
    """The sums of the delta by module; a module that was not relaxed is there, without a delta."""
    return by_module((task.layer, task.kind, merged.kept.get(task.name, (0.0, 0.0))) for task in plan.tasks)


def effects_of(plan: Plan, inputs: Inputs, merged: Merged) -> list[dict[str, Any]]:
    """The shares of the experts' effects that are kept; empty where no texts were measured."""
    shares = EffectShares()
    for task in plan.tasks:
        if task.name in merged.effects:
            shares.add(task.layer, [effect.kept for effect in merged.effects[task.name]])
    return shares.facts([inputs.opened[expert.reference].label for expert in plan.recipe.slices[0].experts])


def effects_by_tensor(plan: Plan, merged: Merged) -> dict[str, list[float | None]]:
    """The share of each expert's effect that is kept in each tensor that texts reach; None: it has no effect there."""
    found = {task.name: merged.effects[task.name] for task in plan.tasks if task.name in merged.effects}
    return {
        name: [None if effect.kept is None else round(effect.kept, DIGITS) for effect in effects]
        for name, effects in found.items()
    }


def kept_shares(kept: Modules) -> dict[str, Any]:
    """The shares of the delta that are left: in all, by layer and by kind.

    Rounded to four decimals: the estimate is no more exact, and the result does not depend on the order of tensors.
    """
    layers, kinds = shares_by(inside(kept), 0), shares_by(kept, 1)
    return {
        "delta": round(joined(kept.values()).share or 0.0, 4),
        "layers": {layer: round(layers[layer], 4) for layer in sorted(layers, key=int)},
        "kinds": {kind: round(share, 4) for kind, share in kinds.items()},
    }
