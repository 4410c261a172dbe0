"""The tokens in a tokenizer's files, read as the JSON or text that they are, without a tokenizer library.

The files: tokenizer.json (the tokenizers library), else vocab.json (GPT-2's kind) or vocab.txt (BERT's), with the
tokens that were added: in tokenizer.json, added_tokens.json and `added_tokens_decoder` of tokenizer_config.json.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LARGEST_ID = 1 << 31  # the largest known vocabularies have 262,000 tokens


def tokens_in(folder: Path) -> dict[str, int] | None:
    """Token text -> id; None if the folder has no such file. Raises ValueError for files that do not hold tokens."""
    try:
        tokens = _own_tokens(folder)
        if tokens is None:
            return None
        found = tokens | {entry["content"]: number for number, entry in further_tokens(folder).items()}
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    wrong = next((t for t, n in found.items() if not (type(n) is int and 0 <= n < LARGEST_ID)), None)
    if wrong is not None:
        raise ValueError(f"the token {wrong!r} has the id {found[wrong]!r}")
    return found


def _own_tokens(folder: Path) -> dict[str, int] | None:
    if (folder / "tokenizer.json").is_file():
        table = _json(folder / "tokenizer.json")
        tokens = table["model"]["vocab"]
        if isinstance(tokens, list):  # [[token, score], ...] of a unigram model
            tokens = {token: number for number, (token, _) in enumerate(tokens)}
        return {**tokens, **{added["content"]: added["id"] for added in table.get("added_tokens") or ()}}
    if (folder / "vocab.json").is_file():
        return dict(_json(folder / "vocab.json"))
    if (folder / "vocab.txt").is_file():
        lines = (folder / "vocab.txt").read_text(encoding="utf-8").split("\n")  # tokens may be other line ends
        return {token.rstrip("\r"): number for number, token in enumerate(lines) if token}
    return None


def further_tokens(folder: Path) -> dict[int, dict[str, Any]]:
    """Id -> added token, of those in the files beside a tokenizer's vocabulary; a token's own settings where known."""
    added: dict[int, dict[str, Any]] = {}
    if (folder / "added_tokens.json").is_file():
        added |= {number: {"content": token} for token, number in _json(folder / "added_tokens.json").items()}
    if (folder / "tokenizer_config.json").is_file():
        decoder = _json(folder / "tokenizer_config.json").get("added_tokens_decoder") or {}
        added |= {int(number): dict(entry) for number, entry in decoder.items()}
    return added


def _json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))
