"""Runs in mergekit's own environment: merges each recipe of a folder into a folder beside it, in one process."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path

import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge


def main(folder: Path) -> None:
    for recipe in sorted(folder.glob("*.yml")):
        out = recipe.with_suffix("")
        try:
            settings = MergeConfiguration.model_validate(yaml.safe_load(recipe.read_text()))
            options = MergeOptions(
                write_model_card=False,
                quiet=True,
                lora_merge_cache=str(folder / "merged-adapters"),
                lora_merge_dtype="float32",
            )
            run_merge(settings, str(out), options)
        except Exception:
            recipe.with_suffix(".error").write_text(traceback.format_exc())


main(Path(sys.argv[1]))
