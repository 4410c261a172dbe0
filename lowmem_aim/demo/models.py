"""The demo's models as ordinary checkpoint folders: made whole or not at all, reused if the settings are the same."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from lowmem_aim.demo.folder import own
from lowmem_aim.demo.settings import Settings
from lowmem_aim.demo.skills import SKILLS, mixture
from lowmem_aim.demo.tokenizer import build_tokenizer
from lowmem_aim.demo.train import expert_shares, new_model, reproducible, train
from lowmem_aim.system.files import write_file

Echo = Callable[[str], None]
FINISHED = "models.json"  # written last; holds the digest of the settings that the models were made with
CALIBRATION = "calibration.jsonl"


@dataclass(frozen=True)
class Models:
    """The names of the models' folders inside the demo's folder."""

    base: str
    experts: dict[str, str]  # skill -> folder


MODELS = Models("base", {skill: f"expert-{skill}" for skill in SKILLS})


def make(folder: Path, settings: Settings, echo: Echo) -> Models:
    """Train the base and the experts into `folder`, or reuse them if they are there. Raises UsageError as `own`."""
    own(folder)
    digest = settings.digest()  # before the training: sources edited meanwhile are not what it was made with
    if _made_with(folder) == digest:
        echo(f"models of an earlier run are reused: {folder}")
        return MODELS
    (folder / FINISHED).unlink(missing_ok=True)
    begun = time.monotonic()
    with reproducible(settings.seed, settings.threads):
        _train_all(folder, settings, echo)
    echo(f"training took {time.monotonic() - begun:.0f} s")
    write_file(folder / FINISHED, json.dumps({"digest": digest}).encode())
    return MODELS


def _made_with(folder: Path) -> str | None:
    try:
        digest = json.loads((folder / FINISHED).read_text(encoding="utf-8"))["digest"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return str(digest)


def _train_all(folder: Path, settings: Settings, echo: Echo) -> None:
    tokenizer = build_tokenizer(SKILLS)
    shares = dict.fromkeys(SKILLS, 1.0)
    base = new_model(settings, tokenizer)
    echo(
        f"training the base on {', '.join(SKILLS)}: {sum(p.numel() for p in base.parameters()) / 1e6:.2f} M parameters"
    )
    train(base, tokenizer, shares, settings.base, Random(f"base {settings.seed}"), echo)
    _save(base, tokenizer, folder / MODELS.base, settings)
    start = {name: value.clone() for name, value in base.state_dict().items()}
    for skill, name in MODELS.experts.items():
        echo(f"fine-tuning an expert on {skill}")
        base.load_state_dict(start)
        random = Random(f"expert {skill} {settings.seed}")
        train(base, tokenizer, expert_shares(skill, settings), settings.expert, random, echo)
        _save(base, tokenizer, folder / name, settings)
    texts = mixture(shares, settings.calibration_texts, Random(f"calibration {settings.seed}"))
    lines = "".join(json.dumps({"text": example.text}) + "\n" for example in texts)
    write_file(folder / CALIBRATION, lines.encode())


def _save(model: Any, tokenizer: Any, folder: Path, settings: Settings) -> None:
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial, max_shard_size=settings.shard_size)
    tokenizer.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
