"""Configs of the models of a merge are compared as transformers reads them, whatever their spelling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lowmem_aim.errors import ModelError
from lowmem_aim.events import Event, Notice
from lowmem_aim.models.checkpoint import Checkpoint
from lowmem_aim.models.inputs import Inputs
from lowmem_aim.models.reader import Reader
from lowmem_aim.models.roles import TensorRoles
from lowmem_aim.models.settings import check_settings

NO_ROLES = TensorRoles({}, frozenset(), frozenset(), frozenset())
LLAMA = {"model_type": "llama", "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32}


def told(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """What is told of a base with the config `ours` and an expert with `theirs`."""
    base, expert = (Checkpoint(Path(), name, config, {}) for name, config in (("base", ours), ("expert", theirs)))
    seen: list[Event] = []
    with Reader() as reader:
        check_settings(Inputs(base, (expert,), base, NO_ROLES), reader, seen.append, set())
    assert all(isinstance(event, Notice) and event.level == "warning" for event in seen)
    return [event.text for event in seen if isinstance(event, Notice)]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"rope_theta": 5e5}, {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}),
        (
            {"rope_scaling": {"type": "yarn", **YARN}, "rope_theta": 5e5, "max_position_embeddings": 128},
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 5e5, **YARN}, "max_position_embeddings": 128},
        ),
        ({"rms_norm_eps": 1e-6, "num_key_value_heads": 4, "head_dim": 8}, {}),  # the defaults
        (
            {"rms_norm_eps": 9.999999747378752e-06, "rope_theta": 10000},
            {"rms_norm_eps": 1e-5},
        ),  # of float32
        ({"tie_word_embeddings": False, "rope_scaling": None}, {"vocab_size": 99, "eos_token_id": [1, 2]}),
    ],
    ids=["two spellings", "two spellings of scaling", "defaults", "float32", "what changes no weight's meaning"],
)
def test_equal_settings_are_no_difference_however_they_are_written(
    ours: dict[str, Any], theirs: dict[str, Any]
) -> None:
    assert told(LLAMA | ours, LLAMA | theirs) == []
    assert told(LLAMA | theirs, LLAMA | ours) == []


def test_rotary_and_norm_settings_that_differ_are_told_by_key() -> None:
    ours = LLAMA | {"rope_theta": 5e5, "rms_norm_eps": 1e-5}
    theirs = LLAMA | {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}
    (text,) = told(ours, theirs)
    assert "`expert` has `rms_norm_eps` 1e-06, `rope_parameters.rope_theta` 1000000.0" in text
    assert "`base` has 1e-05, 500000.0; the output has the latter" in text


def test_head_counts_that_differ_are_refused_wherever_they_stand() -> None:
    text = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
    cases = [
        (LLAMA, LLAMA | {"num_key_value_heads": 2}, "`num_key_value_heads` 2, not 4"),
        (LLAMA, LLAMA | {"head_dim": 4}, "`head_dim` 4, not 8"),
        (LLAMA | {"my_heads": [4, 4]}, LLAMA | {"my_heads": [4, 2]}, "`my_heads` [4, 2], not [4, 4]"),
        ({"model_type": "gpt2"}, {"model_type": "gpt2", "n_head": 6}, "`n_head` 6, not 12"),
        (
            {"model_type": "gemma3", "text_config": text},
            {"model_type": "gemma3", "text_config": text | {"num_attention_heads": 2}},
            "`text_config.num_attention_heads` 2, not 4",
        ),
        (
            {"model_type": "deepseek_v3", **text},
            {"model_type": "deepseek_v3", **text, "qk_rope_head_dim": 32},
            "`qk_rope_head_dim` 32, not 64",
        ),
    ]
    for ours, theirs, message in cases:
        with pytest.raises(ModelError) as refused:
            told(ours, theirs)
        assert any(message in problem for problem in refused.value.problems), refused.value.problems


def test_models_of_different_types_are_told_by_their_types_alone() -> None:
    with pytest.raises(ModelError) as refused:
        told(LLAMA, {"model_type": "mistral", "num_attention_heads": 2})
    assert refused.value.problems == ("`expert` does not fit `base`: `model_type` mistral, not llama",)


def test_configs_whose_relevant_keys_are_equal_are_not_read_by_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Reader, "settings", None)
    theirs = {"_name_or_path": "x", "dtype": "bfloat16", "transformers_version": "4.1", "use_cache": False}
    assert told(LLAMA | {"rope_theta": 5e5}, LLAMA | theirs | {"rope_theta": 5e5, "attention_dropout": 0.5}) == []
