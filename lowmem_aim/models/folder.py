"""The files of a model folder: which of them hold tensors, and which are refused.

A model is model.safetensors, or the shards that model.safetensors.index.json names. Links that may not be followed,
names with a path and pickle are each a ModelError.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from lowmem_aim.errors import LowmemAimError, ModelError, noted, printable, raise_all
from lowmem_aim.models.config import CONFIG, load_json
from lowmem_aim.models.headers import MAX_HEADER_BYTES, TensorInfo, read_header
from lowmem_aim.models.known_files import OF_TOKENIZERS, READ_BY_LOADERS, fits
from lowmem_aim.models.links import is_inside, leads_to_weights
from lowmem_aim.system.files import input_errors, is_file, open_regular
from lowmem_aim.units import counted

INDEX = "model.safetensors.index.json"
COMPLETE = "is the download complete, and is this the folder that holds the weights?"
_CONVERT = "`lowmem-aim convert FOLDER NEW` makes safetensors of it once, in a process of its own without network"
SINGLE = "model.safetensors"
ADAPTER, ADAPTER_PICKLE = "adapter_model.safetensors", "adapter_model.bin"  # of a LoRA adapter, as PEFT saves it
CHAT_TEMPLATES = "additional_chat_templates"  # the one subfolder of a model folder that transformers reads
MOST_NAMED = 4  # models in a folder's subfolders that are named
MOST_PROBLEMS = 20  # of one kind, in one file, that are told
READABLE = (".json", ".safetensors", ".model", ".txt", ".jinja")  # what we or transformers may open
# What is read beside the shards.
READ = (CONFIG, INDEX, "adapter_config.json", "README.md", *READ_BY_LOADERS, *OF_TOKENIZERS)
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def check_is_model(folder: Path) -> None:
    """Raise ModelError for a folder with neither a config nor weights: this is one problem, not two.

    The hint names the models in its subfolders. Raises OSError for a folder that cannot be listed.
    """
    entries = sorted(folder.iterdir())
    if any(fits(entry.name, (CONFIG, "*.safetensors", INDEX, *PICKLES)) for entry in entries):
        return
    inside = [f"`{printable(str(entry))}`" for entry in entries if is_file(entry / CONFIG)]
    listed = ", ".join(inside[:MOST_NAMED]) + f" and {len(inside) - MOST_NAMED} more" * (len(inside) > MOST_NAMED)
    hint = f"name one of the models in it: {listed}" if inside else "name the folder that holds config.json"
    raise ModelError(f"`{printable(str(folder))}` is not a model folder: it has no {CONFIG} and no weights", hint)


def check_links(folder: Path) -> None:
    """Raise ModelError, all at once, for links that may not be followed, and for pipes, devices and what does not open.

    Links count where the file is read, here or for the output; the others where somebody may open it, we or a library.
    Raises OSError for a folder that cannot be listed.
    """
    there = [*sorted(folder.iterdir()), *sorted((folder / CHAT_TEMPLATES).glob("*"))]
    links = [file for file in there if file.is_symlink() and not is_inside(folder, file)]
    outside = [file for file in links if fits(file.name, READ) or CHAT_TEMPLATES in (file.name, file.parent.name)]
    if folder / INDEX not in outside:
        with contextlib.suppress(ModelError):  # of the index: told by those who read it
            shards = {*shard_names(folder), ADAPTER}
            outside += [file for file in links if file.name in shards and not leads_to_weights(file)]
    errors: list[LowmemAimError] = []
    if outside:
        what = "is a link that leads out of its model folder"
        other = "; a shard may be one, to a valid safetensors file"
        problems = [f"`{printable(str(f))}` {what}{other * (f.suffix == '.safetensors')}" for f in outside]
        errors.append(ModelError(problems, "copy the file itself into the model folder"))
    opened = [file for file in there if file.suffix in READABLE and file not in links and not file.is_dir()]
    for file in opened:
        with noted(errors), input_errors(file):
            os.close(open_regular(file))  # libraries tell of a file that they cannot open without its name
    raise_all(errors)


def is_plain(name: Any) -> bool:
    """Whether `name` is a file name that can only lie in the model's folder itself, on every system."""
    return isinstance(name, str) and len(name) <= 255 and not set(name) & {"/", "\\", "\0", ":"}


def _is_shard_name(name: Any) -> bool:
    # The ending counts too: `check_links` selects files by it.
    return is_plain(name) and name.endswith(".safetensors")


def shard_names(folder: Path) -> set[str]:
    """The names of the files that hold the model's tensors, whether or not they are there.

    Names that are not plain are left out; `Checkpoint.open` refuses them. Raises ModelError for an unreadable index.
    """
    weight_map = _weight_map(folder)
    return {SINGLE} if weight_map is None else {name for name in weight_map.values() if _is_shard_name(name)}


