"""The files of a model folder: which of them hold tensors, and which are refused.

A model is model.safetensors, or the shards that model.safetensors.index.json names. Links out of the folder, names
with a path, pickle and quantised weights are each a ModelError.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from lowmem_aim.errors import LowmemAimError, ModelError, noted, printable, raise_all
from lowmem_aim.models.config import load_json
from lowmem_aim.models.headers import MAX_HEADER_BYTES, TensorInfo, read_header
from lowmem_aim.system.files import input_errors, is_file, open_regular

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CHAT_TEMPLATES = "additional_chat_templates"  # the one subfolder of a model folder that transformers reads
# What GPTQ and AWQ, bitsandbytes, FP8, compressed-tensors and MXFP4 store beside or in place of a weight.
QUANTISED = re.compile(
    r"\.(qweight|qzeros|g_idx|absmax|quant_map|SCB|weight_scale|weight_scale_inv|weight_packed)$"
    r"|\.quant_state\.|_proj_(blocks|scales)$"
)
READABLE = (".json", ".safetensors", ".model", ".txt", ".jinja")  # what we or transformers may open
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def _inside(folder: Path, file: Path) -> bool:
    """Whether `file`, links followed, lies in `folder` or in the blob store of the Hub cache that `folder` is in."""
    try:
        target = file.resolve()
    except (OSError, RuntimeError):  # a link that leads to itself
        return False
    if folder in target.parents:
        return True
    in_hub_cache = folder.parent.name == "snapshots"
    return in_hub_cache and target.parent == folder.parent.parent / "blobs"


def check_links(folder: Path) -> None:
    """Raise ModelError, all at once, for links out of the folder, and for pipes, devices and what cannot be opened.

    Only the files count that we or transformers may open. Raises OSError for a folder that cannot be listed.
    """
    files = [*sorted(folder.iterdir()), *sorted((folder / CHAT_TEMPLATES).glob("*"))]
    files = [file for file in files if file.suffix in READABLE or file.name == CHAT_TEMPLATES]
    outside = [file for file in files if file.is_symlink() and not _inside(folder, file)]
    errors: list[LowmemAimError] = []
    if outside:
        what = "is a link that leads out of its model folder"
        errors.append(ModelError([f"`{printable(str(file))}` {what}" for file in outside]))
    for file in (file for file in files if file not in outside and not file.is_dir()):
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


def _shard(folder: Path, name: Any) -> Path:
    """The path of a shard that an index names. Raises ModelError if its name is not plain, or the file is missing."""
    shown = printable(repr(name))
    if not _is_shard_name(name):
        what = "not a plain file name that ends in .safetensors"
        raise ModelError(f"`{printable(str(folder / INDEX))}` names the shard {shown}: {what}")
    file = folder / str(name)
    if not is_file(file):
        raise ModelError(f"`{printable(str(folder / INDEX))}` names the shard {shown}, which is missing")
    return file


def _weight_map(folder: Path) -> dict[str, Any] | None:
    """Tensor name -> shard name, from the index; None if the model is a single file."""
    if is_file(folder / SINGLE) or not is_file(folder / INDEX):
        return None
    index = load_json(folder / INDEX, MAX_HEADER_BYTES)
    table = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(table, dict) or not table:
        raise ModelError(f"`{printable(str(folder / INDEX))}` has no `weight_map`")
    return table


def tensors_in_folder(folder: Path) -> dict[str, TensorInfo]:
    """All tensors of the model, in file order. Raises ModelError with every problem of every shard."""
    weight_map = _weight_map(folder)
    if weight_map is None:
        return _usable(folder, read_header(_single_file(folder)))
    problems: list[str] = []
    tensors: dict[str, TensorInfo] = {}
    shards: dict[str, list[str]] = {}  # repr of the name in the index -> tensors
    for name, shard_name in weight_map.items():
        shards.setdefault(repr(shard_name), []).append(name)
    for shard_name, names in shards.items():
        try:
            shard = read_header(_shard(folder, weight_map[names[0]]))
        except ModelError as error:
            problems += error.problems
            continue
        missing = [name for name in names if name not in shard]
        problems += [
            f"shard {printable(shard_name)} of `{printable(str(folder))}` lacks `{printable(n)}`" for n in missing
        ]
        tensors |= {name: shard[name] for name in names if name in shard}
    if problems:
        raise ModelError(problems, hint="download the model again, or repair its index")
    return _usable(folder, tensors)


def _usable(folder: Path, tensors: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The tensors in file order. Raises ModelError if some are parts of quantised weights."""
    quantised = [name for name in tensors if QUANTISED.search(name)]
    if quantised:
        raise ModelError(
            f"`{printable(str(folder))}` is quantised (it holds `{printable(quantised[0])}`)",
            hint="merge the unquantised models, then quantise the result",
        )
    return _in_file_order(tensors)


def _in_file_order(tensors: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The tensors sorted by file and offset: reading them in order reads each file forward."""
    return {t.name: t for t in sorted(tensors.values(), key=lambda t: (t.file.name, t.begin, t.name))}


def _single_file(folder: Path) -> Path:
    single = folder / SINGLE
    if is_file(single):
        return single
    pickles = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
    if pickles:
        raise ModelError(
            f"`{printable(str(folder))}` has no safetensors, only pickle (`{printable(pickles[0])}`)",
            hint="pickle can run code and is never loaded; convert it once, where you trust it: "
            "`AutoModelForCausalLM.from_pretrained(folder)"
            ".save_pretrained(new_folder)` in Python, or look for a safetensors revision on the Hub",
        )
    raise ModelError(f"`{printable(str(folder))}` has neither {SINGLE} nor {INDEX}")
