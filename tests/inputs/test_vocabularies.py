"""Rows of the vocabulary belong to tokens: what is told, refused and matched where two tokenizers differ."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import sentencepiece
import tiny
import torch
from conftest import Place, Run
from merge_cases import tensors_in
from transformers import AutoTokenizer
from vocabularies import ROWS, permute_rows, swap_tokens

from lowmem_aim.models.checkpoint import Checkpoint
from lowmem_aim.models.reader import Reader


class TestMergeWithoutTokenizerSource:
    def test_tokens_at_other_ids_are_told_with_their_number_and_examples(self, place: Place) -> None:
        swap_tokens(place.folder / "math", 10)
        done = place.merge()
        assert done.code == 0, done.err
        said = " ".join(done.err.split())
        assert "`math` has other tokens than `base` in 10 of 259 rows of the vocabulary: row 0 is " in said
        assert "row 0 is '*', not '!', row 1 is ')', not '\"', row 2 is" in said
        assert "row 3" not in said
        assert "`tokenizer_source: base`" in said
        plan = place.run(
            "plan", place.out, "--method", "ties", "--base", place.folder / "base", "--expert", place.folder / "math"
        )
        assert "in 10 of 259 rows" in " ".join((plan.out + plan.err).split())

    def test_more_than_half_at_other_ids_are_refused(self, place: Place) -> None:
        swap_tokens(place.folder / "code", 140)
        place.refused(place.merge(), 3, "in 140 of 259 rows", "hint: `tokenizer_source: base`")

    def test_the_same_tokens_in_another_spelling_are_no_difference(self, place: Place) -> None:
        file = place.folder / "math/tokenizer.json"
        file.write_text(json.dumps(json.loads(file.read_text()), indent=3, sort_keys=True))
        assert "other tokens" not in place.merge().err

    def test_a_tokenizer_that_cannot_be_read_is_told_and_rows_are_merged(self, place: Place) -> None:
        (place.folder / "math/tokenizer.json").write_text("{")
        done = place.merge()
        assert done.code == 0
        assert "the tokens of the models could not be compared" in done.err


def test_relax_matches_rows_by_text_where_only_the_order_differs(place: Place, measured: Path) -> None:
    relax = ("--with", "aim", "--omega", 0.4, "--calibration", measured)
    command = ("relax", place.folder / "math")
    assert place.run(*command, place.folder / "plain", "--base", place.folder / "base", *relax).code == 0
    swap_tokens(place.folder / "math", 20)
    permute_rows(place.folder / "math", 20)
    done = place.run(*command, place.folder / "matched", "--base", place.folder / "base", *relax)
    assert done.code == 0, done.err
    assert "matched by token text" in " ".join(done.err.split())
    plain, matched = tensors_in(place.folder / "plain"), tensors_in(place.folder / "matched")
    order = [*reversed(range(20)), *range(20, tiny.VOCAB)]
    used = 259  # rows of tokens; padding rows have no token in the base to be relaxed towards
    for name, tensor in plain.items():
        expected = tensor[order] if name in ROWS else tensor
        assert torch.equal(matched[name][:used], expected[:used]), name


def llama_of_sentencepiece(folder: Path, model_type: str) -> None:
    """Leave the model in `folder` with a sentencepiece model only, as Llama 2's first releases."""
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)
    made = io.BytesIO()
    lines = ["the quick brown fox jumps over the lazy dog", "a dog that sleeps in the sun", "merge models"] * 9
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=made, vocab_size=33, model_type=model_type, minloglevel=2
    )
    (folder / "tokenizer.model").write_bytes(made.getvalue())


def test_a_model_with_nothing_but_tokenizer_model_merges_and_is_calibrated(place: Place, texts: Path) -> None:
    for name in ("base", "math", "code"):
        llama_of_sentencepiece(place.folder / name, "bpe")
    llama_of_sentencepiece(place.folder / "code", "unigram")  # other tokens in other rows
    done = place.merge("--tokenizer-source", "base", "--omega", 0.4, "--calibration", texts)
    assert done.code == 0, done.err
    assert (place.out / "tokenizer.model").read_bytes() == (place.folder / "base/tokenizer.model").read_bytes()


def test_a_damaged_sentencepiece_model_is_told_as_that(place: Place, texts: Path) -> None:
    for name in ("base", "math", "code"):
        llama_of_sentencepiece(place.folder / name, "bpe")
        file = place.folder / name / "tokenizer.model"
        file.write_bytes(file.read_bytes()[:-100])
    for more in (("--tokenizer-source", "base"), ("--omega", 0.4, "--calibration", texts)):
        done = place.merge(*more)
        place.refused(done, 3, "`base`: its `tokenizer.model` is not a sentencepiece model")
        assert "tiktoken" not in done.err


@pytest.mark.parametrize("kind", ["tokenizer.json", "unigram", "vocab.json", "added_tokens"])
def test_the_vocabulary_is_the_one_that_transformers_reads(llama: Path, tmp_path: Path, run: Run, kind: str) -> None:
    folder = tmp_path / "model"
    tiny.perturbed(llama / "base", folder, scale=0.0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if kind == "unigram":
        data = json.loads((folder / "tokenizer.json").read_text())
        tokens = [[token, -1.0] for token in sorted(data["model"]["vocab"], key=data["model"]["vocab"].get)]
        data["model"] = {"type": "Unigram", "unk_id": 0, "vocab": tokens, "byte_fallback": False}
        (folder / "tokenizer.json").write_text(json.dumps(data))
    elif kind == "vocab.json":
        data = json.loads((folder / "tokenizer.json").read_text())
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
        (folder / "vocab.json").write_text(json.dumps(data["model"]["vocab"]))
        (folder / "merges.txt").write_text("#version: 0.2\n")
        (folder / "added_tokens.json").write_text(json.dumps({"<mine>": 256}))
    elif kind == "added_tokens":
        tokenizer.add_tokens(["<mine>", "<yours>"])
        tokenizer.save_pretrained(folder)
    with Reader() as reader:
        found = reader.vocabulary(Checkpoint.open(folder))
    expected = AutoTokenizer.from_pretrained(folder).get_vocab()
    assert found == {token: number for token, number in expected.items() if token in found}
    assert not {token for token in expected if token not in found} - {"<|endoftext|>"}  # a default of GPT-2's class
    assert len(found) >= 256
