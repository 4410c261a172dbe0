"""mergekit's flags that this tool does not have, and what to do instead."""

from __future__ import annotations

_LAZY = "leave it out: tensors are always read in slices, as they are needed"
_STREAMED = "leave it out: `--ram` limits the memory in use"
_COPIED = "leave it out: the tokenizer is always copied"
_CACHE = "set HF_HOME: models from the Hub are kept there"
_ADAPTER = "leave it out: an adapter is added as its model is read, and nothing is merged on disk"
_GPU = "use `--device cuda`"

# Flag -> the next step.
INSTEAD = {
    "--cuda": _GPU,
    "--read-to-gpu": _GPU,
    "--multi-gpu": "use `--device cuda:0`: a merge runs on one GPU",
    "--low-cpu-memory": _STREAMED,
    "--gpu-rich": _GPU,
    "--out-shard-size": "use `--shard-size`, in bytes, such as `--shard-size 5GB`",
    "--copy-tokenizer": _COPIED,
    "--allow-crimes": "leave it out: what does not fit together is refused, with its reason",
    "--lazy-unpickle": "leave it out: only safetensors are read, and always in slices",
    "--lazy-loader": _LAZY,
    "--trust-remote-code": "leave it out: model code is never run, and models that need it are refused",
    "--clone-tensors": "leave it out: each tensor is written once",
    "--safe-serialization": "leave it out: the output is always safetensors",
    "--write-model-card": "leave it out: the output always has a model card",
    "--async-write": "leave it out: reading, computing and writing always overlap",
    "--write-threads": "leave it out: reading, computing and writing always overlap",
    "--num-threads": "use `--threads`",
    "--verbose": "leave it out: progress is always shown; `--json` prints every event",
    "--transformers-cache": _CACHE,
    "--lora-merge-cache": _ADAPTER,
    "--lora-merge-dtype": _ADAPTER,
}


def instead_of(flag: str) -> str:
    """The next step for a flag of mergekit's, also in its `--no-` form; empty if `flag` is none of them."""
    name = flag.replace("_", "-")
    if name.startswith("--no-") and name.removeprefix("--no-") in {known[2:] for known in INSTEAD}:
        return "leave it out: it would change nothing here"
    return INSTEAD.get(name, "")
