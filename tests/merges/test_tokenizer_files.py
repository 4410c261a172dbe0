"""The files of a new tokenizer, as several versions of transformers and other tools lay them out."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import sentencepiece
import tiny
from conftest import Place
from merge_cases import tensors_in
from transformers import AutoTokenizer
from vocabularies import ROWS, add_tokens, resize, tokens_of

from lowmem_aim.models.checkpoint import Checkpoint
from lowmem_aim.models.inputs import Inputs
from lowmem_aim.models.output_tokenizer import OutputTokenizer
from lowmem_aim.models.roles import NO_ROLES
from lowmem_aim.models.token_rows import TokenRows
from lowmem_aim.output.token_ids import with_vocabulary

LINES = ["the quick brown fox jumps over the lazy dog", "a dog that sleeps in the sun", "merge models"] * 9


def sentencepiece_only(folder: Path, lines: list[str], size: int) -> None:
    """Leave the model in `folder` with a sentencepiece model of so many tokens, as Llama 2's first releases."""
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)
    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=made, vocab_size=size, model_type="bpe", minloglevel=2
    )
    (folder / "tokenizer.model").write_bytes(made.getvalue())


def union(place: Place, *more: object) -> Path:
    done = place.merge("--tokenizer-source", "union", *more, method="linear")
    assert done.code == 0, done.err
    return place.out


def test_sentencepiece_models_become_one_tokenizer_json(place: Place) -> None:
    sentencepiece_only(place.folder / "base", LINES, 40)
    sentencepiece_only(place.folder / "math", [*LINES, "zyx zyx zyx zyx"], 45)
    sentencepiece_only(place.folder / "code", LINES, 40)
    done = place.merge("--tokenizer-source", "union", method="linear")
    assert done.code == 0, done.err
    assert "left out are `tokenizer.model`" in " ".join(done.err.split())
    out = place.out
    assert not (out / "tokenizer.model").exists()
    found, base = tokens_of(out), tokens_of(place.folder / "base")
    assert {token: found[token] for token in base} == base
    assert found.keys() == base.keys() | tokens_of(place.folder / "math").keys()
    merged, expert = AutoTokenizer.from_pretrained(out), AutoTokenizer.from_pretrained(place.folder / "math")
    for text in (*LINES[:3], "zyx"):
        assert merged.tokenize(text) == expert.tokenize(text)
        assert merged.decode(merged(text)["input_ids"], skip_special_tokens=True).strip() == text


def test_files_of_older_transformers_get_the_new_tokens_too(place: Place) -> None:
    base = place.folder / "base"
    config = json.loads((base / "tokenizer_config.json").read_text())
    entries = json.loads((base / "tokenizer.json").read_text())["added_tokens"]
    decoder = {str(e["id"]): {key: value for key, value in e.items() if key != "id"} for e in entries}
    (base / "tokenizer_config.json").write_text(json.dumps(config | {"added_tokens_decoder": decoder}))
    (base / "added_tokens.json").write_text(json.dumps({"<pad>": 258}))
    add_tokens(place.folder / "math", ["<|mine|>"])
    out = union(place)
    config = json.loads((out / "tokenizer_config.json").read_text())
    assert config["added_tokens_decoder"].keys() == {*decoder, "259"}
    assert config["added_tokens_decoder"]["259"]["content"] == "<|mine|>"
    assert json.loads((out / "added_tokens.json").read_text()) == {"<pad>": 258, "<|mine|>": 259}
    assert tokens_of(out)["<|mine|>"] == 259


def test_tokens_that_only_added_tokens_json_has_are_tokens(place: Place) -> None:
    """As fine-tunes of transformers 4 have them: `[PAD]` is nowhere else."""
    (place.folder / "math" / "added_tokens.json").write_text(json.dumps({"[PAD]": 259}))
    resize(place.folder / "math", 260, 259)
    out = union(place)
    entries = json.loads((out / "tokenizer.json").read_text())["added_tokens"]
    assert [entry["id"] for entry in entries if entry["content"] == "[PAD]"] == [259]
    own = tensors_in(place.folder / "math")[ROWS[0]][259]
    assert (tensors_in(out)[ROWS[0]][259] - own).abs().max() < 1e-6


def test_a_model_with_more_tokens_than_rows_gives_only_those_with_rows(place: Place) -> None:
    add_tokens(place.folder / "math", ["<|mine|>"])
    resize(place.folder / "base", 258, 258)  # `<pad>` has none
    tiny.edit_config(place.folder / "base", pad_token_id=None)
    out = union(place)
    assert tokens_of(out)["<|mine|>"] == 259
    assert tokens_of(out)["<pad>"] == 258
    math, code = (tensors_in(place.folder / name)[ROWS[0]] for name in ("math", "code"))
    assert (tensors_in(out)[ROWS[0]][258] - (math[258] + code[258]) / 2).abs().max() < 1e-6


class TestConfigs:
    def inputs(self, config: dict[str, Any], owner: dict[str, Any], special: dict[str, int], rows: int) -> Inputs:
        reference = Checkpoint(Path("a"), "a", config, {})
        model = Checkpoint(Path("b"), "b", owner, {})
        found = Inputs(None, (reference,), reference, NO_ROLES)
        found.tokenizer = OutputTokenizer(model, special)
        found.token_rows = TokenRows(rows, {}, {}, rows)
        return found

    def test_the_size_stands_in_the_part_about_text(self) -> None:
        config = {"text_config": {"hidden_size": 8}, "image_token_id": 5, "vision": {"vocab_size": 3}}
        owner = {"text_config": {}, "image_token_id": 7}
        found = with_vocabulary(config, self.inputs(config, owner, {}, 64))
        assert found == {
            "text_config": {"hidden_size": 8, "vocab_size": 64},
            "image_token_id": 7,
            "vision": {"vocab_size": 3},
        }

    def test_ids_are_the_owners_or_those_of_its_special_tokens(self) -> None:
        config = {"vocab_size": 9, "bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": 4, "unk_token_id": None}
        found = with_vocabulary(config, self.inputs(config, {"bos_token_id": 11}, {"eos": 12}, 64))
        assert found == {"vocab_size": 64, "bos_token_id": 11, "eos_token_id": 12, "unk_token_id": None}
