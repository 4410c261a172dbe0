"""Everything that is promised of a GPU, checked on one: `make gpu-check`, or

    python tests/bench/gpu_check.py [--vram 24GB] [--ram 8GB] [--layers N] [--device cuda:1]

Builds synthetic checkpoints of Llama-2-13B's shapes (as many layers as the disk has room for), calibrates the base and
merges under the two budgets, and checks that

    - the peaks of VRAM and of anonymous memory stay below the budgets,
    - calibrating within the smallest budget that is accepted gives the same bytes as within the large one,
    - a merge on the device equals the CPU's to one unit in the last place of bfloat16 (where a threshold decides, a few
      elements may fall either way), as do the activations to a relative 1e-2,
    - of a layer or two, the deltas that methods solve for on the device are near the CPU's,
    - a merge that is killed half-way ends, by the same command, with the same bytes.

Prints a table for docs/performance.md; exits with 1 if a check failed.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from lowmem_aim.units import bytes_of, counted

sys.path.insert(0, str(Path(__file__).parent))

import contenders
import measure
from contenders import OMEGA, Setting, save_recipe
from measure import Cost, cost_of, digests
from models import SCALES, build, model_bytes, save_texts

METHODS = ("task_arithmetic", "slerp", "dare_linear", "dare_ties", "ties")
# Methods that solve: how far the deltas of device and CPU may be apart, relatively. Matrix products are rounded in
# another order, and the forwards of `regmean` in bfloat16 with them. RegMean++ has its texts pass a merged layer.
SOLVING = {"covariance": 1e-2, "regmean": 5e-2, "regmean_plus": 1e-1}
LAYERS = {"covariance": 1, "regmean": 1, "regmean_plus": 2}
COMPARING = ("dare_ties", "ties")  # magnitudes, or signs of sums: within 1e-6 an element may fall either way
MAY_FALL_OTHERWISE = 1e-4  # share of elements
ACTIVATIONS_APART = 1e-2  # relative: matrix products in bfloat16 are rounded in another order
SPARE_DISK = 0.8
COPY_BYTES = 1 << 28
TOO_LITTLE = "300MB"
DRIVER_BYTES = 1 << 30  # a process's context at most: in the device's own count, not in the budget
SAMPLE_SECONDS = 0.05
KILL_AFTER = 0.7  # of the time it takes: the first part of that is imports
BLOCK_TOKENS = 512


@dataclass
class Check:
    """The rows of the table, and what did not hold."""

    rows: list[tuple[str, str, bool | None]] = field(default_factory=list)

    def note(self, what: str, value: str, good: bool | None = None) -> None:
        self.rows.append((what, value, good))
        print(f"{what}: {value}{'' if good is None else ' ok' if good else ' FAILED'}", flush=True)

    @property
    def failed(self) -> bool:
        return any(good is False for _, _, good in self.rows)

    def table(self) -> Iterator[str]:
        yield "| | | |"
        yield "|---|---|---|"
        for what, value, good in self.rows:
            yield f"| {what} | {value} | {'' if good is None else 'ok' if good else 'failed'} |"


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("gpu-check needs a CUDA device; there is none here", file=sys.stderr)
        return 1
    if device.type == "cpu":
        measure.PATIENCE_SECONDS = 0  # a rehearsal's times say nothing: it need not wait for a quiet machine
    options.work.mkdir(parents=True, exist_ok=True)
    work = options.work.resolve()
    layers = options.layers or _layers_for(work, options.scale)
    setting = Setting(build(options.scale, work, layers), work)
    check = Check()
    check.note("device", torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU (a rehearsal)")
    check.note("model", f"{options.scale}, {layers} layers, {_gb(model_bytes(setting.base))} a model, base + 3 experts")
    _rates(check, setting, device)
    activations = _calibration(check, setting, device, options)
    _tight(check, setting, activations, device, options)
    _agreement(check, setting, device, options)
    for method in options.methods:
        _merge(check, setting, method, activations, device, options)
    for method in options.solving:
        _solved(check, setting, method, device, options)
    _killed(check, setting, activations, device, options)
    print("\n".join(("", *check.table())))
    return int(check.failed)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--ram", default="8GB")
    parser.add_argument("--vram", default="24GB")
    parser.add_argument("--scale", choices=SCALES, default="13b")
    parser.add_argument("--layers", type=int, help="default: as many of the scale's as the disk has room for")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--solving", nargs="*", choices=SOLVING, default=list(SOLVING))
    parser.add_argument("--blocks", type=int, default=121, help="of 512 tokens to calibrate with")
    parser.add_argument("--block-size", type=int, default=BLOCK_TOKENS)
    parser.add_argument("--work", type=Path, default=Path("gpu-check-run"))
    return parser.parse_args(arguments)


def _layers_for(work: Path, scale: str) -> int:
    """Base, three experts and two outputs of so many layers fit the disk; what earlier checks have built counts too."""
    shape = SCALES[scale]
    built = sum(file.stat().st_size for file in work.rglob("*") if file.is_file())
    free = (shutil.disk_usage(work).free + built) * SPARE_DISK
    sizes = [shape.nbytes(layers) * 6 for layers in range(1, shape.layers + 1)]
    fitting = sum(size <= free for size in sizes)
    if not fitting:
        raise SystemExit(f"one layer of {scale} needs {_gb(sizes[0])} of disk; {_gb(int(free))} may be used")
    return fitting


# --- what the machine can do ------------------------------------------------------------------------------------------


def _rates(check: Check, setting: Setting, device: torch.device) -> None:
    size = model_bytes(setting.base)
    cost = contenders.disk(setting, [setting.base, *setting.experts], size)
    check.note("disk: inputs read, output written with fsync", f"{_rate(5 * size, cost.wall)}")
    if device.type != "cuda":
        return
    host = torch.empty(COPY_BYTES, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    for name, copy in (("host to device", lambda: there.copy_(host)), ("device to host", lambda: host.copy_(there))):
        check.note(f"copies, pinned, {name}", _rate(COPY_BYTES, _seconds(copy, device)))


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    work()
    torch.cuda.synchronize(device)
    started = time.monotonic()
    for _ in range(8):
        work()
    torch.cuda.synchronize(device)
    return (time.monotonic() - started) / 8


# --- runs under the budgets -------------------------------------------------------------------------------------------


class Vram:
    """The peak of what others than this process take of a device's memory, sampled. A context manager."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample)

    def _used(self) -> int:
        free, total = torch.cuda.mem_get_info(self._device)
        return int(total - free)

    def _sample(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            self.peak = max(self.peak, self._used() - self._before)

    def __enter__(self) -> Vram:
        if self._device.type == "cuda":
            self._before = self._used()
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()


def _run(
    check: Check, what: str, command: list[str], setting: Setting, device: torch.device, o: argparse.Namespace
) -> Cost:
    log = setting.scratch / "log.txt"
    budgets = ["--ram", o.ram, *(["--vram", o.vram] if device.type == "cuda" else [])]
    full = [sys.executable, "-m", "lowmem_aim", *command, "--quiet", "--device", o.device, *budgets]
    with Vram(device) as vram:
        cost = cost_of(full, log)
    if cost.exit_code:
        raise SystemExit(f"{' '.join(full)} ended with {cost.exit_code}:\n{log.read_text()[-2000:]}")
    check.note(f"{what}: peak anonymous memory", _gb(cost.anonymous), cost.anonymous <= bytes_of(o.ram))
    if device.type == "cuda":
        within = vram.peak <= bytes_of(o.vram) + DRIVER_BYTES
        check.note(f"{what}: peak VRAM, with the driver's context", _gb(vram.peak), within)
    return cost


def _calibration(check: Check, setting: Setting, device: torch.device, o: argparse.Namespace) -> Path:
    texts, made = setting.scratch / "texts.jsonl", setting.scratch / "activations.safetensors"
    save_texts(texts, o.blocks, o.block_size, SCALES[o.scale].vocabulary)
    made.unlink(missing_ok=True)
    cost = _run(check, "calibrate", _calibrate(setting, made, o), setting, device, o)
    tokens = o.blocks * o.block_size
    check.note(f"calibrate, {tokens} tokens", f"{cost.wall:.1f} s, {tokens / cost.wall:.0f} tokens a second")
    return made


def _tight(check: Check, setting: Setting, roomy: Path, device: torch.device, o: argparse.Namespace) -> None:
    """The same calibration in the smallest budget, which the refusal of one that is too small names."""
    made, log = setting.scratch / "tight.safetensors", setting.scratch / "log.txt"
    made.unlink(missing_ok=True)
    flag = "--vram" if device.type == "cuda" else "--ram"
    asked = [sys.executable, "-m", "lowmem_aim", *_calibrate(setting, made, o), "--quiet", "--device", o.device]
    refused = cost_of([*asked, flag, TOO_LITTLE], log)
    least = log.read_text().partition(f"`{flag} ")[2].partition("`")[0]
    cost = cost_of([*asked, flag, least], log)
    same = made.is_file() and made.read_bytes() == roomy.read_bytes()
    good = (refused.exit_code, cost.exit_code) == (5, 0) and same
    check.note(f"calibrate, {flag} {least}", f"{cost.wall:.1f} s, {'the same' if same else 'other'} bytes", good)
    made.unlink(missing_ok=True)


def _calibrate(setting: Setting, made: Path, o: argparse.Namespace) -> list[str]:
    texts = str(setting.scratch / "texts.jsonl")
    flags = ["--calibration", texts, "--samples", "1000000", "--block-size", str(o.block_size)]
    return ["calibrate", str(setting.base), "-o", str(made), *flags]


def _agreement(check: Check, setting: Setting, device: torch.device, o: argparse.Namespace) -> None:
    """The activations of one layer, on the device and on the CPU."""
    base, texts = build(o.scale, setting.scratch, 1) / "base", setting.scratch / "few.jsonl"
    save_texts(texts, 2, 64, SCALES[o.scale].vocabulary)
    found = []
    for name in (o.device, "cpu"):
        made = setting.scratch / f"one-layer-{torch.device(name).type}.safetensors"
        made.unlink(missing_ok=True)
        flags = ["--calibration", str(texts), "--samples", "2", "--block-size", "64", "--device", name]
        _quietly(["calibrate", str(base), "-o", str(made), *flags])
        found.append(load_file(made))
        made.unlink()
    apart = max(float(((a - b).abs() / b.clamp(min=1e-6)).max()) for a, b in zip(*map(_in_order, found), strict=True))
    check.note("activations of one layer, device against CPU", f"relative {apart:.1e}", apart <= ACTIVATIONS_APART)


def _in_order(tensors: dict[str, Tensor]) -> list[Tensor]:
    return [tensors[name] for name in sorted(tensors)]


def _merge(
    check: Check, setting: Setting, method: str, activations: Path, device: torch.device, o: argparse.Namespace
) -> None:
    command = _command(method, setting, activations, setting.scratch / "out-device")
    cost = _run(check, method, command, setting, device, o)
    nbytes = model_bytes(setting.base) * ((2 if method == "slerp" else 4) + 1)
    check.note(f"{method} with AIM", f"{cost.wall:.1f} s, {_rate(nbytes, cost.wall)} read and written")
    on_cpu = setting.scratch / "out-cpu"
    _quietly([*_command(method, setting, activations, on_cpu), "--device", "cpu"])
    worst, share = _distance(setting.scratch / "out-device", on_cpu)
    good = worst <= 1 or (method in COMPARING and share <= MAY_FALL_OTHERWISE)
    check.note(f"{method}: device against CPU", f"{share:.1e} of the elements off by more than 1 ulp", good)
    shutil.rmtree(on_cpu)


def _solved(check: Check, setting: Setting, method: str, device: torch.device, o: argparse.Namespace) -> None:
    """A layer, which the CPU solves in minutes."""
    layer = Setting(build(o.scale, setting.scratch, LAYERS[method]), setting.scratch)
    texts = setting.scratch / "few.jsonl"
    save_texts(texts, 2, 64, SCALES[o.scale].vocabulary)
    recipe = save_recipe(method, layer, texts)
    on_device, on_cpu = setting.scratch / "out-device", setting.scratch / "out-cpu"
    for out in (on_device, on_cpu):
        shutil.rmtree(out, ignore_errors=True)
    what = f"{method} of {counted(LAYERS[method], 'layer')}"
    cost = _run(check, what, ["merge", str(recipe), str(on_device)], setting, device, o)
    check.note(what, f"{cost.wall:.1f} s")
    _quietly(["merge", str(recipe), str(on_cpu), "--device", "cpu"])
    apart = _apart(on_device, on_cpu, layer.base)
    check.note(f"{method}: deltas, device against CPU", f"relative {apart:.1e}", apart <= SOLVING[method])
    shutil.rmtree(on_device)
    shutil.rmtree(on_cpu)


def _command(method: str, setting: Setting, activations: Path, out: Path) -> list[str]:
    shutil.rmtree(out, ignore_errors=True)
    recipe = save_recipe(method, setting)
    return ["merge", str(recipe), str(out), "--calibration", str(activations), "--omega", OMEGA]


def _quietly(command: list[str]) -> None:
    subprocess.run([sys.executable, "-m", "lowmem_aim", *command, "--quiet"], check=True, stdout=subprocess.DEVNULL)


def _killed(check: Check, setting: Setting, activations: Path, device: torch.device, o: argparse.Namespace) -> None:
    """SIGKILL half-way, then the same command again."""
    method = o.methods[0]
    whole, out = setting.scratch / "out-device", setting.scratch / "out-killed"
    command = [*_command(method, setting, activations, whole), "--device", o.device]
    started = time.monotonic()
    _quietly(command)
    took = time.monotonic() - started
    command = [*_command(method, setting, activations, out), "--device", o.device]
    process = subprocess.Popen([sys.executable, "-m", "lowmem_aim", *command, "--quiet"], stdout=subprocess.DEVNULL)
    time.sleep(took * KILL_AFTER)
    when = "half-way" if process.poll() is None else "too late"
    process.kill()
    process.wait()
    _quietly(command)
    same = digests(whole) == digests(out)
    what = f"{method}, killed {when}, then the same command"
    check.note(what, "the same bytes" if same else "other bytes", same and when == "half-way")
    shutil.rmtree(out)
    shutil.rmtree(whole)


# --- how far two outputs are apart ------------------------------------------------------------------------------------


def _distance(a: Path, b: Path) -> tuple[int, float]:
    """(the largest distance in units in the last place, the share of elements further apart than one)."""
    worst = far = count = 0
    for file in sorted(a.glob("*.safetensors")):
        with safe_open(file, framework="pt") as one, safe_open(b / file.name, framework="pt") as two:
            for name in one.keys():  # noqa: SIM118 (not a dict)
                ulps = (_order(one.get_tensor(name)) - _order(two.get_tensor(name))).abs()
                worst = max(worst, int(ulps.max()))
                far += int((ulps > 1).sum())
                count += ulps.numel()
    return worst, far / count


def _apart(a: Path, b: Path, base: Path) -> float:
    """The largest relative distance, over all tensors, of the deltas of two merges of one base."""
    worst = 0.0
    with safe_open(base / "model.safetensors", framework="pt") as before:
        for file in sorted(a.glob("*.safetensors")):
            with safe_open(file, framework="pt") as one, safe_open(b / file.name, framework="pt") as two:
                for name in one.keys():  # noqa: SIM118 (not a dict)
                    base_value = before.get_tensor(name).float()
                    first, second = (found.get_tensor(name).float() - base_value for found in (one, two))
                    worst = max(worst, float((first - second).norm() / second.norm().clamp(min=1e-12)))
    return worst


def _order(values: Tensor) -> Tensor:
    """Integers in the order of the bfloat16 values, neighbours one apart."""
    bits = values.view(torch.int16).to(torch.int32)
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB"


def _rate(count: int, seconds: float) -> str:
    return f"{count / seconds / 1e9:.2f} GB/s"


if __name__ == "__main__":
    sys.exit(main())
