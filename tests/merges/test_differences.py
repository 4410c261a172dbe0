"""Differences from an interrupted run are reported key by key, without what follows from them."""

from __future__ import annotations

from typing import Any

import pytest

from lowmem_aim.jobs.differences import MOST_TOLD, differences, most

A, B = "0" * 31 + "a", "0" * 31 + "b"
MODELS = [{"model": "math", "parameters": {"weight": 0.5}}, {"model": "code", "parameters": {"weight": 0.5}}]


def job(**more: Any) -> dict[str, Any]:
    recipe = {"recipe: models": MODELS, "recipe: aim": {"omega": 0.4, "scaling": "identity"}}
    digests = {"parameters": A, "shards": A, "config.json": A, "tokenizer and other small files": {"tokenizer.json": A}}
    return {**recipe, "seed": 0, **digests, **more}


@pytest.mark.parametrize(
    ("now", "told"),
    [
        ({}, []),
        ({"recipe: aim": {"omega": 0.5, "scaling": "identity"}, "parameters": B}, ["aim.omega: 0.4 then, 0.5 now"]),
        ({"recipe: aim": None}, ["aim: given then, not given now"]),
        ({"recipe: aim": {"omega": 0.4, "scaling": "sqrt", "tied": "keep"}}, None),
        (
            {"recipe: models": [MODELS[0], {"model": "code", "parameters": {"weight": 1.0}}], "parameters": B},
            ["models[1].parameters.weight: 0.5 then, 1.0 now"],
        ),
        ({"recipe: models": MODELS[:1], "parameters": B, "shards": B}, ["models[1]: code then, not given now"]),
        (
            {"seed": 7, "shards": B},
            ["seed: 0 then, 7 now", "the layout of the output files has changed (`--shard-size`"],
        ),
        ({"recipe: dtype": "float16", "shards": B, "parameters": B}, ["dtype: not given then, float16 now"]),
        ({"parameters": B}, ["the parameters of single tensors have changed"]),
        ({"config.json": B}, ["config.json has changed"]),
        ({"tokenizer and other small files": {"tokenizer.json": B}}, ["tokenizer.json has changed"]),
        (
            {"tokenizer and other small files": {"vocab.json": B}},
            ["tokenizer.json is gone", "vocab.json is new"],
        ),
        ({"calibration": A}, ["the calibration of AIM has changed"]),
        (
            {"rows of the vocabulary": {"1": A, "2": B}},
            ["the rows of the vocabulary that belong together have changed"],
        ),
    ],
)
def test_a_difference_is_told_by_its_key(now: dict[str, Any], told: list[str] | None) -> None:
    found = differences(job(), job(**now))
    if told is None:
        told = ["aim.scaling: identity then, sqrt now", "aim.tied: not given then, keep now"]
    assert len(found) == len(told), found
    for message, start in zip(found, told, strict=True):
        assert message.startswith(start)


def test_what_follows_from_changed_inputs_is_not_told_again() -> None:
    assert differences(job(), job(shards=B, parameters=B), explained=True) == []


def test_many_differences_are_cut_off_and_counted() -> None:
    assert most([str(n) for n in range(MOST_TOLD)]) == [str(n) for n in range(MOST_TOLD)]
    assert most([str(n) for n in range(MOST_TOLD + 3)])[MOST_TOLD:] == ["and 3 more"]
