"""Our decoding of quantised weights against the libraries' own, bit for bit: `make test-quantised`.

    python tests/quantised/compare.py [PYTHON]

FP8 and MXFP4 against transformers' dequantising load on the CPU, here. bitsandbytes' and compressed-tensors' formats
against these libraries, in an environment of their own that is made from the package index (or is PYTHON's). GPTQ and
AWQ have no library that decodes on the CPU and can be installed: `make test` has them against their formulas. Ours is
float32, rounded to bfloat16. Ends with 1 if a bit differs.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent)]

import tiny  # noqa: E402
from quantising import FORMATS, is_packed, quantised  # noqa: E402

from lowmem_aim.models.quantised import open_model  # noqa: E402

OF_TRANSFORMERS = {
    "fp8 with one scale": FineGrainedFP8Config(dequantize=True),
    "fp8 in blocks": FineGrainedFP8Config(weight_block_size=(16, 8), dequantize=True),
    "mxfp4": Mxfp4Config(dequantize=True),
}


def differing(folder: Path, truth: dict[str, Tensor]) -> Iterator[str]:
    """Tell of each weight that differs from the truth, in bfloat16."""
    with open_model(folder) as model:
        for name, expected in truth.items():
            ours = model.tensor(name).to(torch.bfloat16)
            if ours.shape != expected.shape:
                yield f"`{name}` has the shape {list(ours.shape)}, there {list(expected.shape)}"
            elif count := int((_bits(ours) != _bits(expected)).sum()):
                yield f"`{name}`: {count} of {ours.numel()} elements differ"


def _bits(values: Tensor) -> Tensor:
    """The bits of bfloat16, but for the sign of zeros: FP4 of bitsandbytes has two codes for zero, and one value."""
    return torch.where(values == 0, torch.zeros_like(values), values).contiguous().view(torch.int16)


def by_transformers(work: Path) -> Iterator[tuple[str, int, list[str]]]:
    """(format, number of weights, what differs) for the formats that transformers decodes on the CPU."""
    for name, settings in OF_TRANSFORMERS.items():
        form = FORMATS[name]
        folder = work / name.replace(" ", "-")
        base = tiny.build(form.architecture, folder / "base", dtype=torch.bfloat16, **form.changes)
        quantised(form, base, folder / "model")
        loaded = AutoModelForCausalLM.from_pretrained(
            folder / "model", dtype=torch.bfloat16, quantization_config=settings
        )
        truth = {key: value for key, value in loaded.state_dict().items() if is_packed(form, key)}
        yield name, len(truth), list(differing(folder / "model", truth))


def by_others(work: Path, python: Path) -> Iterator[tuple[str, int, list[str]]]:
    """The same for the formats that other libraries have made and decoded."""
    made = work / "made"
    subprocess.run([str(python), str(HERE / "made_elsewhere.py"), str(made)], check=True)
    for folder in sorted(made.iterdir()):
        truth = load_file(folder / "truth.safetensors")
        (folder / "truth.safetensors").unlink()  # else the folder has weights that its config does not know
        yield folder.name, len(truth), list(differing(folder, truth))


def environment(work: Path) -> Path:
    """The Python of a new environment with the libraries."""
    subprocess.run([sys.executable, "-m", "venv", str(work / "env")], check=True)
    install = [str(work / "env" / "bin" / "pip"), "install", "--quiet", "-r", str(HERE / "requirements.txt")]
    subprocess.run(install, check=True)
    return work / "env" / "bin" / "python"


def main() -> int:
    transformers.utils.logging.set_verbosity_error()
    wrong = 0
    with tempfile.TemporaryDirectory(prefix="quantised-") as scratch:
        work = Path(scratch)
        python = Path(sys.argv[1]) if len(sys.argv) > 1 else environment(work)
        for results in (by_transformers(work), by_others(work, python)):
            for name, count, problems in results:
                wrong += bool(problems) or not count
                print(f"{name:48} {count:3} weights  {'; '.join(problems) or 'the same bits'}", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
