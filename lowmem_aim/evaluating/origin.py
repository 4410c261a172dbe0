"""The origin of a model: what it is, and of a merge, what was merged and how."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import xxhash

from lowmem_aim.errors import LowmemAimError
from lowmem_aim.events import Emit, Notice
from lowmem_aim.methods.registry import find_method
from lowmem_aim.models.checkpoint import Checkpoint
from lowmem_aim.models.config import parse_json
from lowmem_aim.system.files import cache_folder, write_file
from lowmem_aim.system.tensors import digest_of_digests

PROVENANCE, LARGEST = "lowmem_aim.json", 50_000_000
DIGESTS = "digests"  # of the cache folder
_RELAXATIONS: tuple[str, ...] = ("aim", "acm")


def digest_of_model(checkpoint: Checkpoint, emit: Emit) -> str:
    """xxh3-128 over all tensors of a model, as 32 hex digits; cached for files that are as they were.

    It is the digest that lowmem_aim.json has of a model that was read whole. Raises ModelError.
    """
    file = cache_folder() / DIGESTS / f"{checkpoint.fingerprint()}.json"
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(kept, str) and len(kept) == 32:
            return kept
    except (OSError, ValueError):
        pass
    emit(Notice("reading the model once, to know it again"))
    found = digest_of_digests({name: checkpoint.digest(name) for name in checkpoint.tensors})
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_file(file, json.dumps(found).encode())
    except (OSError, LowmemAimError) as error:
        emit(Notice(f"what the model is could not be kept: {error}", "warning"))
    return found


def origin_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """The fields of `Scores` that say how a merge was made, from `method` to `parent`. Empty for other models.

    Raises ModelError for a lowmem_aim.json that is no JSON.
    """
    content = checkpoint.small_file(PROVENANCE, LARGEST)
    facts = parse_json(content, checkpoint.folder / PROVENANCE) if content is not None else None
    recipe = facts.get("recipe") if isinstance(facts, dict) else None
    if not isinstance(facts, dict) or not isinstance(recipe, dict):
        return {}
    inputs = {str(of.get("model")): str(of.get("xxh3_128")) for of in facts.get("inputs", ()) if isinstance(of, dict)}
    aim = recipe.get("aim")
    return {
        "method": str(recipe.get("merge_method", "")) or None,
        "models": tuple(name for name in inputs if name != recipe.get("base_model")),
        "recipe": recipe,
        "aim": aim if isinstance(aim, dict) else None,
        "acm": recipe["acm"] if isinstance(recipe.get("acm"), dict) else None,
        "control": aim.get("control") if isinstance(aim, dict) else None,
        "parent": _parent(recipe, facts.get("seed"), inputs),
    }


def _parent(recipe: Mapping[str, Any], seed: Any, inputs: Mapping[str, str]) -> str:
    """The digest of what identifies the unrelaxed merge; of a relaxed model, that is the model's own."""
    base = recipe.get("base_model")
    merged = [name for name in inputs if name != base]
    if recipe.get("merge_method") == "passthrough" and len(merged) == 1:
        return inputs[merged[0]]
    method = find_method(str(recipe.get("merge_method")))
    if method is None or method.builds_on(base) or method.base == "averaged":
        merged, left_out = list(inputs), _RELAXATIONS
    else:
        left_out = (*_RELAXATIONS, "base_model")  # it is there for the relaxation alone
    plain = {key: value for key, value in recipe.items() if key not in left_out}
    facts = [plain, seed, sorted((name, inputs[name]) for name in merged)]
    return xxhash.xxh3_128_hexdigest(json.dumps(facts, sort_keys=True).encode())
