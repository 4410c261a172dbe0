"""A model to evaluate: built without weights, and its tokenizer, both from vetted files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lowmem_aim.errors import ModelError, printable
from lowmem_aim.models.checkpoint import Checkpoint
from lowmem_aim.models.known_files import LARGEST_FILE
from lowmem_aim.models.reader import Reader
from lowmem_aim.models.vetted import tokenizer_files, vetted_folder
from lowmem_aim.system.tensors import dtype_named

if TYPE_CHECKING:
    from lowmem_aim.models.meta_model import MetaModel

CHAT_TEMPLATE = "chat_template.jinja"


def to_evaluate(checkpoint: Checkpoint, dtype: str | None, use_cache: bool = True) -> MetaModel:
    """The model without weights, in `dtype` (None: as it is stored).

    Raises ModelError for a model that does not continue texts, or cannot be run block by block.
    """
    from lowmem_aim.models.meta_model import load_meta_model

    with Reader(use_cache) as reader:  # under limits: neither can fill the memory of this process, which reads them now
        reader.roles(checkpoint)
        reader.encode(checkpoint, ["a"])
    meta_model = load_meta_model(checkpoint, dtype_named(dtype) if dtype else None)
    meta_model.require_blocks()
    if not meta_model.has_head:
        raise ModelError(
            f"`{printable(checkpoint.label)}` has no output head: it gives no token a probability",
            hint="a reward model or an encoder cannot be evaluated on texts",
        )
    return meta_model


def tokenizer_of(checkpoint: Checkpoint) -> Any:
    """The tokenizer, as transformers' auto class loads it. Raises ModelError for files that lead out of the folder."""
    from transformers import AutoTokenizer

    files, template = tokenizer_files(checkpoint), checkpoint.small_file(CHAT_TEMPLATE, LARGEST_FILE)
    with vetted_folder(checkpoint.config, files | ({} if template is None else {CHAT_TEMPLATE: template})) as folder:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def require_chat_template(checkpoint: Checkpoint, tokenizer: Any) -> None:
    """Raise ModelError if the model has no chat template that is the default one."""
    try:
        tokenizer.get_chat_template()
    except ValueError as error:
        raise ModelError(
            f"`{printable(checkpoint.label)}` has no chat template",
            hint="leave `--chat-template` out: a model that was not trained for chats needs none",
        ) from error
