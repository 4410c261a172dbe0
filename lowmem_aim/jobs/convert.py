"""`convert`: a model folder of pickled weights (.bin) as a new folder of safetensors.

A child process without network loads the pickle, and hands over the bytes of one tensor at a time. Until all is written
and durable, the new folder has another name: a conversion that is killed leaves no model.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowmem_aim.errors import (
    LowmemAimError,
    MemoryBudgetError,
    ModelError,
    NoSuchModel,
    UsageError,
    noted,
    printable,
    raise_all,
)
from lowmem_aim.events import Advanced, Emit, Notice, PhaseEnded, PhaseStarted, silent
from lowmem_aim.models.adapter_config import ADAPTER_CONFIG
from lowmem_aim.models.checkpoint import Checkpoint
from lowmem_aim.models.config import CONFIG, MAX_CONFIG_BYTES, config_of, load_json
from lowmem_aim.models.folder import COMPLETE, MOST_PROBLEMS, PICKLES, check_links
from lowmem_aim.models.hub import local_model
from lowmem_aim.models.pickle_files import PickledWeights, pickled_weights
from lowmem_aim.models.pickle_process import PickledTensor, PickleReader
from lowmem_aim.output.card import json_bytes
from lowmem_aim.output.code_keys import without_code
from lowmem_aim.output.copied import copied_files
from lowmem_aim.output.folder import check_disk, check_output
from lowmem_aim.output.workspace import workspace
from lowmem_aim.output.writer import ShardWriter
from lowmem_aim.planning.layout import shard_of
from lowmem_aim.planning.tasks import Shard, Task, index_of
from lowmem_aim.system.files import disk_errors, input_errors, partial_folder, real, sync_folder, write_file
from lowmem_aim.system.memory import free_bytes
from lowmem_aim.units import shown

# Names of embeddings that others are tied to, T5's own first.
_EMBEDDINGS = (re.compile(r"(^|\.)shared\."), re.compile(r"emb(?!ed_out)|wte"))
MOST_TOLD = 5  # names of files that are not converted


@dataclass(frozen=True)
class _Conversion:
    """One pickled file, and the safetensors file that is made of it."""

    weights: PickledWeights
    file: Path
    shard: Shard

    def check(self, tensors: Sequence[PickledTensor]) -> None:
        """Raise ModelError if the tensors are not those that were planned with."""
        found = {tensor.name: (tensor.dtype, tensor.shape) for tensor in tensors}
        if any(found.get(task.name) != (task.dtype, task.shape) for task in self.shard.tasks):
            raise ModelError(f"`{printable(str(self.file))}` changed while it was being read")


def convert(folder: str, new: Path, *, in_memory: bool = False, emit: Emit = silent) -> Path:
    """Write the model in `folder`, whose weights are pickled, as safetensors into the new folder `new`; returns `new`.

    `in_memory` reads each file whole, which files of old formats need. Raises ModelError, UsageError, DiskError,
    MemoryBudgetError, LockedError.
    """
    source, found = _checked(folder, new)
    for file in (file for weights in found for file in weights.files) if in_memory else ():
        _check_memory(file)
    config = _config(source, found)
    with PickleReader.start() as reader:
        if reader.network:
            text = "the process that reads pickle could use the network: this system does not take it away"
            emit(Notice(f"{text} ({reader.network})", "warning"))
        conversions = _planned(reader, found, config, in_memory, emit)
        _tell_of_others(source, found, emit)
        small = _small_files(source, config, conversions, emit)
        size = sum(conversion.shard.nbytes for conversion in conversions)
        check_disk(new, size, "the converted model")
        with workspace(partial_folder(new), fresh=True) as space:
            made = space.staging / "model"
            with disk_errors(made):
                made.mkdir(parents=True)
            emit(PhaseStarted("convert", size, "bytes"))
            _write(reader, conversions, made, in_memory, emit)
            _write_small(made, small)
            _check_new(new)  # again: another process may have made it meanwhile
            with disk_errors(new):
                sync_folder(made)
                os.rename(made, new)
                sync_folder(new.absolute().parent)
            emit(PhaseEnded("convert"))
            space.spent = True
    return new


# --- checked before work ------------------------------------------------------------------------------------------


def _checked(folder: str, new: Path) -> tuple[Path, list[PickledWeights]]:
    """The folder, links followed, and its pickled weights. Raises all that is wrong, at once."""
    errors: list[LowmemAimError] = []
    with noted(errors):
        _check_new(new)
    with noted(errors):
        try:
            model = local_model(folder)
        except NoSuchModel as error:  # whose hint speaks of the Hub, where nothing is looked for here
            raise NoSuchModel(error.problems, "check the path") from error
        if model is None:
            raise ModelError(
                f"there is no folder `{printable(folder)}`",
                f"`hf download {printable(folder)} --local-dir FOLDER` first",
            )
        source = real(model.folder)
        with noted(errors):
            if not os.path.lexists(new):  # else that is told
                check_output(new, [source])
            check_output(partial_folder(new), [])
        check_links(source)
        found = pickled_weights(source)
    raise_all(errors)
    return source, found


def _check_new(new: Path) -> None:
    if os.path.lexists(new):
        raise UsageError(f"`{printable(str(new))}` exists already", hint="name a new folder, or remove that one")


def _config(source: Path, found: Sequence[PickledWeights]) -> dict[str, Any]:
    """The config.json of a model; empty for an adapter, which needs its own. Raises ModelError."""
    if any(weights.stem == "model" for weights in found):
        return config_of(source)
    load_json(source / ADAPTER_CONFIG, MAX_CONFIG_BYTES)
    return {}


def _check_memory(file: Path) -> None:
    with input_errors(file):
        size = file.stat().st_size
    if size > (free := free_bytes()):
        raise MemoryBudgetError(
            f"`{printable(str(file))}` takes {shown(size)} of memory as a whole, but {shown(free)} are free",
            hint="close other programs, or convert it on a machine with more memory",
        )


def _planned(
    reader: PickleReader, found: Sequence[PickledWeights], config: Mapping[str, Any], whole: bool, emit: Emit
) -> list[_Conversion]:
    """Every file with what becomes of it. Raises all errors of all files at once."""
    errors: list[LowmemAimError] = []
    conversions: list[_Conversion] = []
    for weights in found:
        ties = weights.stem == "model" and _ties(config)
        taken: set[str] = set()  # names of tensors of the files before
        for file, output in zip(weights.files, weights.outputs, strict=True):
            with noted(errors):
                tensors = _to_write(reader.open(file, whole), weights, file, taken)
                taken |= {tensor.name for tensor in tensors}
                repeats = _repeats(tensors, emit) if ties else set()
                tasks = [Task(t.name, t.shape, t.dtype, "copy", {}) for t in tensors if t.name not in repeats]
                conversions.append(_Conversion(weights, file, shard_of(output, tasks)))
    raise_all(errors)
    return conversions


def _to_write(
    tensors: Sequence[PickledTensor], weights: PickledWeights, file: Path, taken: Set[str]
) -> list[PickledTensor]:
    """The tensors of a file that are not those of another: the index says where to look, else the first file counts.

    Raises ModelError for tensors that the index expects in the file, and that are not there.
    """
    lacking = weights.expected(file) - {tensor.name for tensor in tensors}
    if lacking:
        problems = [f"`{printable(str(file))}` lacks `{printable(name)}`" for name in sorted(lacking)]
        raise ModelError(problems[:MOST_PROBLEMS], COMPLETE)
    return [t for t in tensors if weights.weight_map.get(t.name, file.name) == file.name and t.name not in taken]


def _ties(config: Mapping[str, Any]) -> bool:
    """Whether loaders tie what the file shares. A config that does not say it is that of a model which always does."""
    text = config.get("text_config")
    inner = text.get("tie_word_embeddings", True) if isinstance(text, Mapping) else True
    return bool(config.get("tie_word_embeddings", inner))


def _repeats(tensors: Sequence[PickledTensor], emit: Emit) -> set[str]:
    """The names of tensors that are written under another name: of an embedding and its head, the embedding's."""
    same: dict[str, list[str]] = {}
    for tensor in tensors:
        same.setdefault(tensor.same_as, []).append(tensor.name)
    repeats: set[str] = set()
    for names in same.values():
        kept = next((name for pattern in _EMBEDDINGS for name in names if pattern.search(name)), names[0])
        for name in (name for name in names if name != kept):
            emit(Notice(f"`{printable(name)}` is the same tensor as `{printable(kept)}`, and written once"))
            repeats.add(name)
    return repeats


