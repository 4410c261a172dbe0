"""The demo's merges, made as a user would make them: recipes in files, and commands in processes of their own."""

from __future__ import annotations

import os
import shlex
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from lowmem_aim.demo.models import CALIBRATION, Echo, Models
from lowmem_aim.errors import LowmemAimError
from lowmem_aim.relaxing.activations import Activations

OMEGA = 0.4  # the AIM authors' default
DENSITY = 0.5
ACTIVATIONS = "activations.safetensors"


def write_recipe(folder: Path, name: str, models: Models, *, aim: bool, control: str = "") -> str:
    """Write a TIES recipe to `folder`, with paths relative to it; returns the file's name.

    `control`: what takes the place of AIM's factors; "": AIM itself.
    """
    recipe: dict[str, Any] = {
        "merge_method": "ties",
        "base_model": f"./{models.base}",
        "models": [
            {"model": f"./{expert}", "parameters": {"weight": 1.0, "density": DENSITY}}
            for expert in models.experts.values()
        ],
        "dtype": "float32",
        "tokenizer_source": "base",
    }
    if aim:
        own = {"control": control} if control else {}
        recipe["aim"] = {"omega": OMEGA, "calibration": f"./{ACTIVATIONS}", **own}
    (folder / name).write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return name


def calibrate(folder: Path, models: Models, echo: Echo) -> None:
    """Measure the base's activations on the demo's texts, each by itself, with `lowmem-aim calibrate`."""
    (folder / ACTIVATIONS).unlink(missing_ok=True)
    texts = ["--calibration", CALIBRATION, "--no-pack"]
    command(folder, ["calibrate", models.base, "-o", ACTIVATIONS, *texts], echo)


def merge(folder: Path, recipe: str, out: str, echo: Echo) -> Path:
    """Merge by `recipe` into the folder `out`, which is the demo's to clear; returns its path."""
    shutil.rmtree(folder / out, ignore_errors=True)
    command(folder, ["merge", recipe, out], echo)
    return folder / out


def command(folder: Path, arguments: Sequence[str], echo: Echo) -> None:
    """Run `lowmem-aim` in `folder`, and echo the command. Raises LowmemAimError with its stderr if it fails."""
    echo(f"$ lowmem-aim {shlex.join(arguments)}")
    done = subprocess.run(
        [sys.executable, "-m", "lowmem_aim", *arguments, "--quiet"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        command = f"lowmem-aim {shlex.join(arguments)}"
        raise LowmemAimError(f"`{command}` failed: {done.stderr.strip()}", hint="run that command by itself to see why")


def peak(folder: Path) -> float:
    """The activity of a module's most active channel over that of its median one; the median over all modules."""
    means = [mean.flatten().float() for mean in Activations.load(folder / ACTIVATIONS).means.values()]
    return statistics.median(float(mean.max() / mean.median()) for mean in means)
