"""The program of `Reader`'s child process: it answers questions about the small files of models, one JSON line each.

Everything large is imported by the question that needs it, before the limit is set: the limit is above the imports.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowmem_aim.errors import LowmemAimError, ModelError, printable
from lowmem_aim.system.files import name_temporary_folder
from lowmem_aim.system.process_limits import (
    end_after,
    is_limited,
    lift_limit,
    limit_memory,
    peak_bytes,
    resident_bytes,
)

if TYPE_CHECKING:
    from lowmem_aim.models.meta_model import MetaModel

TOKENIZER_HINT = "are its files complete, and do they belong to this model?"
OTHER_SOURCE = "`tokenizer_source: base`, or one model, takes that model's tokenizer as it is"
_loaded: dict[str, Any] = {}  # the tokenizer that `encode` has loaded last, by its files

Question = Mapping[str, Any]


def settings(question: Question) -> Any:
    """The config as transformers' class reads it, with its defaults."""
    from lowmem_aim.models.transformers_config import config_of_transformers

    return config_of_transformers(question["config"], question["label"]).to_dict()


def roles(question: Question) -> Any:
    """The roles of a checkpoint's tensors, given their names, dtypes and shapes."""
    return _meta_model(question).roles().table()


def places(question: Question) -> Any:
    """The part of the model that continues text, and where each tensor of a checkpoint lies in transformers' model."""
    meta_model = _meta_model(question)
    found = {name: [place.parameter, place.start, place.rows] for name, place in meta_model.weights.places().items()}
    return {"decoder": meta_model.decoder, "tensors": found}


def renamed(question: Question) -> dict[str, str]:
    """transformers' name of a parameter -> the checkpoint's, where these differ; the question is as for `roles`."""
    return dict(_meta_model(question).weights.renamed())


def _meta_model(question: Question) -> MetaModel:
    from lowmem_aim.models.checkpoint import Checkpoint
    from lowmem_aim.models.headers import TensorInfo
    from lowmem_aim.models.meta_model import load_meta_model
    from lowmem_aim.system.dtypes import BY_NAME

    nowhere = Path()
    tensors = {
        name: TensorInfo(name, BY_NAME[dtype], tuple(shape), nowhere, 0, 0)
        for name, dtype, shape in question["tensors"]
    }
    return load_meta_model(Checkpoint(nowhere, question["label"], question["config"], tensors))


def vocabulary(question: Question) -> dict[str, int]:
    """Token text -> id, from the tokenizer's files: as JSON where they are, else as transformers loads them."""
    from lowmem_aim.models.vocabulary_files import tokens_in

    try:
        found = tokens_in(Path(question["folder"]))
    except ValueError as error:
        what = f"the tokenizer of `{printable(question['label'])}` has no vocabulary that can be read"
        raise ModelError(f"{what}: {printable(str(error))}", TOKENIZER_HINT) from error
    return dict(_tokenizer(question).get_vocab()) if found is None else found


