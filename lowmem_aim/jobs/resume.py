"""May an interrupted run be gone on with? Only if the same would come out: the same job on the same inputs.

The journal holds what the run was of. Job and settings must be the same; so must the versions and the device (and,
while calibration is in its midst, the number of threads), unless the user accepts others. An input whose files have
other times or inodes (copied, downloaded anew) is read again as far as the run had come, and accepted if what it gave
is still what it gives.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import xxhash

from lowmem_aim.errors import ResumeError, UsageError, printable
from lowmem_aim.events import Emit, Notice
from lowmem_aim.measuring.calibration import Calibration
from lowmem_aim.merging.slices import Stride, TensorInputs
from lowmem_aim.methods.method import Method
from lowmem_aim.models.checkpoint import Checkpoint
from lowmem_aim.models.inputs import Inputs
from lowmem_aim.output.journal import Journal
from lowmem_aim.output.picture import drawn_with
from lowmem_aim.output.portable import portable_recipe
from lowmem_aim.output.provenance import versions
from lowmem_aim.planning.tasks import Plan

REREAD_ELEMENTS = 1 << 20
# What shows in the low bits of matrix products on a CPU.
_THREADS, _INSTRUCTIONS = "threads of calibration", "instructions of calibration"
_SHOWN = 200  # characters of a value in a message


@dataclass(frozen=True)
class Identity:
    """What a run is of. All JSON values."""

    job: Mapping[str, Any]  # recipe, seed, layout, small files: any difference is another output
    inputs: list[Mapping[str, Any]]  # of each model's folder: label, tensors, and the files' sizes, times, inodes
    environment: Mapping[str, str]  # versions, device: another may give other bytes

    @classmethod
    def of(
        cls,
        plan: Plan,
        inputs: Inputs,
        copied: Mapping[str, bytes],
        calibration: Calibration | None,
        device: torch.device,
        compared: str = "",
    ) -> Identity:
        """`compared`: the digest of what ACM compares."""
        job = {f"recipe: {key}": value for key, value in portable_recipe(plan.recipe, inputs).items()}
        job |= {
            "seed": plan.seed,
            "nonfinite": plan.nonfinite,
            "parameters": _digest(repr([(task.name, sorted(task.parameters.items())) for task in plan.tasks]).encode()),
            "shards": _digest(b"".join(shard.name.encode() + shard.header for shard in plan.shards)),
            "tokenizer and other small files": {name: _digest(content) for name, content in sorted(copied.items())},
            "config.json": _digest(repr(sorted(inputs.reference.config.items())).encode()),
        }
        if calibration is not None:
            job["calibration"] = calibration.digest()
        if compared:
            job["texts of ACM"] = compared
        checkpoints = {checkpoint.folder: checkpoint for checkpoint in inputs.checkpoints}
        measures = bool(compared) or (calibration is not None and calibration.given is None)
        environment = _environment(device, measures, plan.recipe.method)
        if plan.recipe.aim or plan.recipe.acm:
            environment |= drawn_with()  # the card has a picture, or has none
        return cls(job, [_of_input(checkpoints[folder]) for folder in inputs.folders], environment)

    @classmethod
    def of_calibration(cls, calibration: Calibration, device: torch.device) -> Identity:
        """Of one that is all there is to do."""
        return cls({"calibration": calibration.digest()}, [_of_input(calibration.base)], _environment(device, True))

    def as_json(self) -> dict[str, Any]:
        """As it comes back from the journal: lists for tuples."""
        fields = {"job": dict(self.job), "inputs": list(self.inputs), "environment": dict(self.environment)}
        same: dict[str, Any] = json.loads(json.dumps(fields))
        return same


def _of_input(checkpoint: Checkpoint) -> dict[str, Any]:
    tensors = repr([(t.name, str(t.dtype), t.shape, t.file.name, t.begin) for t in checkpoint])
    stats = {file.name: file.stat() for file in checkpoint.files}
    files = {name: [stat.st_size, stat.st_mtime_ns, stat.st_ino] for name, stat in stats.items()}
    return {"label": checkpoint.label, "tensors": _digest(tensors.encode("utf-8", "surrogatepass")), "files": files}


def _environment(device: torch.device, measures: bool, method: Method | None = None) -> dict[str, str]:
    found = {**versions(method), "device": _name(device)}
    if measures and device.type == "cpu":
        found |= {_THREADS: str(torch.get_num_threads()), _INSTRUCTIONS: torch.backends.cpu.get_cpu_capability()}
    return found


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _digest(data: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(data)


Reread = Callable[[int], Iterator[str]]  # number of an input -> its tensors that are not what they were


def agree(journal: Journal, now: Identity, reread: Reread, *, accept_environment: bool, emit: Emit) -> None:
    """Write down what a new run is of, or check that an interrupted one is of the same.

    Raises ResumeError with every difference.
    """
    before = journal.get("identity")
    if before is None:  # new; or what it was of is lost, and with it what the rest is worth
        for kind in ("group", "accepted", "activations", "calibration", "acm"):
            journal.drop(kind)
        journal.put("identity", "", now.as_json())
        return
    then, now = Identity(**before), Identity(**now.as_json())
    problems = [*_differences(then.job, now.job)]
    if len(then.inputs) == len(now.inputs):
        for number, (old, new) in enumerate(zip(then.inputs, now.inputs, strict=True)):
            problems += _changed(old, new, partial(reread, number), emit)
    known, found = _compared(then, journal), _compared(now, journal)
    elsewhere = list(_differences(known, found))
    if elsewhere and not accept_environment:
        problems += elsewhere
    if problems:
        only = " (or `--accept-environment` to go on all the same)" if len(elsewhere) == len(problems) else ""
        raise ResumeError(
            ["the interrupted run in this folder was another one:", *problems],
            hint=f"`--fresh` starts over{only}; or give the run back what it had",
        )
    if elsewhere:
        for difference in elsewhere:
            emit(Notice(f"going on although {difference}", "warning"))
        journal.put("accepted", "", [*(journal.get("accepted") or [known]), found])
    journal.put("identity", "", now.as_json())


def check_same_job(journal: Journal, now: Identity, *, accept_environment: bool) -> None:
    """Raises ResumeError where an interrupted run is certain to be another one. Nothing is read, nothing is kept."""
    before = journal.get("identity")
    if before is None:
        return
    then, now = Identity(**before), Identity(**now.as_json())
    problems = [*_differences(then.job, now.job)]
    if not accept_environment:
        problems += _differences(_compared(then, journal), _compared(now, journal))
    if problems:
        raise ResumeError(
            ["the interrupted run in this folder was another one:", *problems],
            hint="`--fresh` starts over; or give the run back what it had",
        )


def check_same(journal: Journal, now: Identity, out: Path) -> None:
    """Raises UsageError if the finished output in `out` is not of this very job."""
    then = journal.get("identity")
    if then is None or _content(then) != _content(now.as_json()):
        why = "its journal is damaged" if then is None else "it holds another merge, or one of other inputs"
        raise UsageError(
            f"the output folder `{printable(str(out))}` is not empty: {why}",
            hint="name a new folder, or empty this one",
        )


def _content(identity: Mapping[str, Any]) -> Any:
    """The job and the inputs, whenever and wherever their files were made."""
    models = [(model["label"], model["tensors"], _sizes(model)) for model in identity["inputs"]]
    return identity["job"], models


def _sizes(model: Mapping[str, Any]) -> dict[str, int]:
    return {name: facts[0] for name, facts in model["files"].items()}


def _compared(identity: Identity, journal: Journal) -> dict[str, str]:
    """Of the environment, what still makes a difference."""
    job = identity.job
    wanted = [kind for kind, key in (("activations", "calibration"), ("acm", "texts of ACM")) if key in job]
    measured = all(map(journal.holds, wanted))
    begun = any(map(journal.holds, ("calibration", "activations", "acm", "group")))
    dropped = () if begun and not measured else (_THREADS, _INSTRUCTIONS)
    return {key: value for key, value in identity.environment.items() if key not in dropped}


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    for key in dict.fromkeys([*old, *new]):
        if old.get(key) != new.get(key):
            yield f"`{printable(key)}` was {_shown(old.get(key))} and is now {_shown(new.get(key))}"


def _shown(value: Any) -> str:
    return f"`{printable(str(value), _SHOWN)}`" if value is not None else "absent"


def _changed(
    old: Mapping[str, Any], new: Mapping[str, Any], reread: Callable[[], Iterator[str]], emit: Emit
) -> Iterator[str]:
    """Why a model is not what it was."""
    label = printable(str(new["label"]))
    if old["tensors"] != new["tensors"] or _sizes(old) != _sizes(new):
        yield f"`{label}` has other tensors or files than before"
    elif old["files"] != new["files"]:
        emit(Notice(f"`{label}` has files of another time or place than before: what was read of it is read again"))
        for name in reread():
            yield f"`{label}` has another `{printable(name)}` than before"
            return  # one says enough; others would take their time


def differing_tensors(plan: Plan, inputs: Inputs, journal: Journal, number: int) -> Iterator[str]:
    """Tensors of one input that do not give what they gave to an interrupted merge."""
    if inputs.base is not None and inputs.folders[number] == inputs.base.folder:
        yield from differing_weights(inputs.base, journal)
    known: dict[str, str] = {}
    for shard in plan.shards:
        for group in journal.groups(shard.name):
            known |= group.digests.get(str(number), {})
    folder = inputs.folders[number]
    stride = Stride(REREAD_ELEMENTS)
    for task in (task for task in plan.tasks if task.name in known):
        tensor = TensorInputs(task, inputs, True, stride)
        for source in (source for source in tensor.sources if source.checkpoint.folder == folder):
            for start, stop in stride.cuts(task.shape):
                source.enter_digest(source.pieces(start, stop))
            if source.digest() != known[task.name]:
                yield task.name


def differing_weights(base: Checkpoint, journal: Journal, number: int = 0) -> Iterator[str]:
    """Tensors of the base that do not give what they gave to an interrupted calibration."""
    row = journal.get("activations") or journal.get("calibration") or {"weights": {}}
    for name, known in row["weights"].items():
        if base.digest(name) != known:
            yield name
