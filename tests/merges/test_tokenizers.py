"""Merges of models with other vocabularies: every row against the plain rule, and tokenizers that work."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from adapters import factors, shapes_of, write
from conftest import Place
from merge_cases import digests, tensors_in
from transformers import AutoModelForCausalLM, AutoTokenizer
from vocabularies import ROWS, Rows, add_tokens, permute_rows, resize, swap_tokens, tokens_of, weighted

from lowmem_aim.errors import LowmemAimError
from lowmem_aim.events import Event, Notice
from lowmem_aim.jobs.merge import merge
from lowmem_aim.recipe.reader import read_recipe
from lowmem_aim.recipe.yaml_tree import parse
from lowmem_aim.system.options import Options

WEIGHTS = (0.6, 0.3, 0.5)
TEXT = "hello <|im_start|>user, a lazy dog<|im_end|> <s>"


@pytest.fixture
def models(place: Place) -> Path:
    """`base` of 260 tokens, 264 rows; `math` lacks one and has two more; `code` has two more in another order."""
    add_tokens(place.folder / "base", ["<|old|>"], padding=4, seed=3)
    add_tokens(place.folder / "math", ["<|im_start|>", "<|im_end|>"], seed=1)
    add_tokens(place.folder / "code", ["<|im_end|>", "<|old|>", "<|tool|>"], padding=7, seed=2)
    swap_tokens(place.folder / "code", 20)
    permute_rows(place.folder / "code", 20)
    return place.folder


def linear(models: Path, said: list[Event] | None = None, **more: Any) -> Path:
    """The output of a linear merge of all three, with further keys of the recipe; `said` gets the events."""
    names = ("base", "math", "code")
    listed = [{"model": str(models / n), "parameters": {"weight": w}} for n, w in zip(names, WEIGHTS, strict=True)]
    table = {"merge_method": "linear", "base_model": str(models / "base"), "models": listed, **more}
    return merged(models, table, said=said)


def merged(
    models: Path,
    table: Mapping[str, Any],
    out: str = "out",
    options: Options | None = None,
    said: list[Event] | None = None,
) -> Path:
    recipe = read_recipe(parse(yaml.safe_dump({**table, "dtype": "float32"}, sort_keys=False), "recipe.yml"))
    return merge(recipe, models / out, options or Options(), (said if said is not None else []).append)


def notices(said: list[Event]) -> list[str]:
    return [event.text for event in said if isinstance(event, Notice)]


def check_rows(models: Path, out: Path, special: Mapping[str, Any] | None = None) -> None:
    """Every token's row is the weighted sum of what the rule gives; `special`: (row, force) of tokens of the recipe."""
    for name in ROWS:
        rows, found = Rows([models / n for n in ("base", "math", "code")], name), tensors_in(out)[name]
        for token, place in tokens_of(out).items():
            instead, force = (special or {}).get(token, (None, False))
            row = None if instead is None else instead(rows)
            expected = weighted(rows.of(token, row, force=force), WEIGHTS)
            assert torch.allclose(found[place].double(), expected, rtol=0, atol=1e-6), (name, token)


def sizes(out: Path) -> tuple[int, int]:
    """(rows of the embedding, vocab_size in the config)."""
    return len(tensors_in(out)[ROWS[0]]), json.loads((out / "config.json").read_text())["vocab_size"]


