"""Reading a model's small files with transformers, in a child process under limits.

A config can make transformers build lists until memory is full, and a tokenizer's parsers are compiled code that reads
whatever a file holds. So a child (`models.reader_program`) reads them, with `MEMORY_BYTES` above its imports and
`SECONDS` for each answer. It is given copies of vetted files, answers in JSON, and its answers are cached.
The child starts with the first question, and ends with the block.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import xxhash

from lowmem_aim.errors import DiskError, ModelError, printable
from lowmem_aim.models.checkpoint import Checkpoint
from lowmem_aim.models.reader_process import ReaderFailed, ReaderKilled, ReaderProcess
from lowmem_aim.models.roles import TensorRoles
from lowmem_aim.models.vetted import tokenizer_files, vetted_folder
from lowmem_aim.system.files import cache_folder, write_file

PUT_TOKENIZER = "put its tokenizer files into the model's folder"
FORMAT = 8  # of the cached answers; part of their names
TEXTS_AT_ONCE = 64
FOLDER = "outlines"  # of the cache folder
READ_BY = ("transformers", "tokenizers", "sentencepiece", "torch")  # whose versions the answers depend on


class ReaderNeeded(Exception):  # not an error: whoever works alone does without the answer
    """An answer is not at hand, and no child process may be started for it."""


@dataclass(frozen=True)
class UnitedTokenizer:
    """One tokenizer made of several."""

    table: str  # its tokenizer.json
    tokens: Mapping[str, int]  # text -> id
    added: Sequence[Mapping[str, Any]]  # its added tokens, with their settings
    changed: bool  # the first model's own files would not do
    ordinary: bool  # tokens that are no added ones have come or gone


class Reader(contextlib.AbstractContextManager["Reader"]):
    """Reads configs, models without weights and tokenizers, for all models of a job. Use as a context manager."""

    def __init__(self, use_cache: bool = True) -> None:
        """With `use_cache`, answers are kept in the cache folder, and taken from there."""
        self._use_cache = use_cache
        self.alone = False  # with True, a question that needs the child process raises ReaderNeeded
        self._process: ReaderProcess | None = None
        self._known: dict[str, Any] = {}  # answers by the name of their file in the cache
        self._tokenizers: dict[Path, dict[str, str]] = {}  # of a folder: the tokenizer's files -> their digests

    def settings(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """The config as transformers' class reads it, with defaults filled in. Raises ModelError."""
        found = self._answer("settings", checkpoint, {"config": checkpoint.config})
        return dict(found)

    def roles(self, checkpoint: Checkpoint) -> TensorRoles:
        """The roles of the tensors, from building the model without weights. Raises ModelError as `load_meta_model`."""
        return TensorRoles.of(self._answer("roles", checkpoint, _outline(checkpoint)))

    def places(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """The place of each tensor in transformers' model, see `reader_program.places`. Raises ModelError."""
        return dict(self._answer("places", checkpoint, _outline(checkpoint)))

    def renamed(self, checkpoint: Checkpoint) -> dict[str, str]:
        """transformers' name -> the checkpoint's, of parameters that are one tensor of another name.

        Raises ModelError as `roles`.
        """
        return dict(self._answer("renamed", checkpoint, _outline(checkpoint)))

    def tokenizer(self, checkpoint: Checkpoint) -> dict[str, str]:
        """The tokenizer's files by name, with xxh3-128 of each; empty if there is none. Raises ModelError."""
        if checkpoint.folder not in self._tokenizers:
            files = tokenizer_files(checkpoint)
            digests = {name: xxhash.xxh3_128_hexdigest(content) for name, content in files.items()}
            self._tokenizers[checkpoint.folder] = digests
        return self._tokenizers[checkpoint.folder]

    def vocabulary(self, checkpoint: Checkpoint) -> dict[str, int]:
        """The vocabulary of the folder's tokenizer: token text -> id. Raises ModelError."""
        return dict(self._of_tokenizer("vocabulary", checkpoint, []))

    def united(self, models: Sequence[Checkpoint], rows: Sequence[int | None], more: Sequence[str]) -> UnitedTokenizer:
        """One tokenizer of several, and of `more` tokens: see `models.tokenizer_union`. Raises ModelError.

        `rows`: of each model's embedding, beyond which its tokens do not count; None: all count.
        """
        files = [self._files_of_tokenizer(model) for model in models]
        about = {"files": files, "rows": [*rows], "more": [*more], "configs": [model.config for model in models]}
        return UnitedTokenizer(**self._answer("united", models[0], about, models))

    def encode(self, checkpoint: Checkpoint, texts: Sequence[str]) -> list[list[int]]:
        """The token ids of each text, special tokens included. Raises ModelError."""
        batches = (texts[i : i + TEXTS_AT_ONCE] for i in range(0, len(texts), TEXTS_AT_ONCE))
        return [list(ids) for batch in batches for ids in self._of_tokenizer("encode", checkpoint, list(batch))]

    def _of_tokenizer(self, question: str, checkpoint: Checkpoint, texts: list[str]) -> Any:
        about = {"config": checkpoint.config, "files": self._files_of_tokenizer(checkpoint), "texts": texts}
        return self._answer(question, checkpoint, about, [checkpoint])

    def _files_of_tokenizer(self, checkpoint: Checkpoint) -> dict[str, str]:
        """The tokenizer's files as in `tokenizer`. Raises ModelError if there is none."""
        files = self.tokenizer(checkpoint)
        if not files:
            raise ModelError(f"`{printable(checkpoint.label)}` has no tokenizer", hint=PUT_TOKENIZER)
        return files

    def close(self) -> None:
        """End the child process, if there is one, and forget the answers; the next question starts another."""
        self._known.clear()
        self._tokenizers.clear()
        if self._process is not None:
            self._process.end()
            self._process = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _answer(
        self, question: str, checkpoint: Checkpoint, about: Mapping[str, Any], copied: Sequence[Checkpoint] = ()
    ) -> Any:
        """The answer in the cache, or the child's; `about` is all that it depends on, beside versions.

        The child is given copies of the tokenizer's files of the models in `copied`.
        """
        versions = [importlib.metadata.version(package) for package in READ_BY]
        facts = json.dumps([FORMAT, versions, question, about], sort_keys=True)
        name = f"{xxhash.xxh3_128_hexdigest(facts.encode())}.json"
        if name not in self._known:
            found = _cached(name) if self._use_cache else None
            if found is None and self.alone:
                raise ReaderNeeded
            if found is None:
                found = self._asked(question, checkpoint, about, copied)
                if self._use_cache:
                    _keep(name, found)
            self._known[name] = found
        return self._known[name]

    def _asked(
        self, question: str, checkpoint: Checkpoint, about: Mapping[str, Any], copied: Sequence[Checkpoint]
    ) -> Any:
        with contextlib.ExitStack() as stack:
            folders = [
                str(stack.enter_context(vetted_folder(model.config, tokenizer_files(model)))) for model in copied
            ]
            given = {"folder": (*folders, "")[0], "folders": folders, "labels": [model.label for model in copied]}
            return self._ask(question, checkpoint, {**about, **given})

    def _ask(self, question: str, checkpoint: Checkpoint, about: Mapping[str, Any]) -> Any:
        if self._process is None:
            self._process = ReaderProcess.start()
        try:
            return self._process.ask({"question": question, "label": checkpoint.label, **about})
        except ReaderFailed as failure:
            self._process.end()
            self._process = None
            what = printable(checkpoint.label)
            hint = _AGAIN if isinstance(failure, ReaderKilled) else _AS_PUBLISHED
            raise ModelError(f"`{what}`: reading its {_READ[question]} {failure}", hint) from failure


def _outline(checkpoint: Checkpoint) -> dict[str, Any]:
    """All that building the model without weights depends on: every shape, because the model is checked against it."""
    tensors = [(info.name, info.dtype.name, info.shape) for info in checkpoint]
    return {"config": checkpoint.config, "tensors": tensors}


def _cached(name: str) -> Any:
    """The answer in a file of the cache; None if there is no such file, or not one that `_keep` wrote."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        kept = json.loads((cache_folder() / FOLDER / name).read_text(encoding="utf-8"))
        if kept["digest"] == _digest(kept["answer"]):
            return kept["answer"]
    return None


def _digest(answer: Any) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(answer).encode())


def _keep(name: str, answer: Any) -> None:
    """Write an answer to the cache. If that fails, it costs time, nothing else."""
    file = cache_folder() / FOLDER / name
    with contextlib.suppress(OSError, DiskError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_file(file, json.dumps({"answer": answer, "digest": _digest(answer)}).encode())


# What each question reads, for messages.
_READ = {
    "settings": "config",
    "roles": "config, and building the model without weights,",
    "places": "config, and building the model without weights,",
    "renamed": "config, and building the model without weights,",
    "vocabulary": "tokenizer",
    "united": "tokenizer, and uniting it with others,",
    "encode": "texts with its tokenizer",
}
_AGAIN = "give the same command again; close other programs if that does not help"
_AS_PUBLISHED = "is the file the one that was published? download it again"
