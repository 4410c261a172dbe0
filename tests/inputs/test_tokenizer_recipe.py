"""The keys `tokenizer_source`, `tokenizer` and `chat_template`: what is read, and what is wrong in them."""

from __future__ import annotations

import pytest

from lowmem_aim.errors import RecipeError
from lowmem_aim.recipe.from_flags import applied
from lowmem_aim.recipe.reader import read_recipe
from lowmem_aim.recipe.recipe import Recipe, Tokenizer, TokenRow
from lowmem_aim.recipe.yaml_tree import parse

START = """\
merge_method: linear
base_model: base
models:
  - {model: math, parameters: {weight: 1}}
  - {model: code, parameters: {weight: 1}}
"""


def read(text: str) -> Recipe:
    return read_recipe(parse(START + text, "recipe.yml"))


def problems(text: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        read(text)
    assert all(caught.value.hints)
    return list(caught.value.problems)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", None),
        ("tokenizer: ~\ntokenizer_source:\n", None),
        ("tokenizer_source: union\n", Tokenizer("union")),
        ("tokenizer_source: base\n", Tokenizer("base")),
        ("tokenizer_source: math\n", Tokenizer("math")),
        ("tokenizer_source: ./math/\n", Tokenizer("math")),  # as the list of models names it
        ("tokenizer_source: {model: {path: owner/name, revision: v1}}\n", Tokenizer("owner/name@v1")),
        ("tokenizer_source: {path: math}\n", Tokenizer("math")),
        ("tokenizer: {}\n", Tokenizer("union")),
        ("tokenizer: {source: base, tokens: ~, pad_to_multiple_of: 64}\n", Tokenizer("base", {}, 64)),
        ("tokenizer: {pad_to_multiple_of: 0}\n", Tokenizer("union")),
        ("tokenizer: {pad_to_multiple_of: '8'}\n", Tokenizer("union", {}, 8)),
    ],
)
def test_sources(text: str, expected: Tokenizer | None) -> None:
    assert read(text).tokenizer == expected


def test_tokens() -> None:
    found = read(
        """\
tokenizer:
  tokens:
    <a>: {source: math}
    <b>: {source: {model: {path: code}}, force: true}
    <c>: {source: {kind: zero}, force: 1.0}
    <d>: {source: {kind: model_token, model: base, token: "<s>"}}
    <e>: {source: {kind: model_token, model: {model: {path: base}}, token_id: 0}}
    <f>: {}
"""
    ).tokenizer
    assert found is not None
    assert found.tokens == {
        "<a>": TokenRow("model", "math"),
        "<b>": TokenRow("model", "code", force=True),
        "<c>": TokenRow("zero", force=True),
        "<d>": TokenRow("model_token", "base", token="<s>"),
        "<e>": TokenRow("model_token", "base", token_id=0),
        "<f>": TokenRow(),
    }


def test_all_problems_come_at_once_with_their_lines() -> None:
    assert problems(
        """\
chat_template: chatlm
tokenizer_source: base
tokenizer:
  sorce: union
  pad_to_multiple_of: -8
  tokens:
    <a>: {source: mth}
    <b>: {force: true}
    <c>: {source: {kind: zeroo}}
    <d>: {source: {kind: model_token, model: math}}
    <e>: {source: {kind: model_token, token: a, token_id: 1}}
    <f>: {source: {kind: model_token, model: math, token_id: -1}}
    <g>: 3
    <h>: {source: math, force: maybe}
"""
    ) == [
        "recipe.yml:6:1: `chat_template`: `chatlm` is not the name of a template; did you mean `chatml`?",
        "recipe.yml:8:1: `tokenizer_source` and `tokenizer` cannot both be given",
        "recipe.yml:9:3: unknown key `sorce`; did you mean `source`?",
        "recipe.yml:10:3: `tokenizer.pad_to_multiple_of` must be a whole number from 1 to 1048576, not `-8`",
        "recipe.yml:12:11: `mth` is not one of the models that are merged; did you mean `math`?",
        "recipe.yml:13:5: the token `<b>` has `force`, but no `source`",
        "recipe.yml:14:11: the token `<c>`: there is no kind `zeroo`; did you mean `zero`?",
        "recipe.yml:15:11: the token `<d>`: give either `token` or `token_id`",
        "recipe.yml:16:11: the token `<e>`: give either `token` or `token_id`",
        "recipe.yml:16:11: the token `<e>`: `model` is missing",
        "recipe.yml:17:52: the token `<f>`: `token_id` must be a whole number from 0 on",
        "recipe.yml:18:5: the token `<g>` must have a table",
        "recipe.yml:19:25: `force` of the token `<h>` must be true or false, not `maybe`",
    ]


def test_the_flag_names_another_source_for_the_same_tokens() -> None:
    tree = parse(START + "tokenizer: {source: union, pad_to_multiple_of: 8}\n", "recipe.yml")
    assert read_recipe(applied(tree, {"tokenizer_source": "base"})).tokenizer == Tokenizer("base", {}, 8)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("3", "`chat_template` must be text"),
        ("'{{ x'", "`chat_template` is not a Jinja template: it has fewer than 20 characters"),
        (
            "'{% for m in messages %}{{ m }}'",
            "`chat_template` is not a Jinja template: line 1: Unexpected end of template",
        ),
        ("'" + "{% if a %}" * 3000 + "'", "`chat_template` is not a Jinja template: "),
    ],
)
def test_wrong_templates(template: str, said: str) -> None:
    (problem,) = problems(f"chat_template: {template}\n")
    assert problem.startswith(f"recipe.yml:6:1: {said}")


def test_templates_are_read_as_they_are() -> None:
    text = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% break %}{% endfor %}"
    assert read(f"chat_template: '{text}'\n").chat_template == text
    assert read("chat_template: llama3\n").chat_template == "llama3"
    assert read("chat_template: ' auto '\n").chat_template == "auto"
