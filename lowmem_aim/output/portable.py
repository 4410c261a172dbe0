"""The recipe as others may run it: mergekit's YAML, with labels in place of local paths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowmem_aim.errors import printable
from lowmem_aim.models.checkpoint import Checkpoint
from lowmem_aim.models.inputs import Inputs
from lowmem_aim.planning.tasks import Plan
from lowmem_aim.recipe.recipe import ModelEntry, Recipe, Setting, Slice, Tokenizer, TokenRow
from lowmem_aim.recipe.references import parsed, same_reference
from lowmem_aim.recipe.words import BUILTIN, PILE, is_activations_file, is_here
from lowmem_aim.system.files import open_to_read

_WITHOUT_PATHS = "These were folders and files on one machine and are named without their paths. Fill in the paths:"


def is_without_paths(file: Path) -> bool:
    """Whether a file is a recipe of an output whose comments (see `how_to_run`) say that paths are to be filled in."""
    try:
        with open_to_read(file) as stream:
            return stream.readline(1000) == f"# {_WITHOUT_PATHS}\n".encode()
    except OSError:
        return False


def portable_recipe(recipe: Recipe, inputs: Inputs) -> dict[str, Any]:
    """The recipe as a table for mergekit's YAML, with labels for local paths."""
    portable: dict[str, Any] = {"merge_method": recipe.method.name}
    if inputs.base:
        portable["base_model"] = inputs.base.label
    portable |= _parts(recipe, inputs)
    if recipe.parameters:
        portable["parameters"] = _settings(recipe.parameters)
    if recipe.dtype:
        portable["dtype"] = recipe.dtype
    if recipe.tokenizer:
        portable |= _tokenizer(recipe.tokenizer, recipe, inputs)
    if recipe.chat_template:
        portable["chat_template"] = recipe.chat_template
    if recipe.aim:
        aim = {key: _plain(value) for key, value in recipe.aim.keys.items()}
        omega, calibration = _setting(recipe.aim.omega), calibration_label(recipe.aim.calibration)
        portable["aim"] = aim | {"omega": omega, "calibration": calibration}
    if recipe.acm:
        acm = {key: value for key, value in vars(recipe.acm).items() if value != ""}
        portable["acm"] = acm | {"calibration": calibration_label(recipe.acm.calibration)}
    if recipe.solve:
        solve, shared = recipe.solve.keys, recipe.solve.calibration
        portable["solve"] = solve | ({"calibration": calibration_label(shared)} if shared else {})
    return portable


def _tokenizer(asked: Tokenizer, recipe: Recipe, inputs: Inputs) -> dict[str, Any]:
    """The key `tokenizer_source`, or where that does not say all, `tokenizer`."""
    source = inputs.tokenizer.owner.label if inputs.tokenizer and recipe.tokenizer_model else asked.source
    if not asked.tokens and not asked.pad_to_multiple_of:
        return {"tokenizer_source": source}
    table: dict[str, Any] = {"source": source}
    if asked.tokens:
        table["tokens"] = {token: _token(row, inputs) for token, row in asked.tokens.items()}
    if asked.pad_to_multiple_of:
        table["pad_to_multiple_of"] = asked.pad_to_multiple_of
    return {"tokenizer": table}


def _token(row: TokenRow, inputs: Inputs) -> dict[str, Any]:
    """The source of a token's row, as mergekit's YAML says it."""
    source: Any = inputs.opened[row.model].label if row.model else None
    if row.source == "zero":
        source = {"kind": "zero"}
    elif row.source == "model_token":
        other = {"token": row.token} if row.token is not None else {"token_id": row.token_id}
        source = {"kind": "model_token", "model": source, **other}
    return ({"source": source} if source else {}) | ({"force": True} if row.force else {})


@dataclass(frozen=True)
class StageFacts:
    """A named stage of the recipe, as the output that was made of it tells of it."""

    name: str
    facts: Mapping[str, Any]  # those of its lowmem_aim.json: recipe, inputs, outputs
    local: Sequence[str]  # labels of models and files that were on this machine

    @property
    def document(self) -> dict[str, Any]:
        """The document of the recipe that made the stage."""
        return {"name": self.name, **self.facts["recipe"]}


