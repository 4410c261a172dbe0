"""The files of the output's tokenizer, in the place of the reference's: another model's, or with new tokens.

What a model's tokenizer has is taken over as files, byte for byte. Only what a recipe changes is written anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowmem_aim.errors import ModelError, printable
from lowmem_aim.events import Emit, Notice
from lowmem_aim.models.checkpoint import Checkpoint
from lowmem_aim.models.config import parse_json
from lowmem_aim.models.folder import CHAT_TEMPLATES
from lowmem_aim.models.inputs import Inputs
from lowmem_aim.models.known_files import LARGEST_FILE, OF_TOKENIZERS, TOKENIZERS, fits
from lowmem_aim.models.output_tokenizer import OutputTokenizer
from lowmem_aim.models.vetted import TOKENIZER_CONFIG, tokenizer_config
from lowmem_aim.output.card import json_bytes
from lowmem_aim.output.chat_templates import TEMPLATES, most_frequent
from lowmem_aim.output.copied import copied_files
from lowmem_aim.output.token_ids import with_ids, with_vocabulary
from lowmem_aim.recipe.recipe import Recipe

TOKENIZER, TEMPLATE, ADDED, GENERATION = (
    "tokenizer.json",
    "chat_template.jinja",
    "added_tokens.json",
    "generation_config.json",
)
_TEMPLATES = (TEMPLATE, "chat_template.json")


def with_tokenizer(copied: Mapping[str, bytes], recipe: Recipe, inputs: Inputs, emit: Emit) -> dict[str, bytes]:
    """The files that the output takes from the reference (`copied`), with the tokenizer that the recipe asks for.

    Raises ModelError for files that are not what their names say.
    """
    files, tokenizer = dict(copied), inputs.tokenizer
    if tokenizer is not None and tokenizer.owner is not inputs.reference:
        theirs = copied_files(tokenizer.owner)
        files = {name: content for name, content in files.items() if not _is_of_tokenizer(name)}
        files |= {name: content for name, content in theirs.items() if _is_of_tokenizer(name)}
        if GENERATION in files:
            files[GENERATION] = json_bytes(_generation(files[GENERATION], theirs.get(GENERATION), inputs, tokenizer))
    if tokenizer is not None and tokenizer.table:
        files = _with_new_tokens(files, tokenizer, emit)
    if recipe.chat_template is not None:
        files = _with_template(files, recipe.chat_template, inputs, emit)
    return files


def _is_of_tokenizer(name: str) -> bool:
    return fits(name, (*OF_TOKENIZERS, TOKENIZER_CONFIG, *_TEMPLATES)) or name.startswith(f"{CHAT_TEMPLATES}/")


def _generation(content: bytes, theirs: bytes | None, inputs: Inputs, tokenizer: OutputTokenizer) -> Any:
    """The reference's generation_config.json with the owner's token ids: of its own such file, or of its config."""
    value = parse_json(content, inputs.reference.folder / GENERATION)
    own = parse_json(theirs, tokenizer.owner.folder / GENERATION) if theirs else {}
    if not isinstance(value, dict) or not isinstance(own, dict):
        return value
    return with_ids(value, {**with_vocabulary(inputs.reference.config, inputs), **own}, tokenizer)


# --- new tokens -------------------------------------------------------------------------------------------------------


def _with_new_tokens(files: dict[str, bytes], tokenizer: OutputTokenizer, emit: Emit) -> dict[str, bytes]:
    """The owner's files, with the new tokenizer.json in the place of what it contradicts."""
    other = [name for name in files if name != TOKENIZER and fits(name, (*TOKENIZERS, "merges.txt"))]
    if tokenizer.ordinary:  # these hold the old vocabulary, and nobody would write sentencepiece models anew
        files = {name: content for name, content in files.items() if name not in other}
        if other:
            names = ", ".join(f"`{printable(name)}`" for name in sorted(other))
            emit(Notice(f"the output has new tokens in {TOKENIZER} alone: left out are {names}"))
    files[TOKENIZER] = tokenizer.table.encode()
    entries = {
        str(entry["id"]): {key: value for key, value in entry.items() if key != "id"} for entry in tokenizer.added
    }
    config = parse_json(files[TOKENIZER_CONFIG], Path(TOKENIZER_CONFIG)) if TOKENIZER_CONFIG in files else {}
    if "added_tokens_decoder" in config:
        files[TOKENIZER_CONFIG] = json_bytes({**config, "added_tokens_decoder": entries})
    if ADDED in files or (other and not tokenizer.ordinary):
        before = parse_json(files[ADDED], Path(ADDED)) if ADDED in files else {}
        new = {entry["content"]: entry["id"] for entry in tokenizer.added if entry["content"] in tokenizer.new}
        files[ADDED] = json_bytes({**before, **new})
    return files


# --- chat templates ---------------------------------------------------------------------------------------------------


def _with_template(files: dict[str, bytes], asked: str, inputs: Inputs, emit: Emit) -> dict[str, bytes]:
    """The files with one chat template, as transformers writes it, in the place of all others."""
    text = TEMPLATES.get(asked, asked)
    if asked == "auto":
        text = most_frequent(template_of(model) for model in dict.fromkeys(inputs.checkpoints))
        if not text:
            emit(
                Notice("`chat_template: auto`: no model has a chat template, and the output will have none", "warning")
            )
            return files
    if files.get(TEMPLATE, b"").decode("utf-8", "replace").strip() == text:
        return files  # its own bytes
    files = {
        name: content
        for name, content in files.items()
        if name not in _TEMPLATES and not name.startswith(f"{CHAT_TEMPLATES}/")
    }
    if TOKENIZER_CONFIG in files:
        config = parse_json(files[TOKENIZER_CONFIG], Path(TOKENIZER_CONFIG))
        if isinstance(config, dict) and config.pop("chat_template", None) is not None:
            files[TOKENIZER_CONFIG] = json_bytes(config)
    return {**files, TEMPLATE: text.encode()}


def template_of(model: Checkpoint) -> str:
    """A model's chat template, the default one of several; empty if it has none. Raises ModelError."""
    content = model.small_file(TEMPLATE, LARGEST_FILE)
    if content is not None:
        try:
            return content.decode()
        except UnicodeDecodeError as error:
            raise ModelError(f"`{printable(str(model.folder / TEMPLATE))}` is not UTF-8 text") from error
    return _default(tokenizer_config(model).get("chat_template"))


def _default(template: Any) -> str:
    """The default template of a tokenizer_config.json: a text, or several by their names."""
    if isinstance(template, list):  # [{"name": ..., "template": ...}, ...]
        entries = [entry for entry in template if isinstance(entry, dict)]
        template = {entry.get("name"): entry.get("template") for entry in entries}
    if isinstance(template, dict):
        template = template.get("default")
    return template if isinstance(template, str) else ""
