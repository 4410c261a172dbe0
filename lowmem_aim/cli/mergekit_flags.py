"""The flags of mergekit 0.1.5's `mergekit-yaml`: what acts here, what is not needed and why, and what is refused.

Flags that have a name of ours as well (`--device`, `--quiet`, `--random-seed`, `-j`) are not among them.
"""

from __future__ import annotations

from collections.abc import Collection

GROUP = "mergekit's flags"  # in a command's help
_OVERLAPPING = "reading, computing and writing always overlap"
_ADAPTERS = "adapters are added to each slice as it is read"

# Flag -> what does the same.
ACTING = {
    "--cuda": "use `--device cuda`",
    "--no-cuda": "use `--device cpu`",
    "--gpu-rich": "use `--device cuda`",
    "--out-shard-size": "use `--shard-size`, in bytes, such as `--shard-size 5GB`",
    "--transformers-cache": "set HF_HUB_CACHE: models from the Hub are kept there",
}
# Flag without effect -> why nothing of the kind is needed; its `--no-` form has none either.
SWITCHES = {
    "--allow-crimes": "what does not fit together is refused, with the reason",
    "--trust-remote-code": "no code of a model is ever run",
    "--low-cpu-memory": "`--ram` limits the memory",
    "--lazy-unpickle": "only safetensors are read, and always in slices",
    "--read-to-gpu": "slices go to the GPU one by one",
    "--multi-gpu": "a merge runs on one GPU",
    "--async-write": _OVERLAPPING,
    "--copy-tokenizer": "the tokenizer is always copied",
    "--clone-tensors": "every tensor of the output is written separately",
    "--write-model-card": "the output always has a model card",
    "--safe-serialization": "the output is always safetensors",
    "--unsafe-truncate-embeddings": "embeddings are never cut",
}
# The same for flags that take a value, and the one that is counted.
VALUES = {"--lora-merge-cache": _ADAPTERS, "--lora-merge-dtype": _ADAPTERS, "--write-threads": _OVERLAPPING}
COUNTED = {"-v": "progress is always shown, and `--format json` prints every event"}
# Forms of the switches above that ask for what is not done -> (why not, what to do).
REFUSED = {
    "--no-safe-serialization": (
        "the output is always safetensors: a pickle can run code when it is loaded",
        "leave it out: whatever loads models reads safetensors",
    ),
    "--unsafe-truncate-embeddings": (
        "rows of embeddings are not cut off: rows of different tokens could be merged",
        "use `--tokenizer-source base`, which matches rows by the text of their tokens",
    ),
}
UNNEEDED = {**SWITCHES, **VALUES, **COUNTED}
NOTE = (
    f"Without effect here: {', '.join(flag for flag in UNNEEDED if flag not in REFUSED)}. "
    f"Refused: {', '.join(REFUSED)}. docs/from-mergekit.md says why."
)


def instead_of(flag: str) -> str:
    """The next step for a flag of mergekit's where it is not taken; empty if `flag` is none of them."""
    name = flag.replace("_", "-")
    if name in ACTING:
        return ACTING[name]
    if name in REFUSED:
        return REFUSED[name][1]
    why = UNNEEDED.get(name) or SWITCHES.get(name.replace("--no-", "--", 1))
    return f"leave it out: {why}" if why else ""


def told_of(flags: Collection[str]) -> str:
    """One line about flags without effect, as they were typed."""
    asked = {"--trust-remote-code"} & {*flags}  # whoever asks for it fears that the model does not load without
    listed = ", ".join(f"`{flag}`{f' ({SWITCHES[flag]})' if flag in asked else ''}" for flag in flags)
    return f"mergekit's flags that are not needed here: {listed}; docs/from-mergekit.md says why"
