"""The rows of the output's vocabulary: for each model its own row of each token, and what stands where it has none.

A token that a model lacks takes the base's row, if the base has the token, else its only owner's, else the mean of its
owners' rows, else zeros. A recipe may say otherwise for single tokens. All models that lack a token take the same row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lowmem_aim.errors import RecipeError, printable
from lowmem_aim.models.checkpoint import Checkpoint
from lowmem_aim.recipe.recipe import TokenRow
from lowmem_aim.system.on_demand import torch

if TYPE_CHECKING:
    from torch import Tensor

Place = tuple[Path, ...]  # of a model: `Checkpoint.place`


@dataclass(frozen=True)
class TokenRows:
    """The rows of embeddings and heads in the output, by the place of the model that they are taken from.

    A model without an entry in `own` has the very rows of the output.
    """

    count: int  # rows of the output
    own: Mapping[Place, Tensor]  # (count,) int64: the model's row; -1: it takes the row that `given` makes
    given: Mapping[Place, Tensor]  # (count,) int64: rows whose mean is given; -1: none of this model; all -1: zeros
    mean_from: int  # from this row on, rows are the mean of the model's rows before

    def ids_of(self, place: Place) -> Tensor:
        """The id that each row of the output has in a model, (count,) int64; -1: it has no such row."""
        return self.own.get(place, torch.arange(self.count))

    @property
    def has_means(self) -> bool:
        """Whether rows are computed, and not only taken from somewhere."""
        givers = [(rows >= 0).to(torch.int64) for rows in self.given.values()]
        return self.mean_from < self.count or (len(givers) > 1 and int(torch.stack(givers).sum(dim=0).max()) > 1)


@dataclass(frozen=True)
class Tokens:
    """The tokens of one model that have rows in its embedding."""

    model: Checkpoint
    rows: int  # of its embedding, padding included
    ids: Mapping[str, int]

    def row(self, token: str) -> int:
        """The row of a token; -1 if the model has none."""
        found = self.ids.get(token, -1)
        return found if 0 <= found < self.rows else -1


def matched(tokens: Mapping[str, int], count: int, other: Tokens) -> Tensor:
    """For each of `count` rows the other model's row of the same token; -1: it has none. (count,) int64."""
    rows = torch.full((count,), -1, dtype=torch.int64)
    known = [(row, other.row(token)) for token, row in tokens.items() if 0 <= row < count]
    places, found = torch.tensor(known, dtype=torch.int64).reshape(-1, 2).unbind(1)
    rows[places] = found
    return rows


def token_rows(
    tokens: Mapping[str, int],  # of the output: text -> row
    count: int,
    mean_from: int,
    models: Mapping[str, Tokens],  # by their references in the recipe
    base: Checkpoint | None,
    padding: Checkpoint | None,  # whose rows those without a token are
    asked: Mapping[str, TokenRow],
) -> TokenRows | None:
    """The rows of the output's vocabulary; None if every model has the very rows of the output.

    Raises RecipeError, with all problems at once, for a token that takes its row from a model that has none.
    """
    of_place = {one.model.place: one for one in models.values()}
    own = {place: _own(tokens, count, one) for place, one in of_place.items()}
    if padding is not None:
        _pad(own, tokens, count, of_place[padding.place])
    for rows in own.values():
        rows[mean_from:] = -1
    known = {place: rows.clone() for place, rows in own.items()}
    for token, row in _rows_of(asked, tokens, count):
        if asked[token].force:
            for rows in own.values():
                rows[row] = -1
    lacking = torch.stack([*own.values()]).min(dim=0).values < 0
    lacking[mean_from:] = False
    given = _usual(known, lacking, None if base is None else base.place)
    problems: list[str] = []
    for token, row in _rows_of(asked, tokens, count):
        if asked[token].source != "usual":
            for rows in given.values():
                rows[row] = -1
            one = models.get(asked[token].model)
            problems += _give(token, row, asked[token], one, given, needed=bool(lacking[row]))
    if problems:
        raise RecipeError(problems, "name a model that has the token, `{kind: zero}`, or leave the token out")
    ordered = torch.arange(count)
    same = {place for place, rows in own.items() if of_place[place].rows == count and torch.equal(rows, ordered)}
    moved = {place: rows for place, rows in own.items() if place not in same}
    given = {place: rows for place, rows in given.items() if bool((rows >= 0).any())}
    return TokenRows(count, moved, given, mean_from) if moved else None


def _own(tokens: Mapping[str, int], count: int, one: Tokens) -> Tensor:
    if one.ids == tokens and one.rows == count:
        return torch.arange(count)  # the same vocabulary, padding included
    return matched(tokens, count, one)


def _pad(own: dict[Place, Tensor], tokens: Mapping[str, int], count: int, padding: Tokens) -> None:
    """Give rows without a token to the model that has them, if it has such rows."""
    free = torch.ones(count, dtype=torch.bool)
    free[torch.tensor([row for row in tokens.values() if row < count], dtype=torch.int64)] = False
    free[padding.rows :] = False
    own[padding.model.place] = torch.where(free, torch.arange(count), own[padding.model.place])


def _rows_of(asked: Mapping[str, TokenRow], tokens: Mapping[str, int], count: int) -> Iterator[tuple[str, int]]:
    return ((token, tokens[token]) for token in asked if 0 <= tokens.get(token, -1) < count)


def _usual(own: Mapping[Place, Tensor], lacking: Tensor, base: Place | None) -> dict[Place, Tensor]:
    """The rows that are given where some model lacks one: the base's, else those of all that have one."""
    none = torch.full_like(next(iter(own.values())), -1)
    of_base = own[base] >= 0 if base is not None and base in own else torch.zeros_like(lacking)
    return {
        place: torch.where(lacking if place == base else lacking & ~of_base, rows, none) for place, rows in own.items()
    }


def _give(
    token: str, row: int, asked: TokenRow, one: Tokens | None, given: dict[Place, Tensor], *, needed: bool
) -> Iterator[str]:
    """Take a token's row from where the recipe says; yield why that cannot be done."""
    if one is None:  # zeros
        return
    what = f"{asked.where}: `{printable(token)}`"
    if asked.token_id is not None:
        found = asked.token_id if asked.token_id < one.rows else -1
        lacks = f"{what}: `{printable(one.model.label)}` has {one.rows} rows, and none with the id {asked.token_id}"
    else:
        found = one.row(token if asked.token is None else asked.token)
        lacks = f"{what}: `{printable(one.model.label)}` has no token `{printable(asked.token or token)}`"
    if found < 0 and (needed or asked.source == "model_token"):
        yield lacks
    elif needed:
        given[one.model.place][row] = found
