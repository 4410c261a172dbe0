"""The commands that are compared: ours, mergekit's, and the two ways to calibrate."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from measure import Cost, cost_of
from models import EXPERTS

from lowmem_aim.methods.registry import METHODS as KNOWN

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
RAM = "1GB"
WEIGHTS = (1.0, 0.5, 0.3)
METHODS = ("linear", "task_arithmetic", "slerp", "dare_linear", "dare_ties", "ties")
FURTHER = tuple(name for name in KNOWN if name not in (*METHODS, "passthrough"))
# Two kinds of methods that mergekit wants the base among the models of.
BASE_LISTED = ("slerp", "nearswap", "arcee_fusion")
TOP = {"slerp": {"t": 0.4}, "nearswap": {"t": 0.001}, "sce": {"select_topk": 0.5}, "breadcrumbs_ties": {"gamma": 0.05}}
OMEGA = "0.4"


@dataclass(frozen=True)
class Setting:
    models: Path  # with base/ and expert-*/
    scratch: Path

    @property
    def experts(self) -> list[Path]:
        return [self.models / name for name in EXPERTS if (self.models / name).is_dir()]

    @property
    def base(self) -> Path:
        return self.models / "base"


def experts_of(method: str, setting: Setting) -> list[Path]:
    """As many as the method takes, three at most."""
    return setting.experts[: KNOWN[method].most]


def save_recipe(method: str, setting: Setting, texts: Path | None = None) -> Path:
    """mergekit's YAML, which both read; methods that run their experts on `texts` are not mergekit's."""
    known = KNOWN[method].parameters
    own = {"calibration": str(texts)} if texts and KNOWN[method].texts else {}
    models = []
    for expert, weight in zip(experts_of(method, setting), WEIGHTS, strict=False):
        values = {"weight": weight, "density": 0.5}
        parameters = {name: value for name, value in values.items() if name in known}
        models.append({"model": str(expert)} | own | ({"parameters": parameters} if parameters else {}))
    recipe: dict[str, Any] = {"merge_method": method, "models": models, "dtype": "bfloat16"}
    if method in BASE_LISTED:
        recipe["models"] = [{"model": str(setting.base)}, *models]
    if method in TOP:
        recipe["parameters"] = TOP[method]
    if KNOWN[method].base in ("required", "optional"):
        recipe["base_model"] = str(setting.base)
    file = setting.scratch / f"{method}.yml"
    file.write_text(yaml.safe_dump(recipe))
    return file


def ours(method: str, setting: Setting, activations: Path | None = None) -> Cost:
    recipe, out = save_recipe(method, setting), setting.scratch / "out-ours"
    aim = ["--calibration", str(activations), "--omega", OMEGA] if activations else []
    command = [sys.executable, "-m", "lowmem_aim", "merge", str(recipe), str(out), "--quiet", "--ram", RAM, *aim]
    return _cost(command, setting, out)


def mergekit(method: str, setting: Setting, tool: Path) -> Cost:
    recipe, out = save_recipe(method, setting), setting.scratch / "out-mergekit"
    return _cost([str(tool), str(recipe), str(out), "--quiet"], setting, out)


def disk(setting: Setting, models: list[Path], nbytes: int) -> Cost:
    files = [str(file) for model in models for file in sorted(model.glob("*.safetensors"))]
    out = setting.scratch / "out-disk"
    return _cost([sys.executable, str(HERE / "measure.py"), *files, str(out), str(nbytes)], setting, out)


def calibrate(setting: Setting, texts: Path, dtype: str, out: Path) -> Cost:
    command = [sys.executable, "-m", "lowmem_aim", "calibrate", str(setting.base), "-o", str(out), "--quiet"]
    flags = ["--calibration", str(texts), "--samples", "100000", "--calibration-dtype", dtype, "--ram", RAM]
    return _cost([*command, *flags], setting, None)


def whole_model_calibration(setting: Setting, texts: Path, dtype: str) -> Cost:
    script = str(HERE / "whole_model_calibration.py")
    return _cost([sys.executable, script, str(setting.base), str(texts), dtype], setting, None)


def _cost(command: list[str], setting: Setting, out: Path | None) -> Cost:
    if out is not None:
        subprocess.run(["rm", "-rf", str(out)], check=True)
    log = setting.scratch / "log.txt"
    cost = cost_of(command, log)
    if cost.exit_code:
        raise RuntimeError(f"{' '.join(command)} ended with {cost.exit_code}:\n{log.read_text()[-2000:]}")
    if out is not None:
        subprocess.run(["rm", "-rf", str(out)], check=True)
    return cost


def mergekit_version() -> str:
    """The one that is compared with."""
    lines = (HERE / "mergekit-requirements.txt").read_text().splitlines()
    return next(line.partition("==")[2] for line in lines if line.startswith("mergekit=="))


def install_mergekit(work: Path) -> Path | None:
    """The mergekit-yaml command, in an environment of its own; None if it cannot be installed."""
    folder = work / "mergekit-environment"
    tool = folder / "bin" / "mergekit-yaml"
    if not tool.is_file():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        install = [str(folder / "bin" / "pip"), "install", "--quiet", "-c", str(ROOT / "constraints.txt")]
        subprocess.run([*install, "-r", str(HERE / "mergekit-requirements.txt")], check=False)
    return tool if tool.is_file() else None
