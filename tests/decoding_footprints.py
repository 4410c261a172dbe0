"""A program: the memory that decoding quantised rows really takes, and what it declares, as lines of JSON.

    python tests/decoding_footprints.py FOLDER FORMAT ...

Files are read, not mapped: pages of files are no memory of a process's own. Run it in an environment with
MALLOC_MMAP_THRESHOLD_=65536, so that what is freed goes back to the system at once.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from footprints import taken
from quantising import FORMATS
from safetensors.torch import save_file

from lowmem_aim.models.quantised import open_model

SHAPE, OF_EXPERTS = (1024, 2048), (2, 1024, 2048)


def main() -> None:
    torch.set_num_threads(1)
    for number, name in enumerate(sys.argv[2:]):
        for line in measured(name, Path(sys.argv[1]) / str(number)):
            print(json.dumps(line), flush=True)


def measured(name: str, folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the figures of decoding one row, and many."""
    form, experts = FORMATS[name], name == "mxfp4"
    weight = "experts.down_proj" if experts else "x.weight"
    stored = form.store(weight, torch.randn(OF_EXPERTS if experts else SHAPE), torch.Generator()).tensors
    folder.mkdir()
    save_file({part: value.contiguous() for part, value in stored.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": dict(form.settings)}))
    del stored
    with open_model(folder, read="pread") as model:
        model.warm_up()
        for count in (1, 512):
            model.rows(weight, 0, 1)
            rows, own = taken(functools.partial(model.rows, weight, 256, 256 + count))
            limit = (model.footprint.element + 4) * rows.numel() + model.footprint.tensor
            yield {"format": name, "rows": count, "taken": own, "limit": limit}
            del rows


if __name__ == "__main__":
    main()
