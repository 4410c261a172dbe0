"""The roles of a checkpoint's tensors, as far as merging needs them: tied, vocabulary, buffer, or stored (in, out).

The roles come from transformers' model. Building that model takes seconds, most of them for imports, and the roles are
four short lists: so they are kept in the cache, one small file for each config, set of tensors and version.
"""

from __future__ import annotations

import importlib.metadata
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from lowmem_aim.errors import DiskError
from lowmem_aim.models.checkpoint import Checkpoint
from lowmem_aim.system.files import cache_folder, write_file

FORMAT = 2  # of the cached files; part of their names


@dataclass(frozen=True)
class TensorRoles:
    """The tensors that have a special role, by the checkpoint's names.

    A tensor that the file lacks (a tied head) has transformers' name.
    """

    tied: dict[str, str]  # output head's weight -> embedding's weight that it shares, if the config ties them
    vocabulary: frozenset[str]  # one row a token: embeddings, head weight, head bias
    buffers: frozenset[str]  # state that is no parameter, today's or an older model's
    inputs_first: frozenset[str]  # weights (in, out), not (out, in): embeddings, GPT-2's linears, some fused experts


def roles_of(checkpoint: Checkpoint, use_cache: bool) -> TensorRoles:
    """The roles of the tensors, from the cache or by building the model. Raises ModelError as `load_meta_model`."""
    cached = cache_folder() / "outlines" / f"{_key(checkpoint)}.json"
    if use_cache and (found := _load(cached)) is not None:
        return found
    from lowmem_aim.models.meta_model import load_meta_model  # transformers: only where it is needed

    meta_model = load_meta_model(checkpoint)
    roles = TensorRoles(meta_model.tied, meta_model.vocabulary, meta_model.buffers, meta_model.inputs_first)
    if use_cache:
        _keep(roles, cached)
    return roles


def _key(checkpoint: Checkpoint) -> str:
    """A digest of all that the roles depend on. Every shape counts, because the model is checked against it."""
    versions = [importlib.metadata.version(package) for package in ("transformers", "torch")]
    config = json.dumps(checkpoint.config, sort_keys=True)
    tensors = sorted((info.name, info.shape, str(info.dtype)) for info in checkpoint)
    return xxhash.xxh3_128_hexdigest(repr((FORMAT, versions, config, tensors)).encode("utf-8", "surrogatepass"))


def _load(file: Path) -> TensorRoles | None:
    """The roles in a file of the cache; None if there is no such file, or not one that `_keep` wrote."""
    try:
        table: Any = json.loads(file.read_text(encoding="utf-8"))
        lists = (frozenset(table[name]) for name in ("vocabulary", "buffers", "inputs_first"))
        return TensorRoles(dict(table["tied"]), *lists)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _keep(roles: TensorRoles, file: Path) -> None:
    """Write the roles to the cache. If that fails, it costs time, nothing else."""
    table = {
        "tied": roles.tied,
        "vocabulary": sorted(roles.vocabulary),
        "buffers": sorted(roles.buffers),
        "inputs_first": sorted(roles.inputs_first),
    }
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_file(file, json.dumps(table).encode())
    except (OSError, DiskError):
        return
