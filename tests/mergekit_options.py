"""The options of mergekit 0.1.5's `mergekit-yaml`, as its help lists them: `make test-mergekit` compares."""

from __future__ import annotations

SWITCHES = (  # each with a `--no-` form
    "--allow-crimes",
    "--unsafe-truncate-embeddings",
    "--trust-remote-code",
    "--quiet",
    "--cuda",
    "--low-cpu-memory",
    "--lazy-unpickle",
    "--read-to-gpu",
    "--multi-gpu",
    "--async-write",
    "--copy-tokenizer",
    "--clone-tensors",
    "--write-model-card",
    "--safe-serialization",
)
ALONE = ("--gpu-rich", "-v")  # without a `--no-` form
VALUES = {  # with a value that each takes
    "--transformers-cache": "models",
    "--lora-merge-cache": "adapters",
    "--lora-merge-dtype": "float32",
    "--random-seed": "7",
    "--device": "cpu",
    "--num-threads": "2",
    "-j": "2",
    "--write-threads": "2",
    "--out-shard-size": "2B",
}


def words() -> list[tuple[str, ...]]:
    """Each option as it is typed, in each of its forms."""
    switches = [(form,) for flag in SWITCHES for form in (flag, f"--no-{flag[2:]}")]
    return [*switches, *((flag,) for flag in ALONE), *VALUES.items()]
