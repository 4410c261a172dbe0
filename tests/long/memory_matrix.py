"""Whether an accepted `--ram` is kept, by every method: each merge in a process of its own, its peak and its budget.

    python tests/long/memory_matrix.py [--only PART ...] [--write]

The models are a base and two experts with one tensor of 200,000 x 512 in bfloat16 (an embedding, beside ten small
tensors). Every method merges them with the smallest budget that is accepted and with 600 MB, with mapped files and with
`pread`; with an empty numba cache; then come tensors of 200,000 columns, 300 small tensors, ACM and a calibration, and
experts and a base with adapters. The smallest budget is the one that the refusal of 1 MB names: it must be accepted.
Peaks are of anonymous memory, as the tool counts it, looked at every 2 ms.

`--write` puts the table into docs/performance.md. Exit code 1: a peak exceeds its budget, or a run has failed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import adapters
import tiny
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[2]

PAGE = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- memory:begin -->", "<!-- memory:end -->"
MB = 10**6
LOOK_SECONDS = 0.002
REFUSED = 5

SPARSE = ("--weight", "0.3", "--density", "0.4")
RESCALED = (*SPARSE, "-p", "rescale=true")
# Of each method the parameters with which it makes the most rounds.
FLAGS: dict[str, tuple[str, ...]] = {
    "arcee_fusion": (),
    "breadcrumbs": RESCALED,
    "breadcrumbs_ties": RESCALED,
    "dare_linear": SPARSE,
    "dare_ties": SPARSE,
    "della": SPARSE,
    "della_linear": SPARSE,
    "karcher": (),
    "linear": ("--weight", "0.5"),
    "model_stock": (),
    "multislerp": ("--weight", "0.5"),
    "nearswap": ("-p", "t=0.001"),
    "nuslerp": ("--weight", "0.5"),
    "passthrough": (),
    "ram": (),
    "ramplus_tl": (),
    "sce": ("-p", "select_topk=0.3"),
    "slerp": ("-p", "t=0.4"),
    "task_arithmetic": ("--weight", "0.3"),
    "ties": RESCALED,
    "widen": (),
}
ONE_EXPERT = ("arcee_fusion", "nearswap", "passthrough", "slerp")
NAMED = ("arcee_fusion", "widen", "ties", "breadcrumbs_ties", "sce", "della")
BY_COLUMN = {"widen": (), "nuslerp": ("-p", "nuslerp_flatten=false", "-p", "nuslerp_row_wise=true", "--weight", "0.5")}
ACM = """
merge_method: task_arithmetic
base_model: FOLDER/base
models:
  - {model: FOLDER/one, parameters: {weight: 0.3}}
  - {model: FOLDER/two, parameters: {weight: 0.3}}