def united(question: Question) -> dict[str, Any]:
    """One tokenizer of several: its tokenizer.json, its tokens, and whether the first one's files would not do.

    Asked for: `folders` and `labels` of the models, the `rows` of their embeddings, and `more` tokens.
    """
    from lowmem_aim.models.tokenizer_union import tokens_of, united

    labels, folders = question["labels"], question["folders"]
    tables = [_table({"folder": folder, "label": label}) for folder, label in zip(folders, labels, strict=True)]
    before, added = tokens_of(tables[0]), [*tables[0]["added_tokens"]]
    try:
        table = united(tables, question["rows"], question["more"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"the tokenizer of `{printable(labels[0])}` cannot be united with others"
        raise ModelError(f"{what}: {printable(str(error))}", OTHER_SOURCE) from error
    tokens = tokens_of(table)
    entered = {entry["content"] for entry in table["added_tokens"]}
    changed = {token for token in before.keys() ^ tokens.keys() if token not in entered}
    return {
        "table": json.dumps(table, ensure_ascii=False, separators=(",", ":")),
        "tokens": tokens,
        "added": table["added_tokens"],
        "changed": tokens != before or table["added_tokens"] != added,
        "ordinary": bool(changed),
    }


def _table(question: Question) -> dict[str, Any]:
    """A tokenizer as tokenizer.json has it: the file, or what transformers makes of the model's other files."""
    from lowmem_aim.models.tokenizer_union import tokens_of, with_further_tokens
    from lowmem_aim.models.vocabulary_files import further_tokens

    folder, label = Path(question["folder"]), printable(question["label"])
    try:
        if (folder / "tokenizer.json").is_file():
            text = (folder / "tokenizer.json").read_text(encoding="utf-8")
        else:
            text = _converted(question)
        table = with_further_tokens(json.loads(text), further_tokens(folder))
        tokens_of(table)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        what = f"the tokenizer of `{label}` has no vocabulary that can be read: {printable(str(error))}"
        raise ModelError(what, TOKENIZER_HINT) from error
    return table


def _converted(question: Question) -> str:
    import_transformers()  # above the limit, but only where a model has no tokenizer.json
    inner = getattr(_tokenizer(question), "backend_tokenizer", None)
    if inner is None:
        what = f"the tokenizer of `{printable(question['label'])}` has no tokenizer.json, and cannot be made into one"
        raise ModelError(what, OTHER_SOURCE)
    return str(inner.to_str())


def encode(question: Question) -> list[list[int]]:
    """The token ids of each text, by the tokenizer in a folder."""
    name = json.dumps(question["files"])  # with the files' digests
    if name not in _loaded:
        _loaded.clear()
        _loaded[name] = _tokenizer(question)
    with _tokenizer_errors(f"the tokenizer of `{printable(question['label'])}` fails at the calibration text"):
        return [list(_loaded[name](text, verbose=False)["input_ids"]) for text in question["texts"]]


def _tokenizer(question: Question) -> Any:
    from transformers import AutoTokenizer

    if wrong := _no_sentencepiece(Path(question["folder"])):
        raise ModelError(
            f"`{printable(question['label'])}`: its `{wrong}` is not a sentencepiece model", TOKENIZER_HINT
        )
    with _tokenizer_errors(f"`{printable(question['label'])}` has no tokenizer that transformers can load"):
        return AutoTokenizer.from_pretrained(question["folder"], trust_remote_code=False, local_files_only=True)


def _no_sentencepiece(folder: Path) -> str:
    """The name of a damaged sentencepiece model that is all a tokenizer has, or an empty string.

    transformers would take it for another kind of file, and advise to install a library for that.
    """
    if (folder / "tokenizer.json").is_file():
        return ""
    from sentencepiece import SentencePieceProcessor

    for file in sorted(folder.glob("*.model")):
        content = file.read_bytes()
        if content.isascii():  # lines of base64 and ranks: tiktoken's
            continue
        try:
            SentencePieceProcessor(model_proto=content)
        except Exception:  # RuntimeError, of its parser
            return file.name
    return ""


@contextlib.contextmanager
def _tokenizer_errors(what: str) -> Iterator[None]:
    """Turn whatever a tokenizer raises in the block into a ModelError.

    Its parsers raise anything, and its compiled parts a BaseException.
    """
    try:
        yield
    except MemoryError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ModelError(f"{what}: {printable(str(error))}", TOKENIZER_HINT) from error


def import_transformers() -> None:
    """Import what most questions need: seconds of work, and memory that is not the model's."""
    import transformers.models.auto.tokenization_auto  # noqa: F401


def import_models() -> None:
    """Import what building a model needs, its losses too: they import scipy, whose BLAS hangs under a tight limit."""
    import transformers.modeling_utils  # noqa: F401

    import_transformers()


# What a question imports first, and the function that answers it.
ANSWERS: dict[str, tuple[Callable[[], None], Callable[[Question], Any]]] = {
    "settings": (import_transformers, settings),
    "roles": (import_models, roles),
    "places": (import_models, places),
    "renamed": (import_models, renamed),
    "vocabulary": (lambda: None, vocabulary),
    "united": (lambda: None, united),
    "encode": (import_transformers, encode),
}


def answer(question: Question) -> dict[str, Any]:
    """The answer to a question, or its error, as the object of a line."""
    _, function = ANSWERS[question["question"]]
    try:
        return {"answer": function(question)}
    except LowmemAimError as error:
        return {"error": type(error).__name__, "problems": error.problems, "hints": error.hints}


def answer_within(limit: int, question: Question) -> dict[str, Any]:
    """The answer to a question under a limit of memory, in bytes. Raises MemoryError if that was in its way.

    Libraries make any error of an allocation that failed, some of which do not say so.
    """
    limit_memory(limit)
    before, resident = peak_bytes(), resident_bytes()
    given: dict[str, Any] = {}
    try:
        given = answer(question)
    except Exception:
        if not _came_near(limit, before, resident):
            raise
    if "answer" not in given and _came_near(limit, before, resident):
        raise MemoryError(f"more than {limit} bytes of memory")
    return given


def _came_near(limit: int, before: int, resident: int) -> bool:
    """Whether this process has grown by a third of the limit, which counts what is mapped and not touched as well.

    `before`, `resident`: its peak and its size in RAM when it began.
    """
    peak = peak_bytes()
    return is_limited() and peak > before and peak - resident > limit // 3


def main() -> None:
    """Answer the questions on standard input until it ends.

    The arguments: bytes of memory above the imports; seconds for an answer, after which this process ends.
    """
    limit, seconds = map(int, sys.argv[1:])
    name_temporary_folder()
    # Whatever a library prints must not get among the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in io.TextIOWrapper(sys.stdin.buffer, encoding="utf-8"):
        question = json.loads(line)
        lift_limit()
        ANSWERS[question["question"]][0]()
        print("{}", file=answers, flush=True)
        end_after(seconds)
        print(json.dumps(answer_within(limit, question)), file=answers, flush=True)
        end_after(0)


if __name__ == "__main__":
    main()
