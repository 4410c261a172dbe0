"""The vocabulary's size and the ids of special tokens in configs, as the output's tokenizer needs them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lowmem_aim.models.inputs import Inputs
from lowmem_aim.models.output_tokenizer import OutputTokenizer
from lowmem_aim.models.vocabulary import vocabulary_rows

_ID = re.compile(r"(\w+)_token_(?:id|ids|index)")  # bos_token_id, eos_token_id, image_token_index


def with_vocabulary(config: Mapping[str, Any], inputs: Inputs) -> Mapping[str, Any]:
    """A config of the reference's, with the size and the token ids of the output's vocabulary."""
    rows, tokenizer = inputs.token_rows, inputs.tokenizer
    if tokenizer is not None and tokenizer.owner is not inputs.reference:
        config = with_ids(config, tokenizer.owner.config, tokenizer)
    if rows is not None and rows.count != vocabulary_rows(inputs.roles, inputs.reference):
        config = _sized(config, rows.count)
    return config


def with_ids(config: Mapping[str, Any], owners: Mapping[str, Any], tokenizer: OutputTokenizer) -> dict[str, Any]:
    """A config with the ids of special tokens that the tokenizer's owner has in its own config (`owners`).

    An id that is not there is that of the tokenizer's token for the purpose; without such a token, the key is left out.
    """
    found = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            theirs = owners.get(key)
            found[key] = with_ids(value, theirs if isinstance(theirs, Mapping) else {}, tokenizer)
        elif (match := _ID.fullmatch(key)) and value is not None:
            if (number := owners.get(key, tokenizer.special.get(match[1]))) is not None:
                found[key] = number
        else:
            found[key] = value
    return found


def _sized(config: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """The config with the number of rows as its vocabulary's size, where it stands: in the part about text, if any."""
    inner = config.get("text_config")
    found = dict(config)
    if isinstance(inner, Mapping):
        found["text_config"] = {**inner, "vocab_size": rows}
    if "vocab_size" in config or not isinstance(inner, Mapping):
        found["vocab_size"] = rows
    return found
