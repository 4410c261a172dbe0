"""Files in a finished output that the run did not write: what a loader would read of them, and what is harmless.

Loaders look for names, not for what a folder was made of: transformers takes `model.safetensors` before an index,
vLLM `consolidated*.safetensors` and `params.json`, PEFT `adapter_config.json`. A file of such a name beside an output
makes another model of it, though every file of the output is as it was written.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Collection
from pathlib import Path

from lowmem_aim.output.folder import PRIVATE

# What transformers, vLLM, PEFT or sentence-transformers would read as a part of the model. Pickles (`*.bin`) are none:
# beside safetensors no loader takes them, and `training_args.bin` is no weights at all.
READ_BY_LOADERS = (
    "*.safetensors",
    "*.safetensors.index.json",
    "adapter_config.json",
    "params.json",
    "config*.json",
    "generation_config.json",
    "tokenizer*",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "additional_chat_templates",
    "*processor_config.json",
    "modules.json",
    "sentence_*config.json",
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
    "license*",
    "notice*",
    ".*",  # .git, .gitattributes, .cache
)


def strays_in(out: Path, known: Collection[str]) -> tuple[list[str], list[str]]:
    """(names that a loader would read, names of unknown use) of what lies in `out` beside the `known` files.

    Raises OSError if the folder cannot be read.
    """
    read, unknown = [], []
    for name in sorted(entry.name for entry in out.iterdir()):
        if name in known or name == PRIVATE:
            continue
        if _fits(name, READ_BY_LOADERS):
            read.append(name)
        elif not _fits(name, HARMLESS):
            unknown.append(name)
    return read, unknown


def _fits(name: str, patterns: Collection[str]) -> bool:
    return any(fnmatch.fnmatchcase(name.lower(), pattern) for pattern in patterns)
