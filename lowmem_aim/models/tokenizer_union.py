"""One tokenizer made of several: tokenizer.json of the first model with the tokens that only the others have.

The first model's tokens keep their ids, and new ones get the next: first the ordinary tokens of each model in turn, by
their ids, then the added ones. The merges of a byte pair encoding come after the first model's: its own texts are cut
as before where no new token fits, and if the other's vocabulary is the same and more, texts are cut as in the other.
mergekit makes added tokens of new ordinary ones, which cut texts wherever the letters stand. All of it works on the
JSON alone.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

Table = dict[str, Any]  # a tokenizer.json
NEVER = -1e4  # log probability of a token that a unigram model never chooses


def united(tables: Sequence[Table], rows: Sequence[int | None], more: Collection[str]) -> Table:
    """The first table with the tokens of the others, and with the added tokens `more`. The first one is overwritten.

    `rows` are the rows of each model's embedding: tokens beyond them have none, and are left out; None: no limit.
    Raises ValueError for tables that do not hold tokens, or have no place for new ones.
    """
    parts = [_cut(table, limit) for table, limit in zip(tables, rows, strict=True)]
    added: dict[str, Table] = {}
    for entry in (entry for part in parts for entry in _added(part)):
        added.setdefault(entry["content"], entry)  # where flags differ, the first model's
    growing = _Growing(parts[0])
    for part in parts[1:]:
        growing.extend(part, [token for token in _ordinary(part) if token not in added])
    for content in (*added, *(token for token in more if token not in growing.ids)):
        growing.add(added.get(content) or _plain(content))
    return growing.table


def tokens_of(table: Table) -> dict[str, int]:
    """Token text -> id, added tokens included. Raises ValueError if the table does not hold tokens."""
    try:
        found = {**_vocabulary(table), **{entry["content"]: entry["id"] for entry in _added(table)}}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    if wrong := [token for token, number in found.items() if type(number) is not int or number < 0]:
        raise ValueError(f"the token {wrong[0]!r} has the id {found[wrong[0]]!r}")
    return found


def with_further_tokens(table: Table, others: Mapping[int, Table]) -> Table:
    """The table with the added tokens (id -> entry) that other files of the tokenizer have, and the table has not."""
    known = {entry["content"] for entry in _added(table)}
    new = [{**_plain(""), **entry, "id": number} for number, entry in others.items() if entry["content"] not in known]
    return {**table, "added_tokens": [*_added(table), *new]}


def _added(table: Table) -> list[Table]:
    return table.get("added_tokens") or []


def _vocabulary(table: Table) -> dict[str, int]:
    tokens = table["model"]["vocab"]
    return {token: number for number, (token, _) in enumerate(tokens)} if isinstance(tokens, list) else dict(tokens)


def _ordinary(table: Table) -> list[str]:
    """The tokens that are not added ones, by their ids."""
    added = {entry["content"] for entry in _added(table)}
    tokens = _vocabulary(table)
    return [token for token in sorted(tokens, key=lambda token: tokens[token]) if token not in added]


def _plain(content: str) -> Table:
    """An added token as transformers' `add_tokens` makes it of a text."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
    return {"id": 0, "content": content, **flags}


def _cut(table: Table, rows: int | None) -> Table:
    """The table without tokens that have no row."""
    tokens = tokens_of(table)
    gone = {token for token, number in tokens.items() if rows is not None and number >= rows}
    if not gone:
        return table
    model = dict(table["model"])
    if isinstance(model["vocab"], list):
        model["vocab"] = model["vocab"][:rows]
    else:
        model["vocab"] = {token: number for token, number in model["vocab"].items() if token not in gone}
    if "merges" in model:
        model["merges"] = [list(pair) for pair in _pairs(table) if not gone & {*pair, _joined(pair, model)}]
    return {**table, "model": model, "added_tokens": [e for e in _added(table) if e["content"] not in gone]}


def _pairs(table: Table) -> Iterator[tuple[str, str]]:
    """The merges of a byte pair encoding, which older files write as `a b`."""
    for merge in table["model"].get("merges") or ():
        first, second = merge.split(" ") if isinstance(merge, str) else merge
        yield first, second


def _joined(pair: tuple[str, str], model: Mapping[str, Any]) -> str:
    return pair[0] + pair[1].removeprefix(model.get("continuing_subword_prefix") or "")


# --- new tokens -------------------------------------------------------------------------------------------------------


class _Growing:
    """A tokenizer that gets new tokens, each with the next id."""

    def __init__(self, table: Table) -> None:
        self.table = table
        self.ids = tokens_of(table)
        self.next = max(self.ids.values(), default=-1) + 1
        self._added = {entry["content"] for entry in _added(table)}

    def add(self, entry: Table) -> None:
        """Make a token an added one, with a new id if the tokenizer does not know it."""
        content = entry["content"]
        if content in self._added:
            return
        self._added.add(content)
        number = self.ids[content] if content in self.ids else self._new(content)
        entries = [*_added(self.table), {**entry, "id": number}]
        self.table["added_tokens"] = sorted(entries, key=lambda one: one["id"])

    def extend(self, other: Table, tokens: Sequence[str]) -> None:
        """Add those of another table's ordinary tokens that are new; with merges or scores, if the two are alike."""
        model, new = self.table["model"], [token for token in tokens if token not in self.ids]
        if not new:
            return
        alike = spelling(self.table) == spelling(other)
        self._fill_holes(model)
        theirs = other["model"]
        scores = dict(theirs["vocab"]) if alike and isinstance(theirs["vocab"], list) else {}
        for token in new:
            _enter(model, token, self._new(token), scores.get(token, NEVER))
        if alike and model.get("merges") is not None:
            model["merges"] = _with_merges(self.table, other)

    def _new(self, token: str) -> int:
        self.ids[token] = self.next
        self.next += 1
        return self.ids[token]

    def _fill_holes(self, model: Table) -> None:
        """Enter the added tokens beyond the model's own into the model, so that new ids may follow theirs."""
        for token, number in sorted(self.ids.items(), key=lambda item: item[1]):
            if not isinstance(model["vocab"], list):
                model["vocab"].setdefault(token, number)
            elif number >= len(model["vocab"]):
                _enter(model, token, number, NEVER)


def _enter(model: Table, token: str, number: int, score: float) -> None:
    """Enter a token into a model. Raises ValueError if its id is not the next one of a list, whose places are ids."""
    if not isinstance(model["vocab"], list):
        model["vocab"][token] = number
    elif number == len(model["vocab"]):
        model["vocab"].append([token, score])
    else:
        raise ValueError("its ids have gaps, so that its unigram model has no place for new tokens")


def spelling(table: Table) -> tuple[Any, ...]:
    """The facts that two tokenizers must have in common for the tokens of one to fit the other's texts."""
    model = table["model"]
    parts = [model.get(key) or None for key in ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")]
    return model.get("type"), *parts, "ByteLevel" in json.dumps(table.get("decoder"))


def _with_merges(first: Table, other: Table) -> list[Any]:
    """The first table's merges, and after them the other's that it can use, in the form that the first one's have."""
    model, before = first["model"], first["model"]["merges"]
    pairs = [*_pairs(first)]
    known, vocabulary = set(pairs), model["vocab"]
    pairs += [
        pair
        for pair in _pairs(other)
        if pair not in known and all(token in vocabulary for token in (*pair, _joined(pair, model)))
    ]
    as_texts = any(isinstance(merge, str) for merge in before) and not any(" " in a + b for a, b in pairs)
    return [" ".join(pair) if as_texts else list(pair) for pair in pairs]
