"""The keys `tokenizer_source`, `tokenizer` and `chat_template`: the output's tokens, and whose rows they take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lowmem_aim.errors import did_you_mean, printable
from lowmem_aim.recipe.recipe import Tokenizer, TokenRow
from lowmem_aim.recipe.references import same_reference
from lowmem_aim.recipe.values import Values
from lowmem_aim.recipe.words import BASE, CHAT_TEMPLATES, SOURCES, UNION
from lowmem_aim.recipe.yaml_tree import Node

TOKENIZER_KEYS = ("source", "tokens", "pad_to_multiple_of")
_TOKEN_KEYS = ("source", "force")
_KINDS = {"zero": ("kind",), "model_token": ("kind", "model", "token", "token_id")}
_TOKENS_HINT = "write `tokens: {<token>: {source: MODEL}}`, or one token per line below it"
_SOURCE_HINT = (
    "write `source: MODEL`, `source: {kind: zero}`, or `source: {kind: model_token, model: MODEL, token: TOKEN}`"
)
_FROM_HINT = "write `union`, `base`, or a model that has a tokenizer"
_TEMPLATE_HINT = f"write `auto`, one of {', '.join(CHAT_TEMPLATES)}, or a Jinja template"
LARGEST_MULTIPLE = 1 << 20  # rows; tensor cores ask for some hundreds at most
SHORTEST_TEMPLATE = 20  # characters


def tokenizer_of(read: Values, root: Node, models: Sequence[str]) -> Tokenizer | None:
    """The output's tokenizer as the recipe in `root` asks for it; None if it asks for none.

    `models` are the references of the recipe's models. Problems are collected in `read`.
    """
    short, table = root.get("tokenizer_source"), root.get("tokenizer")
    if short is not None and table is not None:
        text = "`tokenizer_source` and `tokenizer` cannot both be given"
        read.problem(table, text, "write the source as `source` in the table `tokenizer`, and leave out the other key")
    if table is not None:
        return _table(read, table, models)
    return None if short is None else Tokenizer(_source(read, short, "tokenizer_source", models), where=short.where)


def chat_template_of(read: Values, root: Node) -> str | None:
    """The recipe's `chat_template`: `auto`, a name, or a template's text; None if it has none, or after a problem."""
    node = root.get("chat_template")
    if node is None:
        return None
    if not isinstance(node.value, str) or not node.value.strip():
        read.problem(node, "`chat_template` must be text", _TEMPLATE_HINT)
        return None
    text: str = node.value
    word = text.strip()
    if word in ("auto", *CHAT_TEMPLATES):
        return word
    if "{" not in word:
        near = did_you_mean(word, ("auto", *CHAT_TEMPLATES))
        read.problem(node, f"`chat_template`: `{printable(word)}` is not the name of a template{near}", _TEMPLATE_HINT)
    elif wrong := _template_problem(text):
        read.problem(node, f"`chat_template` is not a Jinja template: {wrong}", _TEMPLATE_HINT)
    return text


def _template_problem(text: str) -> str:
    """The reason why the text of a template cannot be parsed; empty if it can."""
    if len(text) < SHORTEST_TEMPLATE:
        return f"it has fewer than {SHORTEST_TEMPLATE} characters"
    from jinja2 import Environment, TemplateSyntaxError, nodes  # torch brings it
    from jinja2.ext import Extension
    from jinja2.parser import Parser

    class Generation(Extension):
        """transformers' own tag, `{% generation %} ... {% endgeneration %}`."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    try:
        Environment(extensions=[Generation, "jinja2.ext.loopcontrols"]).parse(text)
    except TemplateSyntaxError as error:
        return f"line {error.lineno}: {printable(error.message or '')}"
    except RecursionError:
        return "it is nested too deep"
    return ""


def _source(read: Values, node: Node | None, what: str, models: Sequence[str]) -> str:
    """`union`, `base`, or a model: one of the recipe's as it is written there, or another that has a tokenizer."""
    if node is None:
        return UNION
    if isinstance(node.value, str) and node.value.strip() in SOURCES:
        return node.value.strip()
    model = read.model(node, what)
    found = None if model is None else _as_listed(model, models) or model
    if found in read.sought and (near := did_you_mean(found, SOURCES)):
        read.problem(node, f"`{what}`: there is no model `{printable(found)}`{near}", _FROM_HINT)
        return BASE
    return found or BASE


def _as_listed(model: str, models: Sequence[str]) -> str | None:
    """The reference by which the recipe names the same model."""
    return next((listed for listed in models if same_reference(listed, model)), None)


