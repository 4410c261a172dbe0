"""Files in a finished output that the run did not write: what a loader would read of them, and what is harmless.

Loaders look for names, not for what a folder was made of: transformers takes `model.safetensors` before an index,
vLLM `consolidated*.safetensors` and `params.json`, PEFT `adapter_config.json`. A file of such a name beside an output
makes another model of it, though every file of the output is as it was written.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

from lowmem_aim.models.folder import CHAT_TEMPLATES
from lowmem_aim.models.known_files import LEGAL, READ_BY_LOADERS, fits
from lowmem_aim.output.folder import PRIVATE

# What would make another model of the folder. Pickles (`*.bin`) are none: beside safetensors no loader takes them, and
# `training_args.bin` is no weights at all.
TAKEN_FOR_THE_MODEL = (
    *READ_BY_LOADERS,
    "*.safetensors",
    "*.safetensors.index.json",
    "adapter_config.json",
    "params.json",
    "config*.json",
    "tokenizer*",
    "vocab.*",
    "chat_template*",
    CHAT_TEMPLATES,
    "1_*",
    "*.py",
)
# What people put beside a model, and no loader of a folder reads.
HARMLESS = (
    "*.md",
    "*.gguf",
    "*.png",
    "*.jpg",
    "*.jpeg",
    "*.gif",
    "*.svg",
    "*.webp",
    "*.pdf",
    "*.yml",
    "*.yaml",
    *LEGAL,
    ".*",  # .git, .gitattributes, .cache
)


def strays_in(out: Path, known: Collection[str]) -> tuple[list[str], list[str]]:
    """(names that a loader would read, names of unknown use) of what lies in `out` beside the `known` files.

    Raises OSError if the folder cannot be read.
    """
    read, unknown = [], []
    for name in sorted(_unknown(out, known)):
        base = name.rpartition("/")[2]
        if "/" in name or fits(base, TAKEN_FOR_THE_MODEL):  # in a folder of the output's own, everything may be read
            read.append(name)
        elif not fits(base, HARMLESS):
            unknown.append(name)
    return read, unknown


def _unknown(out: Path, known: Collection[str]) -> Iterator[str]:
    """The names in `out`, and in the folders that the run made in it, that are not known."""
    folders = {name.partition("/")[0] for name in known if "/" in name} - {PRIVATE}
    for entry in out.iterdir():
        if entry.name in folders and entry.is_dir() and not entry.is_symlink():
            names = [f"{entry.name}/{file.name}" for file in entry.iterdir() if not file.name.startswith(".")]
            yield from (name for name in names if name not in known)
        elif entry.name not in known and entry.name != PRIVATE:
            yield entry.name
