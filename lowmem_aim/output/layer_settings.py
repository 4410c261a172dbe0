"""The config of an output that has other layers than its reference: how many, and of which type each is.

Whatever a config says layer by layer follows the layers: lists with an item for each (`layer_types`), and lists of the
numbers of some layers (`mlp_only_layers`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lowmem_aim.models.checkpoint import Checkpoint
from lowmem_aim.models.config import LAYERS, TEXT

TYPES = "layer_types"
DENSE_FIRST = "first_k_dense_replace"  # so many layers at the beginning have no experts
_OF_NUMBERS = ("_layers", "_layer_ids", "_idx", "_idxs", "_indices")  # ends of the names of lists of some layers

Layer = tuple[Checkpoint, int]  # a model, and the number of one of its layers
Settings = Callable[[Checkpoint], Mapping[str, Any]]  # a model's config as transformers reads it


def restacked(reference: Checkpoint, layers: Sequence[Layer], settings: Settings) -> dict[str, Any]:
    """The reference's config for a model with these layers. Raises whatever `settings` raises."""
    config = dict(reference.config)
    if any(key in config for key in LAYERS):
        return _table(config, layers, lambda model: model.config, settings)
    of_text = {checkpoint: checkpoint.config.get(TEXT) or {} for checkpoint, _ in layers}
    text = _table(dict(config.get(TEXT) or {}), layers, of_text.__getitem__, lambda m: settings(m).get(TEXT) or {})
    return {**config, TEXT: text}


def _table(table: dict[str, Any], layers: Sequence[Layer], of: Settings, settings: Settings) -> dict[str, Any]:
    """The table of a config that gives the number of layers; `of`: the same table of another model."""
    before = next((table[key] for key in LAYERS if isinstance(table.get(key), int)), 0)
    changed: dict[str, Any] = {key: len(layers) for key in LAYERS if key in table}
    for key, value in table.items():
        if not isinstance(value, list) or not value:
            continue
        if len(value) == before:
            changed[key] = [_item(of(model).get(key), layer, value[layer % before]) for model, layer in layers]
        elif key.endswith(_OF_NUMBERS) and all(type(one) is int and 0 <= one < before for one in value):
            changed[key] = [place for place, (model, layer) in enumerate(layers) if layer in (of(model).get(key) or ())]
    types = [_item(settings(model).get(TYPES), layer, None) for model, layer in layers]
    if None not in types and (TYPES in table or len(set(types)) > 1):
        changed[TYPES] = types  # a rule such as "every sixth" no longer holds
    if isinstance(table.get(DENSE_FIRST), int):
        dense = [layer < int(of(model).get(DENSE_FIRST) or 0) for model, layer in layers]
        changed[DENSE_FIRST] = [*dense, False].index(False)
    return {**table, **changed}


def _item(values: Any, layer: int, otherwise: Any) -> Any:
    return values[layer] if isinstance(values, list) and layer < len(values) else otherwise