def texts_of(folder: Path, text: str) -> list[str]:
    """The tokens that the folder's tokenizer cuts a text into."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return list(tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"]))


def decoded(folder: Path, text: str) -> str:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return str(tokenizer.decode(tokenizer(text)["input_ids"]))


class TestUnion:
    def test_every_row_is_what_the_rule_says_and_the_base_keeps_its_ids(self, models: Path) -> None:
        out = linear(models, tokenizer_source="union")
        check_rows(models, out)
        found, base = tokens_of(out), tokens_of(models / "base")
        assert found == {**base, "<|im_start|>": 260, "<|im_end|>": 261, "<|tool|>": 262}

    def test_padding_stays_and_new_tokens_take_its_rows(self, models: Path) -> None:
        out = linear(models, tokenizer_source="union")
        assert sizes(out) == (264, 264)
        own = tensors_in(models / "base")[ROWS[0]][263:]
        assert torch.allclose(tensors_in(out)[ROWS[0]][263:], own, atol=1e-6)

    def test_rows_beyond_the_padding_are_added(self, models: Path) -> None:
        resize(models / "base", 260, 260)
        assert sizes(linear(models, tokenizer_source="union")) == (263, 263)

    def test_it_encodes_and_decodes_as_the_model_that_has_the_tokens(self, models: Path) -> None:
        out = linear(models, tokenizer_source="union")
        for name, text in (("math", TEXT), ("base", "plain text, nothing new"), ("code", "<|tool|> and <|im_end|>")):
            assert texts_of(out, text) == texts_of(models / name, text)
            assert decoded(out, text) == decoded(models / name, text)

    def test_the_output_loads_and_runs(self, models: Path) -> None:
        out = linear(models, tokenizer_source="union")
        model, loading = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
        assert not loading["missing_keys"]
        assert not loading["unexpected_keys"]
        ids = AutoTokenizer.from_pretrained(out)(TEXT, return_tensors="pt").input_ids
        assert model(ids).logits.shape[-1] == 264

    def test_the_same_tokenizers_stay_files(self, place: Place) -> None:
        out = linear(place.folder, tokenizer_source="union")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            assert (out / name).read_bytes() == (place.folder / "base" / name).read_bytes()

    def test_without_a_base_tokens_take_the_mean_of_those_that_have_them(self, models: Path) -> None:
        names = ("code", "base", "math")
        listed = [{"model": str(models / n), "parameters": {"weight": 1.0}} for n in names]
        out = merged(models, {"merge_method": "linear", "models": listed, "tokenizer_source": "union"})
        rows, found = Rows([models / n for n in names], ROWS[0]), tensors_in(out)[ROWS[0]]
        mean = (rows.own(0, "<|im_end|>") + rows.own(2, "<|im_end|>")) / 2
        given = [rows.own(0, "<|im_end|>"), mean, rows.own(2, "<|im_end|>")]
        expected = weighted(given, (1.0, 1.0, 1.0))
        assert torch.allclose(found[tokens_of(out)["<|im_end|>"]].double(), expected, atol=1e-6)


class TestTokensOfTheRecipe:
    def test_rows_come_from_where_the_recipe_says(self, models: Path) -> None:
        math, code = str(models / "math"), {"model": {"path": str(models / "code")}}
        tokens = {
            "<|im_end|>": {"source": code},
            "<|tool|>": {"source": {"kind": "zero"}},
            "<|im_start|>": {"source": {"kind": "model_token", "model": code, "token": "</s>"}},
            "<s>": {"source": math, "force": True},
            "<new>": {"source": {"kind": "model_token", "model": math, "token_id": 5}},
            "!": {"source": {"kind": "zero"}, "force": 1.0},
        }
        out = linear(models, tokenizer={"source": "union", "tokens": tokens})
        assert tokens_of(out)["<new>"] == 263
        zero = torch.zeros(32, dtype=torch.float64)
        special = {
            "<|im_end|>": (lambda rows: rows.own(2, "<|im_end|>"), False),
            "<|tool|>": (lambda rows: zero, False),
            "<|im_start|>": (lambda rows: rows.own(2, "</s>"), False),
            "<s>": (lambda rows: rows.own(1, "<s>"), True),
            "<new>": (lambda rows: rows.tensors[1][5], False),
            "!": (lambda rows: zero, True),
        }
        check_rows(models, out, special)
        assert "<new>" in texts_of(out, "a <new> one")

    def test_a_new_token_of_the_base_tokenizer(self, models: Path) -> None:
        """mergekit 0.1.5 fails here: it takes the base to have the token."""
        tokens = {"<|im_end|>": {"source": str(models / "math")}}
        out = linear(models, tokenizer={"source": "base", "tokens": tokens})
        assert tokens_of(out) == {**tokens_of(models / "base"), "<|im_end|>": 260}
        check_rows(models, out, {"<|im_end|>": (lambda rows: rows.own(1, "<|im_end|>"), False)})

    def test_a_token_that_its_model_lacks_is_an_error_with_its_line(self, models: Path) -> None:
        tokens = {
            "<|tool|>": {"source": str(models / "math")},
            "<s>": {"source": {"kind": "model_token", "model": str(models / "math"), "token_id": 999}},
            "<|im_end|>": {"source": {"kind": "model_token", "model": str(models / "base"), "token": "<none>"}},
        }
        with pytest.raises(LowmemAimError) as caught:
            linear(models, tokenizer={"source": "union", "tokens": tokens})
        assert [problem.partition(": ")[2] for problem in caught.value.problems] == [
            "`<|tool|>`: `math` has no token `<|tool|>`",
            "`<s>`: `math` has 261 rows, and none with the id 999",
            "`<|im_end|>`: `base` has no token `<none>`",
        ]
        assert all(problem.startswith("recipe.yml:") for problem in caught.value.problems)
        assert not (models / "out").exists()


class TestPadding:
    def test_rows_up_to_the_multiple_are_each_models_mean(self, models: Path) -> None:
        out = linear(models, tokenizer={"source": "union", "pad_to_multiple_of": 16})
        assert sizes(out) == (272, 272)
        check_rows(models, out)
        rows, found = Rows([models / n for n in ("base", "math", "code")], ROWS[0]), tensors_in(out)[ROWS[0]]
        tokens = sorted(tokens_of(out), key=tokens_of(out).__getitem__)
        means = [torch.stack([rows.of(token)[model] for token in tokens]).mean(dim=0) for model in range(3)]
        assert torch.allclose(found[263:].double(), weighted(means, WEIGHTS).expand(9, -1), atol=1e-6)

    def test_padding_that_is_there_becomes_the_mean_too(self, models: Path) -> None:
        listed = [{"model": str(models / "base"), "parameters": {"weight": 1.0}}]
        tokenizer = {"source": "base", "pad_to_multiple_of": 8}
        out = merged(models, {"merge_method": "linear", "models": listed, "tokenizer": tokenizer})
        found = tensors_in(out)[ROWS[0]]
        assert torch.allclose(found[260:].double(), found[:260].double().mean(dim=0).expand(4, -1), atol=1e-6)

    def test_without_it_the_owners_padding_stays(self, models: Path) -> None:
        out = linear(models, tokenizer_source=str(models / "code"))
        assert sizes(out) == (269, 269)
        own = tensors_in(models / "code")[ROWS[0]][262:]
        assert torch.allclose(tensors_in(out)[ROWS[0]][262:], own, atol=1e-6)


class TestAnotherModelsTokenizer:
    def test_its_files_are_taken_over_and_its_ids_hold(self, models: Path) -> None:
        out = linear(models, tokenizer_source={"model": {"path": str(models / "code")}})
        check_rows(models, out)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            assert (out / name).read_bytes() == (models / "code" / name).read_bytes()
        assert texts_of(out, TEXT) == texts_of(models / "code", TEXT)

    def test_the_ids_of_special_tokens_follow(self, models: Path) -> None:
        tiny.edit_config(models / "code", eos_token_id=259, pad_token_id=None)
        (models / "base" / "generation_config.json").write_text(json.dumps({"eos_token_id": [257], "temperature": 0.5}))
        out = linear(models, tokenizer_source=str(models / "code"))
        config = json.loads((out / "config.json").read_text())
        assert (config["bos_token_id"], config["eos_token_id"], config.get("pad_token_id")) == (256, 259, None)
        generation = json.loads((out / "generation_config.json").read_text())
        assert generation["temperature"] == 0.5
        assert (
            generation["eos_token_id"]
            == json.loads((models / "code/generation_config.json").read_text())["eos_token_id"]
        )

    def test_it_may_be_one_that_is_not_merged_and_has_no_weights(self, models: Path) -> None:
        alone = models / "alone"
        alone.mkdir()
        tokenizer = AutoTokenizer.from_pretrained(models / "math")
        tokenizer.add_tokens(["<|extra|>"], special_tokens=True)
        tokenizer.save_pretrained(alone)
        said: list[Event] = []
        out = linear(models, said, tokenizer_source=str(alone))
        assert "rows of tokens that no model has are zeros: `<|extra|>`" in notices(said)
        assert tokens_of(out) == tokens_of(alone)
        assert sizes(out) == (262, 262)
        check_rows(models, out)
        assert torch.equal(tensors_in(out)[ROWS[0]][261], torch.zeros(32))
        text = (out / "mergekit_config.yml").read_text()
        assert yaml.safe_load(text)["tokenizer_source"] == "alone"
        assert "#   alone\n" in text.partition("merge_method")[0]  # whose path is to be filled in


class TestSameBytes:
    TABLE: Mapping[str, Any] = {"source": "union", "pad_to_multiple_of": 16}

    def test_for_slices_of_any_size(self, models: Path) -> None:
        table = self.recipe(models)
        first = digests(merged(models, table, "a"))
        assert digests(merged(models, table, "b", Options(slice_rows=1))) == first
        assert digests(merged(models, table, "c", Options(slice_rows=7, read="pread", threads=1))) == first

    def test_and_the_portable_recipe_says_all(self, models: Path) -> None:
        tokens = {"<s>": {"source": {"kind": "zero"}, "force": True}, "<x>": {"source": str(models / "math")}}
        tokens["<x>"] = {"source": {"kind": "model_token", "model": str(models / "math"), "token": "</s>"}}
        out = linear(models, tokenizer={**self.TABLE, "tokens": tokens}, chat_template="chatml")
        portable = yaml.safe_load((out / "mergekit_config.yml").read_text())
        assert portable["tokenizer"] == {
            "source": "union",
            "pad_to_multiple_of": 16,
            "tokens": {
                "<s>": {"source": {"kind": "zero"}, "force": True},
                "<x>": {"source": {"kind": "model_token", "model": "math", "token": "</s>"}},
            },
        }
        assert portable["chat_template"] == "chatml"

    def recipe(self, models: Path) -> dict[str, Any]:
        listed = [{"model": str(models / n), "parameters": {"weight": 0.4}} for n in ("math", "code")]
        base = str(models / "base")
        return {"merge_method": "ties", "base_model": base, "models": listed, "tokenizer": dict(self.TABLE)}


class TestChatTemplates:
    def template(self, out: Path) -> str:
        tokenizer = AutoTokenizer.from_pretrained(out)
        messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            (
                "chatml",
                "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes?<|im_end|>\n<|im_start|>assistant\n",
            ),
            ("alpaca", "<s>### Instruction:\nHi\n\n### Response:\nYes?</s>\n\n### Response:\n"),
            (
                "llama3",
                "<s><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>"
                "\n\nYes?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
            ),
            ("mistral", "<s>[INST] Hi [/INST] Yes?</s>"),
            ("exaone", "[|system|][|endofturn|]\n[|user|]Hi\n[|assistant|]Yes?[|endofturn|]\n[|assistant|]"),
            ("{% for m in messages %}{{ m['role'] }}:{{ m['content'] }};{% endfor %}", "user:Hi;assistant:Yes?;"),
        ],
    )
    def test_by_name_or_as_jinja(self, place: Place, name: str, expected: str) -> None:
        assert self.template(linear(place.folder, chat_template=name)) == expected

    def test_auto_takes_the_one_that_most_models_have(self, place: Place) -> None:
        (place.folder / "base/chat_template.jinja").write_text("{{ 'base' }}")
        (place.folder / "math/chat_template.jinja").write_text("{{ 'most' }}\n")
        config = place.folder / "code/tokenizer_config.json"
        several = [{"name": "tool", "template": "{{ 'tool' }}"}, {"name": "default", "template": "{{ 'most' }}"}]
        config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": several}))
        out = linear(place.folder, chat_template="auto")
        assert (out / "chat_template.jinja").read_text() == "{{ 'most' }}"
        assert self.template(out) == "most"

    def test_it_stands_in_the_place_of_all_others(self, place: Place) -> None:
        base = place.folder / "base"
        (base / "additional_chat_templates").mkdir()
        (base / "additional_chat_templates/tool.jinja").write_text("{{ 'tool' }}")
        config = base / "tokenizer_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": "{{ 'old' }}"}))
        out = linear(place.folder, chat_template="chatml")
        assert not (out / "additional_chat_templates").exists()
        assert "chat_template" not in json.loads((out / "tokenizer_config.json").read_text())

    def test_auto_without_any_is_told(self, place: Place) -> None:
        recipe = place.folder / "r.yml"
        listed = [{"model": "math", "parameters": {"weight": 1}}]
        recipe.write_text(yaml.safe_dump({"merge_method": "linear", "models": listed, "chat_template": "auto"}))
        done = place.run("merge", recipe, place.out)
        assert done.code == 0
        assert "no model has a chat template" in done.err


def test_slices_take_rows_from_models_outside_the_slice(models: Path) -> None:
    """The embedding is of the first slice's model; a token that it lacks still has its only owner's row."""
    source = [{"sources": [{"model": str(models / name), "layer_range": [0, 2]}]} for name in ("math", "code", "base")]
    out = merged(models, {"merge_method": "passthrough", "slices": source, "tokenizer_source": "union"})
    first, last, ids = tensors_in(models / "math"), tensors_in(models / "base"), tokens_of(out)
    code = tensors_in(models / "code")[ROWS[0]][tokens_of(models / "code")["<|tool|>"]]
    found = tensors_in(out)
    assert torch.equal(found[ROWS[0]][ids["<|tool|>"]], code)
    assert torch.equal(found[ROWS[0]][:261], first[ROWS[0]][:261])
    assert torch.equal(found[ROWS[1]][:259], last[ROWS[1]][:259])
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert loaded.config.num_hidden_layers == 6
    assert loaded.config.vocab_size == len(found[ROWS[0]]) == 263


def test_a_base_gives_its_own_row_and_not_that_of_an_adapter_on_it(models: Path) -> None:
    head = torch.randn(264, 32, generator=torch.Generator().manual_seed(5))
    write(models / "adapter", factors(shapes_of(models / "base", "q_proj")) | {"lm_head.weight": head})
    names = ("base", f"base+{models / 'adapter'}", "math")
    listed = [{"model": str(models / n), "parameters": {"weight": w}} for n, w in zip(names, WEIGHTS, strict=True)]
    table = {"merge_method": "linear", "base_model": str(models / "base"), "models": listed}
    found = tensors_in(merged(models, table | {"tokenizer_source": "union"}))[ROWS[1]]
    place = tokens_of(models / "base")["<|old|>"]
    own = tensors_in(models / "base")[ROWS[1]][place]
    expected = weighted([own.double(), head[place].double(), own.double()], WEIGHTS)
    assert torch.allclose(found[place].double(), expected, atol=1e-6)


def test_new_vocabulary_is_not_relaxed(models: Path, texts: Path) -> None:
    listed = [{"model": str(models / n), "parameters": {"weight": 0.5}} for n in ("math", "code")]
    table = {"merge_method": "task_arithmetic", "base_model": str(models / "base"), "models": listed}
    table |= {"tokenizer_source": "union"}
    plain = tensors_in(merged(models, table, "plain"))[ROWS[1]]
    aim = {"aim": {"calibration": str(texts), "omega": 0.2}}
    relaxed = tensors_in(merged(models, table | aim, "relaxed"))[ROWS[1]]
    assert torch.equal(relaxed[260:263], plain[260:263])
    assert not torch.equal(relaxed[:259], plain[:259])


def test_acm_compares_the_same_tokens_whatever_ids_they_have(models: Path, texts: Path) -> None:
    listed = [{"model": str(models / n), "parameters": {"weight": 0.5}} for n in ("math", "code")]
    table = {"merge_method": "task_arithmetic", "base_model": str(models / "base"), "models": listed}
    found = []
    for name, source in (("a", "base"), ("b", "union"), ("c", str(models / "code"))):
        out = merged(models, table | {"tokenizer_source": source, "acm": {"calibration": str(texts)}}, name)
        found.append(json.loads((out / "lowmem_aim.json").read_text())["acm"])
    assert found[0]["groups"].keys() > {"0", "1", "2"}
    assert found[1] == found[0]
    assert found[2] == found[0]


def test_a_killed_merge_resumes_with_the_same_bytes(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lowmem_aim.merging import slices

    table = {
        "merge_method": "linear",
        "models": [{"model": str(models / n), "parameters": {"weight": 0.4}} for n in ("base", "math", "code")],
        "tokenizer": {"source": "union", "pad_to_multiple_of": 32},
    }
    whole = digests(merged(models, table, "whole"))
    with monkeypatch.context() as patch:
        patch.setattr(slices, "mean_row", _killed)
        with pytest.raises(KeyboardInterrupt):
            merged(models, table)
    assert digests(merged(models, table)) == whole


def _killed(*_: object) -> None:
    raise KeyboardInterrupt