def how_to_run(plan: Plan, inputs: Inputs, of_stages: Sequence[str] = ()) -> str:
    """Comments for the top of the recipe's file: what has to be filled in, and the command to run it again.

    `of_stages`: labels of what the recipe's named stages were made of, if it was on this machine.
    """
    local = [*of_stages, *local_labels(plan.recipe, inputs)]
    flags = f" --seed {plan.seed}" * (plan.seed != 0) + f" --nonfinite {plan.nonfinite}" * (plan.nonfinite != "stop")
    lines = []
    if local:
        lines += [_WITHOUT_PATHS]
        lines += [f"  {printable(name)}" for name in dict.fromkeys(local)]
    lines.append(f"To merge again: lowmem-aim merge mergekit_config.yml NEW-FOLDER{flags}")
    return "".join(f"# {line}\n" for line in lines)


def local_labels(recipe: Recipe, inputs: Inputs) -> list[str]:
    """The labels of the models and files of a recipe that are on this machine, without the recipe's own stages."""
    named = dict(inputs.opened)
    if recipe.tokenizer_model and inputs.tokenizer:
        named.setdefault(recipe.tokenizer_model, inputs.tokenizer.owner)
    local = [label for reference, model in named.items() for label in _local(reference, model)]
    tables = [table.calibration for table in (recipe.aim, recipe.acm, recipe.solve) if table]
    texts = [*tables, *(expert.calibration for expert in recipe.models)]
    return local + [calibration_label(name) for name in texts if name not in ("", BUILTIN) and is_here(name)]


def _local(reference: str, model: Checkpoint) -> list[str]:
    """The label of a model if it, or its adapter, was named by a local path; else []."""
    parts = zip(parsed(reference).parts, model.place, strict=True)
    return [model.label] if any(same_reference(part, str(folder)) for part, folder in parts) else []


def calibration_label(calibration: str) -> str:
    """The name of calibration texts: of a file without its folder, a Hub dataset's id, or `builtin`."""
    if calibration in ("", BUILTIN):
        return calibration or PILE
    local = is_activations_file(calibration) or calibration.endswith((".jsonl", ".txt"))
    return Path(calibration).name if local else calibration


def _parts(recipe: Recipe, inputs: Inputs) -> dict[str, Any]:
    """The models of the recipe as it lists them: whole, in slices, or either in each of its modules."""
    if not recipe.modules:
        return _listed(recipe.slices, recipe, inputs)
    modules = {}
    for module in recipe.modules:
        parts = _listed([part for part in recipe.slices if part.module == module], recipe, inputs)
        parts |= {"parameters": _settings(module.parameters)} if module.parameters else {}
        modules[module.name] = parts
    return {"modules": modules}


def _listed(parts: Sequence[Slice], recipe: Recipe, inputs: Inputs) -> dict[str, Any]:
    """The models of the recipe, or of a module of it."""
    if parts[0].sliced:
        return {"slices": [_slice(part, recipe, inputs) for part in parts]}
    return {"models": [_model(entry, inputs) for entry in parts[0].experts]}


def _slice(part: Slice, recipe: Recipe, inputs: Inputs) -> dict[str, Any]:
    listed = list(part.experts)
    if part.base and part.base not in listed and recipe.builds_on_base:
        listed.insert(0, part.base)
    own_base = part.base and part.base.reference != recipe.base
    written: dict[str, Any] = {"sources": [_model(entry, inputs) for entry in listed]}
    written |= {"base_model": inputs.opened[part.base.reference].label} if own_base and part.base else {}
    return written | ({"parameters": _settings(part.parameters)} if part.parameters else {})


def _model(entry: ModelEntry, inputs: Inputs) -> dict[str, Any]:
    written: dict[str, Any] = {"model": inputs.opened[entry.reference].label}
    if entry.layers is not None:
        written["layer_range"] = [entry.layers.start, entry.layers.stop]
    if entry.calibration:
        written["calibration"] = calibration_label(entry.calibration)
    return written | ({"parameters": _settings(entry.parameters)} if entry.parameters else {})


def _settings(settings: Mapping[str, Setting]) -> dict[str, Any]:
    return {name: _setting(setting) for name, setting in settings.items()}


def _setting(setting: Setting) -> Any:
    if not setting.filtered:
        return _plain(setting.value)
    return [({"filter": pattern} if pattern else {}) | {"value": _plain(value)} for pattern, value in setting.value]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
