"""The config of an output that has other layers than its reference: how many, and of which type each is.

Whatever a config says layer by layer follows the layers: lists with an item for each (`layer_types`), and lists of the
numbers of some layers (`mlp_only_layers`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from lowmem_aim.errors import ModelError, printable
from lowmem_aim.models.checkpoint import Checkpoint
from lowmem_aim.models.config import LAYERS, OTHER_LAYERS, TEXT
from lowmem_aim.models.roles import Section

TYPES = "layer_types"
DENSE_FIRST = "first_k_dense_replace"  # so many layers at the beginning have no experts
# Ends of the names of lists of some layers.
_OF_NUMBERS = ("_layers", "_layer_ids", "_idx", "_idxs", "_indices", "_indexes")
_HALVES = ("encoder", "decoder")  # whose numbers of layers one table may hold

Layer = tuple[Checkpoint, int]  # a model, and the number of one of its layers
Settings = Callable[[Checkpoint], Mapping[str, Any]]  # a model's config as transformers reads it


def restacked(
    config: Mapping[str, Any], reference: Checkpoint, section: Section, layers: Sequence[Layer], settings: Settings
) -> dict[str, Any]:
    """The reference's config, or what was made of it so far, for a model with these layers in a section.

    Raises ModelError if the config has no number of them, and whatever `settings` raises.
    """
    read = settings(reference)
    changed = dict(config)
    for place in _places(config, section):
        table = dict((config.get(place) or {}) if place else config)
        known = _at(read, place)
        counts = _counts(section, table, known)
        if not counts:
            what = f"the config of `{printable(reference.label)}` does not say how many layers"
            raise ModelError(f"{what} `{printable(section.name)}` has", hint="list whole models under `models`")
        # What is not written may follow from what changes: T5's decoder has as many layers as its encoder.
        table = {key: known[key] for key in (*counts, *OTHER_LAYERS) if key in known} | table
        of, as_read = partial(_table_of, place=place), partial(_table_as_read, settings=settings, place=place)
        table = _table(table, layers, counts, of, as_read)
        changed = {**changed, place: table} if place else table
    return changed


def _table_of(model: Checkpoint, *, place: str) -> dict[str, Any]:
    return _at(model.config, place)


def _table_as_read(model: Checkpoint, *, settings: Settings, place: str) -> dict[str, Any]:
    return _at(settings(model), place)


def _places(config: Mapping[str, Any], section: Section) -> list[str]:
    """The keys of the tables of a config that have a section's settings; "" is the whole config.

    The language part's may be there instead of in a table of their own, or as well, as older files have them.
    """
    if section.table not in ("", TEXT):
        return [section.table]
    tables = {"": config, TEXT: config.get(TEXT)}
    counting = [place for place, table in tables.items() if table and any(key in table for key in LAYERS)]
    return counting or [TEXT if tables[TEXT] is not None else ""]


def _at(config: Mapping[str, Any], place: str) -> dict[str, Any]:
    """A table of a model's config; of the text in any config, where that is asked for."""
    if place in ("", TEXT):
        place = TEXT if not any(key in config for key in LAYERS) and TEXT in config else ""
    return dict((config.get(place) or {}) if place else config)


def _counts(section: Section, table: Mapping[str, Any], read: Mapping[str, Any]) -> list[str]:
    """The keys that give the number of a section's layers; `read`: the table as transformers reads it."""
    halves = [step for step in section.name.split(".") if step in _HALVES]
    own = [key for half in halves for key in (f"{half}_layers", f"num_{half}_layers") if key in read]
    if own and halves == ["decoder"]:
        return own
    usual = (*LAYERS, "depth")
    return own + ([key for key in usual if key in table] or [key for key in usual if key in read and not own][:1])


def _table(
    table: dict[str, Any], layers: Sequence[Layer], counts: Sequence[str], of: Settings, settings: Settings
) -> dict[str, Any]:
    """The table of a config that gives the number of layers; `of`: the same table of another model."""
    before = next((table[key] for key in counts if isinstance(table.get(key), int)), 0)
    changed: dict[str, Any] = dict.fromkeys(counts, len(layers))
    for key, value in table.items():
        if not isinstance(value, list) or not value:
            continue
        if key.endswith(_OF_NUMBERS) and _are_numbers(value, before):  # first: every layer may be among them
            changed[key] = [place for place, (model, layer) in enumerate(layers) if layer in (of(model).get(key) or ())]
        elif len(value) == before:
            changed[key] = [_item(of(model).get(key), layer, value[layer % before]) for model, layer in layers]
    types = [_item(settings(model).get(TYPES), layer, None) for model, layer in layers]
    if None not in types and (TYPES in table or len(set(types)) > 1):
        changed[TYPES] = types  # a rule such as "every sixth" no longer holds
    if isinstance(table.get(DENSE_FIRST), int):
        dense = [layer < int(of(model).get(DENSE_FIRST) or 0) for model, layer in layers]
        changed[DENSE_FIRST] = [*dense, False].index(False)
    return {**table, **changed}


def _item(values: Any, layer: int, otherwise: Any) -> Any:
    return values[layer] if isinstance(values, list) and layer < len(values) else otherwise


def _are_numbers(values: Sequence[Any], count: int) -> bool:
    """Whether a list has the numbers of some layers, in order: 0 and 1 in any order are marks of all layers."""
    return all(type(one) is int and 0 <= one < count for one in values) and list(values) == sorted(set(values))
