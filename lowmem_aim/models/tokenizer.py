"""The tokenizer of a model folder, as transformers loads it: never custom code."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from lowmem_aim.errors import ModelError, printable
from lowmem_aim.models.checkpoint import Checkpoint
from lowmem_aim.system.files import unreadable


def vocabulary_of(checkpoint: Checkpoint) -> dict[str, int]:
    """The vocabulary of the folder's tokenizer: token text -> id. Raises ModelError."""
    return dict(load_tokenizer(checkpoint).get_vocab())


def load_tokenizer(checkpoint: Checkpoint):  # type: ignore[no-untyped-def]  # transformers has no types to name
    """Load transformers' tokenizer of a model folder; never custom code. Raises ModelError."""
    from transformers import AutoTokenizer

    what = f"`{printable(checkpoint.label)}` has no tokenizer that transformers can load"
    with tokenizer_errors(what, "put its tokenizer files into the model's folder"):
        return AutoTokenizer.from_pretrained(checkpoint.folder, trust_remote_code=False, local_files_only=True)


@contextlib.contextmanager
def tokenizer_errors(what: str, hint: str) -> Iterator[None]:
    """Turn whatever a tokenizer raises in the block into a ModelError of `what` and `hint`.

    Its parsers raise anything, and its compiled parts a BaseException.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if isinstance(error, OSError) and error.errno and error.filename:  # the system's, not transformers' own
            raise unreadable(error, Path(error.filename)) from error
        raise ModelError(f"{what}: {printable(str(error))}", hint) from error