def _tell_of_others(source: Path, found: Sequence[PickledWeights], emit: Emit) -> None:
    """Tell of pickle that stays behind: what training has left, or weights of modules in folders of their own."""
    converted = {file for weights in found for file in weights.files}
    with input_errors(source):
        there = [file for pattern in PICKLES for place in (pattern, f"*/{pattern}") for file in source.glob(place)]
    names = sorted(f"`{printable(f.relative_to(source).as_posix())}`" for f in there if f not in converted)
    if names:
        more = [f"{len(names) - MOST_TOLD} more"] * (len(names) > MOST_TOLD)
        emit(Notice(f"not converted: {', '.join([*names[:MOST_TOLD], *more])}", "warning"))


def _small_files(
    source: Path, config: Mapping[str, Any], conversions: Sequence[_Conversion], emit: Emit
) -> dict[str, bytes]:
    """Every file beside the weights by name, config.json last. Raises ModelError."""
    reference = Checkpoint(source, source.name, config, {})
    files = copied_files(reference, emit, more=(ADAPTER_CONFIG,), owner=f"`{printable(str(source))}`")
    for weights in dict.fromkeys(conversion.weights for conversion in conversions):
        shards = [conversion.shard for conversion in conversions if conversion.weights is weights]
        if len(shards) > 1:
            files[weights.index] = index_of(shards)
    if config:
        plain, _ = without_code(config)
        files[CONFIG] = json_bytes(plain)
    return files


# --- written ------------------------------------------------------------------------------------------------------


def _write(reader: PickleReader, conversions: Sequence[_Conversion], made: Path, whole: bool, emit: Emit) -> None:
    """Write the safetensors into the folder `made`. Raises ModelError for a file that has changed meanwhile."""
    done = 0
    for conversion in conversions:
        shard = conversion.shard
        if len(conversions) > 1:  # else it is open
            conversion.check(reader.open(conversion.file, whole))
        with ShardWriter(made / shard.name, shard.nbytes) as writer:
            writer.append(shard.header)
            for task in shard.tasks:
                for piece in reader.data(task.name):
                    writer.append(piece)
                    done += len(piece)
                    emit(Advanced(done, task.name))
                writer.tensor_done()
            writer.close()


def _write_small(made: Path, files: Mapping[str, bytes]) -> None:
    for name, content in files.items():
        with disk_errors(made / name):
            (made / name).parent.mkdir(exist_ok=True)
        write_file(made / name, content)