acm: {calibration: builtin, samples: 4}
"""
PARTS = ("tall", "600", "cold", "named", "columns", "small", "models", "adapted")
ADAPTER_RANK = 64


@dataclass(frozen=True)
class Shapes:
    """A Llama with a tied head."""

    rows: int  # of its embedding
    hidden: int
    inner: int
    layers: int = 1
    runs: bool = False  # it has a tokenizer, so that texts can be run through it


MODELS = {
    "200,000 x 512": Shapes(200_000, 512, 64),
    "64 x 200,000": Shapes(256, 64, 200_000),
    "300 small tensors": Shapes(256, 64, 128, layers=33),
    "1 layer of 512": Shapes(1000, 512, 2048, runs=True),
}
TALL, WIDE, SMALL, LAYER = MODELS


@dataclass(frozen=True)
class Case:
    part: str
    method: str
    model: str
    budget: int | None = None  # MB; None: the smallest that is accepted
    read: str = "mmap"
    cold: bool = False  # numba's cache is empty
    flags: tuple[str, ...] = ()
    recipe: str = ""  # instead of flags
    adapter: str = ""  # of the experts, or of the base that is calibrated: `lora` or `dora`


@dataclass(frozen=True)
class Peak:
    case: Case
    budget: int  # MB
    peak: int  # MB
    seconds: float
    wrong: str = ""

    @property
    def kept(self) -> bool:
        return not self.wrong and self.peak <= self.budget


def cases() -> Iterator[Case]:
    for part, budget in (("tall", None), ("600", 600)):
        for read in ("mmap", "pread"):
            for method, flags in FLAGS.items():
                yield Case(part, method, TALL, budget, read, flags=flags)
    for method in NAMED:
        for budget in (300, 1000):
            yield Case("named", method, TALL, budget, flags=FLAGS[method])
    for method, flags in BY_COLUMN.items():
        for read in ("mmap", "pread"):
            yield Case("columns", method, WIDE, None, read, flags=flags)
    for method, flags in FLAGS.items():
        yield Case("small", method, SMALL, flags=flags)
    few = ("--samples", "4", "--block-size", "64", "--calibration", "builtin")
    yield Case("models", "calibrate", LAYER, flags=few)
    texts = ("--no-cache", *few)
    yield Case("models", "task_arithmetic + AIM", LAYER, flags=("--weight", "0.3", "--omega", "0.4", *texts))
    yield Case("models", "task_arithmetic + ACM", LAYER, recipe=ACM)
    yield Case("models", "ties + AIM", LAYER, flags=(*RESCALED, "--omega", "0.4", *texts))
    for adapter in ("lora", "dora"):
        for read in ("mmap", "pread"):
            for model, method in ((TALL, "linear"), (TALL, "ties"), (WIDE, "ties"), (SMALL, "dare_ties")):
                yield Case("adapted", f"{method} + {adapter}", model, None, read, flags=FLAGS[method], adapter=adapter)
            yield Case("adapted", f"calibrate + {adapter}", LAYER, None, read, flags=few, adapter=adapter)
    for method, flags in FLAGS.items():
        yield Case("cold", method, TALL, cold=True, flags=flags)


# --- models -----------------------------------------------------------------------------------------------------------


def build(folder: Path, shapes: Shapes) -> None:
    random = torch.Generator().manual_seed(1)
    base = {name: torch.randn(shape, generator=random) * 0.02 for name, shape in _tensors(shapes)}
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": shapes.hidden,
        "num_hidden_layers": shapes.layers,
        "vocab_size": shapes.rows,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "intermediate_size": shapes.inner,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    for name in ("base", "one", "two"):
        own = folder / name
        own.mkdir(parents=True)
        tuned = 0.0 if name == "base" else 0.002
        models = {key: (w + tuned * torch.randn(w.shape, generator=random)).bfloat16() for key, w in base.items()}
        save_file(models, own / "model.safetensors", metadata={"format": "pt"})
        (own / "config.json").write_text(json.dumps(config))
        if shapes.runs:
            tiny.tokenizer().save_pretrained(own)
    _build_adapters(folder, base)


def _build_adapters(folder: Path, base: dict[str, torch.Tensor]) -> None:
    """A LoRA and a DoRA of the embedding and of every linear."""
    matrices = {name.removesuffix(".weight"): value for name, value in base.items() if value.dim() == 2}
    tensors, magnitudes = {}, {}
    for module, value in matrices.items():
        out, width = value.shape if "embed" not in module else value.shape[::-1]
        names = ("lora_embedding_A", "lora_embedding_B") if "embed" in module else ("lora_A.weight", "lora_B.weight")
        for name, shape in zip(names, ((ADAPTER_RANK, width), (out, ADAPTER_RANK)), strict=True):
            tensors[f"{module}.{name}"] = (torch.randn(shape) * 0.02).bfloat16()
        magnitudes[f"{module}.lora_magnitude_vector"] = torch.ones(out)
    adapters.write(folder / "lora", tensors, r=ADAPTER_RANK)
    adapters.write(folder / "dora", tensors | magnitudes, r=ADAPTER_RANK, use_dora=True)


def _tensors(shapes: Shapes) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, inner = shapes.hidden, shapes.inner
    yield "model.embed_tokens.weight", (shapes.rows, hidden)
    yield "model.norm.weight", (hidden,)
    for layer in range(shapes.layers):
        front = f"model.layers.{layer}."
        for letter in "qkvo":
            yield f"{front}self_attn.{letter}_proj.weight", (hidden, hidden)
        for name in ("gate", "up"):
            yield f"{front}mlp.{name}_proj.weight", (inner, hidden)
        yield f"{front}mlp.down_proj.weight", (hidden, inner)
        for name in ("input", "post_attention"):
            yield f"{front}{name}_layernorm.weight", (hidden,)


# --- runs -------------------------------------------------------------------------------------------------------------


@dataclass
class Bench:
    """The folder with models and outputs, and the environment of the runs."""

    work: Path
    environment: dict[str, str] = field(default_factory=dict)

    def models(self, model: str) -> Path:
        folder = self.work / re.sub(r"\W+", "-", model)
        if not folder.exists():
            build(folder, MODELS[model])
        return folder

    def command(self, case: Case, budget: int) -> list[str]:
        models, method = self.models(case.model), case.method.split(" ")[0]
        adapter = f"+{models / case.adapter}" if case.adapter else ""
        if case.recipe:
            recipe = self.work / "recipe.yml"
            recipe.write_text(case.recipe.replace("FOLDER", str(models)))
            tool = [sys.executable, "-m", "lowmem_aim", "merge", str(recipe)]
            return [*tool, "--no-cache", "--ram", f"{budget}MB", "--read", case.read, "-q", str(self.work / "out")]
        if method == "calibrate":
            tool = [sys.executable, "-m", "lowmem_aim", "calibrate", str(models / "base") + adapter]
            made = ["-o", str(self.work / "out" / "activations.safetensors")]
            return [*tool, *made, *case.flags, "--ram", f"{budget}MB", "--read", case.read, "-q"]
        experts = ("one",) if method in ONE_EXPERT else ("one", "two")
        chosen = [part for name in experts for part in ("--expert", str(models / name) + adapter)]
        tool = [sys.executable, "-m", "lowmem_aim", "merge", "--method", method, "--base", str(models / "base")]
        budgets = ["--ram", f"{budget}MB", "--read", case.read, "-q"]
        return [*tool, *chosen, *case.flags, *budgets, str(self.work / "out")]

    def run(self, case: Case, budget: int) -> tuple[int, int, str]:
        """The exit code, the peak in MB, rounded up, and what the run said."""
        shutil.rmtree(self.work / "out", ignore_errors=True)
        if case.method.split(" ")[0] == "calibrate":
            (self.work / "out").mkdir()
        environment = {**os.environ, **self.environment}
        if case.cold:
            cold = self.work / "cold"
            shutil.rmtree(cold, ignore_errors=True)
            environment["NUMBA_CACHE_DIR"] = str(cold)
        peak, log = 0, self.work / "log.txt"
        with log.open("w") as stream:
            process = subprocess.Popen(self.command(case, budget), stdout=stream, stderr=stream, env=environment)
            while process.poll() is None:
                peak = max(peak, _anonymous(process.pid))
                time.sleep(LOOK_SECONDS)
        return process.returncode, -(-peak // MB), log.read_text()

    def smallest(self, case: Case) -> int:
        """The budget in MB that a refusal names; unless the case is without a cache, that of a second one.

        The first refusal compiles the loops, which takes some 40 MB more.
        """
        code, _, said = self.run(case, 1)
        if not case.cold:
            code, _, said = self.run(case, 1)
        named = [int(number) for number in re.findall(r"`--ram (\d+)MB`", said)]
        if code != REFUSED or not named:
            raise RuntimeError(f"a budget of 1 MB ends with {code}: {said}")
        return max(named)

    def measured(self, case: Case) -> Peak:
        begun = time.monotonic()
        try:
            budget = self.smallest(case) if case.budget is None else case.budget
            begun = time.monotonic()
            code, peak, said = self.run(case, budget)
        except RuntimeError as error:
            return Peak(case, case.budget or 0, 0, 0.0, str(error))
        wrong = "" if code == 0 else f"exit {code}: {said[-300:]}"
        return Peak(case, budget, peak, round(time.monotonic() - begun, 1), wrong)


def _anonymous(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    return int(found[1]) * 1024 if found else 0


# --- the table --------------------------------------------------------------------------------------------------------


def table(peaks: Sequence[Peak]) -> str:
    """One line a method and model: `peak of budget` for each kind of run, in MB."""
    columns = list(dict.fromkeys(_column(peak.case) for peak in peaks))
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for peak in peaks:
        cell = f"{peak.peak} of {peak.budget}" if peak.kept else f"**{peak.peak} of {peak.budget}**"
        rows.setdefault((peak.case.method, peak.case.model), {})[_column(peak.case)] = cell
    lines = ["| method | model | " + " | ".join(columns) + " |", "|" + "---|" * (len(columns) + 2)]
    for (method, model), cells in rows.items():
        lines.append(f"| {method} | {model} | " + " | ".join(cells.get(name, "-") for name in columns) + " |")
    return "\n".join(lines)


def _column(case: Case) -> str:
    size = "smallest" if case.budget is None else f"{case.budget} MB"
    return f"{size}, no cache" if case.cold else f"{size}, {case.read}"


def write(text: str) -> None:
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts of the matrix")
    parser.add_argument("--methods", nargs="+", help="only these")
    parser.add_argument("--write", action="store_true", help="put the table into docs/performance.md")
    parser.add_argument("--work", type=Path, help="where models, outputs and peaks.jsonl go, and stay")
    parser.add_argument("--again", type=Path, nargs="+", help="only the table, from these peaks.jsonl")
    asked = parser.parse_args()
    if asked.again:
        return _report([_parsed(line) for file in asked.again for line in file.read_text().splitlines()], asked.write)
    work = asked.work or Path(tempfile.mkdtemp(prefix="memory-matrix-"))
    work.mkdir(parents=True, exist_ok=True)
    bench = Bench(work, {"NUMBA_CACHE_DIR": str(work / "numba"), "XDG_CACHE_HOME": str(work / "cache")})
    wanted = [c for c in cases() if c.part in asked.only and (not asked.methods or c.method in asked.methods)]
    for model in dict.fromkeys(case.model for case in wanted):  # the structure of each model is cached
        bench.run(Case("warm", "linear", model, flags=FLAGS["linear"]), 4000)
    peaks = [_told(bench.measured(case), work / "peaks.jsonl") for case in wanted]
    if asked.work is None:
        shutil.rmtree(work)
    return _report(peaks, asked.write)


def _report(peaks: Sequence[Peak], into_page: bool) -> int:
    text = table(peaks)
    print(text)
    if into_page:
        write(text)
    return int(not all(peak.kept for peak in peaks))


def _parsed(line: str) -> Peak:
    fields = json.loads(line)
    case = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.pop("case").items()}
    return Peak(Case(**case), **fields)


def _told(peak: Peak, log: Path) -> Peak:
    with log.open("a") as stream:
        stream.write(json.dumps(asdict(peak)) + "\n")
    case, verdict = peak.case, "" if peak.kept else f"  EXCEEDED {peak.wrong}"
    told = f"{case.method}, {case.model}, {_column(case)}: {peak.peak} of {peak.budget} MB, {peak.seconds} s{verdict}"
    print(told, file=sys.stderr, flush=True)
    return peak


if __name__ == "__main__":
    sys.exit(main())