def _table(read: Values, table: Node, models: Sequence[str]) -> Tokenizer | None:
    if not isinstance(table.value, dict):
        read.problem(table, "`tokenizer` must be a table", "write `tokenizer: {source: union}`, or `tokenizer_source`")
        return None
    read.check_keys(table, TOKENIZER_KEYS, {})
    source = _source(read, table.get("source"), "tokenizer.source", models)
    multiple = _multiple(read, table.get("pad_to_multiple_of"))
    return Tokenizer(source, _tokens(read, table.get("tokens"), models), multiple, table.where)


def _multiple(read: Values, node: Node | None) -> int | None:
    """Rows that the vocabulary is filled up to a multiple of; None, as 0 is in mergekit, if it is left as it is."""
    if node is None:
        return None
    value: Any = node.value
    if isinstance(value, str) and value.strip().isdigit():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= LARGEST_MULTIPLE:
        text = f"`tokenizer.pad_to_multiple_of` must be a whole number from 1 to {LARGEST_MULTIPLE}"
        read.problem(node, f"{text}, not `{printable(str(node.value))}`", "64 suits most devices")
        return None
    return value or None


def _tokens(read: Values, node: Node | None, models: Sequence[str]) -> dict[str, TokenRow]:
    if node is None:
        return {}
    if not isinstance(node.value, dict):
        read.problem(node, "`tokenizer.tokens` must be a table", _TOKENS_HINT)
        return {}
    rows = {token: _token(read, token, entry, models) for token, entry in node.value.items() if entry.value is not None}
    return {token: row for token, row in rows.items() if row}


def _token(read: Values, token: str, node: Node, models: Sequence[str]) -> TokenRow | None:
    what = f"`{printable(token)}`"
    if not isinstance(node.value, dict):
        read.problem(node, f"the token {what} must have a table", _TOKENS_HINT)
        return None
    read.check_keys(node, _TOKEN_KEYS, {})
    force = _flag(read, node.get("force"), f"`force` of the token {what}")
    source = node.get("source")
    if source is None:
        if force:
            read.problem(node, f"the token {what} has `force`, but no `source`", _SOURCE_HINT)
        return TokenRow(force=force, where=node.where)
    if isinstance(source.value, dict) and source.get("kind") is not None:
        return _of_kind(read, what, source, force, models)
    return TokenRow("model", _listed(read, source, models), force=force, where=source.where)


def _of_kind(read: Values, what: str, source: Node, force: bool, models: Sequence[str]) -> TokenRow | None:
    """A token's source that is a table with a `kind`."""
    kind = read.text(source.get("kind"), "kind")
    if kind not in _KINDS:
        if kind is not None:
            near = did_you_mean(kind, _KINDS)
            read.problem(source, f"the token {what}: there is no kind `{printable(kind)}`{near}", _SOURCE_HINT)
        return None
    meant = read.check_keys(source, _KINDS[kind], {})
    if kind == "zero":
        return TokenRow("zero", force=force, where=source.where)
    given = [key for key in ("token", "token_id") if source.get(key) is not None or key in meant]
    if len(given) != 1:
        read.problem(source, f"the token {what}: give either `token` or `token_id`", _SOURCE_HINT)
    if source.get("model") is None and "model" not in meant:
        read.problem(source, f"the token {what}: `model` is missing", _SOURCE_HINT)
    model = _listed(read, source.get("model"), models)
    text, number = _other_token(read, what, source.get("token")), _token_id(read, what, source.get("token_id"))
    return TokenRow("model_token", model, text, number, force, source.where)


def _listed(read: Values, node: Node | None, models: Sequence[str]) -> str:
    """The recipe's model that a node names; empty after a problem."""
    model = read.model(node, "source")
    if node is None or model is None:
        return ""
    if found := _as_listed(model, models):
        return found
    near = did_you_mean(model, models)
    text = f"`{printable(model)}` is not one of the models that are merged{near}"
    read.problem(node, text, "a token takes its row from one of the recipe's models, or of its base")
    return ""


def _flag(read: Values, node: Node | None, what: str) -> bool:
    value = None if node is None else node.value
    if value not in (None, True, False):  # 1.0 and 0 are booleans here, as in mergekit
        assert node is not None
        read.problem(node, f"{what} must be true or false, not `{printable(str(value))}`")
    return value is not None and bool(value)


def _other_token(read: Values, what: str, node: Node | None) -> str | None:
    if node is not None and not (isinstance(node.value, str) and node.value):
        read.problem(node, f"the token {what}: `token` must be text", 'quote it: `token: "<s>"`')
        return None
    return None if node is None else node.value


def _token_id(read: Values, what: str, node: Node | None) -> int | None:
    if node is not None and (isinstance(node.value, bool) or not isinstance(node.value, int) or node.value < 0):
        read.problem(node, f"the token {what}: `token_id` must be a whole number from 0 on", _SOURCE_HINT)
        return None
    return None if node is None else node.value