def _wrong_shards(folder: Path, names: Sequence[Any]) -> Iterator[str]:
    """Yield a message for the names in an index that are not plain, and one for the files that are missing."""
    index = printable(str(folder / INDEX))
    for name in (name for name in names if not _is_shard_name(name)):
        what = "not a plain file name that ends in .safetensors"
        yield f"`{index}` names the shard {printable(repr(name))}: {what}"
    # An index may name as many shards as it has tensors: all that are missing are one problem.
    missing = [name for name in names if _is_shard_name(name) and not is_file(folder / name)]
    if missing:
        others = f", as are {len(missing) - 1} others" if len(missing) > 1 else ""
        yield f"`{index}` names the shard {printable(repr(missing[0]))}, which is missing{others}"


def _weight_map(folder: Path) -> dict[str, Any] | None:
    """Tensor name -> shard name, from the index; None if the model is a single file."""
    if is_file(folder / SINGLE) or not is_file(folder / INDEX):
        return None
    return _indexed(folder)


def _indexed(folder: Path) -> dict[str, Any]:
    index = load_json(folder / INDEX, MAX_HEADER_BYTES)
    table = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(table, dict) or not table:
        raise ModelError(f"`{printable(str(folder / INDEX))}` has no `weight_map`")
    return table


def tensors_in_folder(folder: Path) -> tuple[dict[str, TensorInfo], list[str]]:
    """(all tensors of the model in file order, those of quantised weights too; what is odd about its files).

    Raises ModelError with every problem.
    """
    weight_map = _weight_map(folder)
    if weight_map is None:
        return _usable(folder, read_header(_single_file(folder), packed=True)), list(_stale_single_file(folder))
    shards: dict[str, list[str]] = {}  # repr of the name in the index -> tensors
    copies: list[str] = []
    for name, shard_name in weight_map.items():
        shards.setdefault(repr(shard_name), []).append(name)
    problems = [*islice(_wrong_shards(folder, [weight_map[names[0]] for names in shards.values()]), MOST_PROBLEMS)]
    tensors: dict[str, TensorInfo] = {}
    for names in shards.values():
        shard_name = weight_map[names[0]]
        if not (_is_shard_name(shard_name) and is_file(folder / shard_name)):
            continue
        try:
            shard = read_header(folder / shard_name, packed=True)
        except ModelError as error:
            problems += error.problems
            continue
        lacking = [name for name in names if name not in shard]
        where = f"shard {printable(repr(shard_name))} of `{printable(str(folder))}`"
        problems += [f"{where} lacks `{printable(name)}`" for name in lacking[:MOST_PROBLEMS]]
        tensors |= {name: shard[name] for name in names if name in shard}
        copies += sorted(shard.keys() - set(names))
    if problems:
        raise ModelError(problems, hint="download the model again, or repair its index")
    return _usable(folder, tensors), list(_unread_copies(folder, copies, weight_map))


def _stale_single_file(folder: Path) -> Iterator[str]:
    """Tell of an index that names shards beside a model.safetensors."""
    with contextlib.suppress(ModelError):
        weight_map = _indexed(folder) if is_file(folder / INDEX) else {}
        if set(map(str, weight_map.values())) - {SINGLE}:
            yield (
                f"`{printable(str(folder))}` has both {SINGLE} and {INDEX}: {SINGLE} is read, as loaders do, and the "
                "shards that the index names are not"
            )


def _unread_copies(folder: Path, copies: Sequence[str], weight_map: Mapping[str, Any]) -> Iterator[str]:
    """Tell of tensors in shards that the index does not look for there."""
    twice = [name for name in copies if name in weight_map]
    unnamed = [name for name in copies if name not in weight_map]
    for names, what in (
        (twice, "read where the index says: in two shards"),
        (unnamed, "not read: in a shard, but not in the index"),
    ):
        if names:
            those = f"{counted(len(names), 'tensor')}, such as `{printable(names[0])}`"
            yield f"`{printable(str(folder))}`: {what}: {those}"


def _usable(folder: Path, tensors: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The tensors in file order. Raises ModelError if some are empty."""
    empty = [name for name, info in tensors.items() if info.shape == (0,)]
    if any(name.endswith(".weight") for name in empty):
        raise ModelError(
            f"`{printable(str(folder))}` holds {len(empty)} empty tensors (`{printable(empty[0])}` has the shape [0]): "
            "it was saved under DeepSpeed ZeRO-3, and its weights were not gathered",
            hint="`zero_to_fp32.py` in the training's checkpoint gathers them; so does the setting "
            "`stage3_gather_16bit_weights_on_model_save` when it saves",
        )
    return in_file_order(tensors)


def in_file_order(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The tensors sorted by file and offset: reading them in order reads each file forward."""
    return {t.name: t for t in sorted(tensors.values(), key=lambda t: (t.file.name, t.begin, t.name))}


def _single_file(folder: Path) -> Path:
    single = folder / SINGLE
    if is_file(single):
        return single
    pickles = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
    if pickles:
        convertible = any(file.startswith("pytorch_model") and file.endswith(".bin") for file in pickles)
        raise ModelError(
            f"`{printable(str(folder))}` has no safetensors, only pickle (`{printable(pickles[0])}`)",
            hint="pickle can run code, and a merge never loads it; "
            + (_CONVERT if convertible else "look for a safetensors version of this model"),
        )
    raise ModelError(f"`{printable(str(folder))}` has neither {SINGLE} nor {INDEX}", COMPLETE)
