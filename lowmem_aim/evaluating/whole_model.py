"""A model loaded whole, to write texts: spread by accelerate over the device, RAM and disk.

Loaders are given a folder of this tool's own making, never the user's: vetted copies of small files, links to the
safetensors files that were checked when the model was opened, and an index written from their headers.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from lm_eval.models.huggingface import HFLM

from lowmem_aim.errors import ModelError, printable
from lowmem_aim.models.checkpoint import Checkpoint
from lowmem_aim.models.config import MAX_CONFIG_BYTES, parse_json
from lowmem_aim.models.folder import INDEX, SINGLE
from lowmem_aim.models.meta_model import MetaModel
from lowmem_aim.models.vetted import leads_out, vetted_folder
from lowmem_aim.system.files import disk_errors
from lowmem_aim.system.memory import Budget, is_allocation_failure

GENERATION_CONFIG = "generation_config.json"
# Of what is left of a budget, weights get so much; the rest is for keys and values, logits, and a layer from disk.
OF_WEIGHTS = 0.7


def cannot_write(checkpoint: Checkpoint) -> Iterator[ModelError]:
    """Yield an error for a model that is not loaded whole: its tensors do not lie in its folder as they are."""
    if type(checkpoint) is Checkpoint:
        return
    what = "it comes with an adapter" if checkpoint.adapter else "its weights are quantised"
    yield ModelError(
        f"`{printable(checkpoint.label)}` cannot be evaluated on tasks that let the model write: {what}",
        hint="make a plain model of it first (`lowmem-aim merge` with the method `passthrough`), or leave these tasks "
        "out",
    )


def room_of(budget: Budget, device: torch.device) -> dict[int | str, int]:
    """The bytes that weights may take, by the places that accelerate knows: the device first, then RAM."""
    places: dict[int | str, int] = {}
    if budget.vram is not None:
        places[device.index or 0] = int(budget.vram_left(device) * OF_WEIGHTS)
    elif device.type != "cpu":
        places[device.type] = int(budget.ram_left() * OF_WEIGHTS)
        return places  # such a device works in RAM itself
    return {**places, "cpu": int(budget.ram_left() * OF_WEIGHTS)}


def generation_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The generation_config.json, without texts that lead out of the folder; {} if there is none. Raises ModelError."""
    content = checkpoint.small_file(GENERATION_CONFIG, MAX_CONFIG_BYTES)
    if content is None:
        return {}
    table = parse_json(content, checkpoint.folder / GENERATION_CONFIG)
    if not isinstance(table, dict):
        raise ModelError(f"`{printable(str(checkpoint.folder / GENERATION_CONFIG))}` is not a JSON object")
    return {key: value for key, value in table.items() if not (isinstance(value, str) and leads_out(value))}


@contextlib.contextmanager
def loaded_whole(
    checkpoint: Checkpoint, meta_model: MetaModel, room: dict[int | str, int], offload: Path
) -> Iterator[Any]:
    """The model with its weights, for this block; the folder `offload` is for weights that loaders write to disk.

    Raises ModelError for what transformers cannot load, and DiskError.
    """
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)  # it tells of weights on disk, which our notice does
    shutil.rmtree(offload, ignore_errors=True)  # what a killed run has left
    try:
        with _folder_of(checkpoint) as folder:
            model = _loaded(checkpoint, meta_model, room, folder, offload)
            checkpoint.check_unchanged()
            yield model
    finally:
        shutil.rmtree(offload, ignore_errors=True)


def _loaded(
    checkpoint: Checkpoint, meta_model: MetaModel, room: dict[int | str, int], folder: Path, offload: Path
) -> Any:
    try:
        model = type(meta_model.model).from_pretrained(
            folder,
            config=copy.deepcopy(meta_model.model.config),
            dtype=meta_model.dtype,
            device_map="auto",
            max_memory=room,
            offload_folder=str(offload),
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
        )
    except Exception as error:
        if is_allocation_failure(error):
            raise
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"transformers cannot load `{printable(checkpoint.label)}` to let it write: {printable(said, 500)}",
            hint="leave tasks that let the model write out of `--tasks`",
        ) from error
    return model.eval()


@contextlib.contextmanager
def _folder_of(checkpoint: Checkpoint) -> Iterator[Path]:
    """A temporary folder from which the model can be loaded."""
    files = {GENERATION_CONFIG: json.dumps(generation_config(checkpoint)).encode()}
    if [file.name for file in checkpoint.files] != [SINGLE]:
        table = {name: info.file.name for name, info in checkpoint.tensors.items()}
        files[INDEX] = json.dumps({"metadata": {}, "weight_map": table}).encode()
    with vetted_folder(checkpoint.config, files) as folder:
        for file in checkpoint.files:
            with disk_errors(folder / file.name):
                (folder / file.name).symlink_to(file.resolve())
        yield folder


class WholeModel(HFLM):  # type: ignore[misc]
    """The harness' own language model on a loaded model, parts of which may lie on disk."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        device: torch.device,
        batch: int,
        max_length: int | None,
        thought: str | int | None,
    ) -> None:
        """`batch`: texts that are written at a time; `thought`: what a text's thoughts end with, which are cut off."""
        super().__init__(
            pretrained=model, tokenizer=tokenizer, batch_size=batch, max_length=max_length, think_end_token=thought
        )
        self._device = device  # the first parameter's, which the harness takes, is `meta` if that lies on disk
