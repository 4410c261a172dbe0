"""One tokenizer of several: which ids tokens get, and that texts are cut as each of the models cuts them."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from lowmem_aim.models.tokenizer_union import tokens_of, united

TEXTS = ["the quick brown fox jumps over the lazy dog", "a dog that sleeps in the sun", "merge models and merge again"]


def trained(kind: str, texts: list[str], size: int, added: tuple[str, ...] = ()) -> dict[str, Any]:
    """The tokenizer.json of a small tokenizer."""
    model, trainer = {
        "BPE": (models.BPE(), trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet(), show_progress=False)),
        "Unigram": (models.Unigram(), trainers.UnigramTrainer(vocab_size=size, show_progress=False)),
        "WordPiece": (
            models.WordPiece(unk_token="[UNK]"),
            trainers.WordPieceTrainer(vocab_size=size, special_tokens=["[UNK]"], show_progress=False),
        ),
    }[kind]
    made = Tokenizer(model)
    made.pre_tokenizer = (
        pre_tokenizers.ByteLevel(add_prefix_space=False) if kind == "BPE" else pre_tokenizers.Whitespace()
    )
    made.decoder = decoders.ByteLevel() if kind == "BPE" else decoders.WordPiece()
    made.train_from_iterator(texts, trainer)
    made.add_special_tokens([AddedToken(token, special=True) for token in added])
    return dict(json.loads(made.to_str()))


def alphabet() -> list[str]:
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def cut(table: dict[str, Any], text: str) -> list[str]:
    return list(Tokenizer.from_str(json.dumps(table)).encode(text).tokens)


def decoded(table: dict[str, Any], text: str) -> str:
    loaded = Tokenizer.from_str(json.dumps(table))
    return str(loaded.decode(loaded.encode(text).ids, skip_special_tokens=False))


def extended(kind: str, base: dict[str, Any], tokens: list[tuple[str, str]]) -> dict[str, Any]:
    """The base's tokenizer with ordinary tokens that are each two others put together."""
    table = copy.deepcopy(base)
    vocabulary = table["model"]["vocab"]
    for first, second in tokens:
        if kind == "Unigram":
            vocabulary.append([first + second, -2.0])
        else:
            vocabulary[first + second.removeprefix("##")] = len(vocabulary)
            if kind == "BPE":
                table["model"]["merges"].append([first, second])
    return table


NEW = {"BPE": [("Ġthe", "Ġ"), ("z", "z")], "Unigram": [("do", "gma"), ("zz", "z")], "WordPiece": [("z", "##z")]}


@pytest.mark.parametrize("kind", ["BPE", "Unigram", "WordPiece"])
def test_a_vocabulary_that_was_extended_cuts_texts_as_the_extended_model(kind: str) -> None:
    base = trained(kind, TEXTS, 300 if kind == "BPE" else 60)
    other = extended(kind, base, NEW[kind])
    found = united([copy.deepcopy(base), other], [None, None], [])
    assert tokens_of(found) == tokens_of(other)
    for text in (*TEXTS, "dogma zz zzz the  the"):
        assert cut(found, text) == cut(other, text)


@pytest.mark.parametrize("kind", ["BPE", "Unigram", "WordPiece"])
def test_new_ordinary_tokens_follow_the_bases_added_ones(kind: str) -> None:
    base = trained(kind, TEXTS, 300 if kind == "BPE" else 60, ("<mine>", "<ours>"))
    other = extended(kind, trained(kind, TEXTS, 300 if kind == "BPE" else 60), NEW[kind])
    other["added_tokens"] += [{**base["added_tokens"][-1], "content": "<theirs>", "id": len(tokens_of(other))}]
    found = united([copy.deepcopy(base), other], [None, None], ["<more>"])
    ids, before = tokens_of(found), tokens_of(base)
    assert {token: ids[token] for token in before} == before
    new = [a + b.removeprefix("##") for a, b in NEW[kind]]
    assert [ids[token] for token in (*new, "<theirs>", "<more>")] == list(
        range(len(before), len(before) + len(new) + 2)
    )
    loaded = Tokenizer.from_str(json.dumps(found))
    assert loaded.get_vocab(with_added_tokens=True) == ids
    assert json.loads(loaded.to_str())["model"]["vocab"] == found["model"]["vocab"]
    assert cut(found, "<mine>zz<theirs>") == ["<mine>", *cut(other, "zz"), "<theirs>"]


def test_texts_of_the_base_are_cut_and_decoded_as_before() -> None:
    base, other = trained("BPE", TEXTS, 320), trained("BPE", ["zyx wvu zyx"] * 3, 262)
    found = united([copy.deepcopy(base), other], [None, None], [])
    assert len(tokens_of(found)) > len(tokens_of(base))
    for text in TEXTS:
        assert cut(found, text) == cut(base, text)
        assert decoded(found, text) == text
    assert cut(found, "zyx") == cut(other, "zyx")


def test_tokens_of_another_kind_of_tokenizer_get_rows_and_cut_no_text() -> None:
    base, other = trained("BPE", TEXTS, 300), trained("Unigram", ["inging singing"], 12)
    found = united([copy.deepcopy(base), other], [None, None], [])
    assert tokens_of(other).keys() <= tokens_of(found).keys()
    assert cut(found, "singing the song") == cut(base, "singing the song")


def test_tokens_beyond_the_rows_are_left_out_with_their_merges() -> None:
    base = trained("BPE", TEXTS, 300, ("<far>",))
    found = united([copy.deepcopy(base)], [290], [])
    assert max(tokens_of(found).values()) == 289
    assert Tokenizer.from_str(json.dumps(found)).get_vocab() == tokens_of(found)
    assert decoded(found, TEXTS[0]) == TEXTS[0]


def test_an_ordinary_token_that_is_an_added_one_elsewhere_becomes_one_with_its_id() -> None:
    base = trained("BPE", TEXTS, 300)
    other = copy.deepcopy(base)
    number = base["model"]["vocab"]["!"]
    entry = {"id": number, "content": "!", "single_word": False, "lstrip": False, "rstrip": False}
    other["added_tokens"].append({**entry, "normalized": False, "special": True})
    found = united([copy.deepcopy(base), other], [None, None], [])
    assert tokens_of(found) == tokens_of(base)
    assert found["added_tokens"] == other["added_tokens"]


def test_old_merges_stay_texts() -> None:
    base = trained("BPE", TEXTS, 300)
    other = extended("BPE", base, NEW["BPE"])
    base["model"]["merges"] = [" ".join(merge) for merge in base["model"]["merges"]]
    found = united([base, other], [None, None], [])
    assert "z z" in found["model"]["merges"]
    assert cut(found, "zz") == ["zz"]


def test_gaps_in_a_unigram_model_are_an_error() -> None:
    base = trained("Unigram", TEXTS, 60)
    base["added_tokens"].append({"id": 99, "content": "<far>", "single_word": False, "lstrip": False, "rstrip": False})
    with pytest.raises(ValueError, match="gaps"):
        united([base, extended("Unigram", trained("Unigram", TEXTS, 60), NEW["Unigram"])], [None, None], [])
