"""The identity of a run: all that its output follows from, as the journal keeps it."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from lowmem_aim.measuring.calibration import Calibration, Measurement
from lowmem_aim.methods.method import Method
from lowmem_aim.models.checkpoint import Checkpoint
from lowmem_aim.models.inputs import Inputs
from lowmem_aim.models.token_rows import TokenRows
from lowmem_aim.output.drawing import drawn_with
from lowmem_aim.output.portable import portable_recipe
from lowmem_aim.output.provenance import versions
from lowmem_aim.output.records import Identity
from lowmem_aim.output.token_ids import with_vocabulary
from lowmem_aim.planning.tasks import Plan
from lowmem_aim.system.on_demand import torch
from lowmem_aim.system.tensors import digest

if TYPE_CHECKING:
    from lowmem_aim.measuring.comparison import Comparison
    from lowmem_aim.solving.experts import Experts

# Keys of a job; those of the recipe start with RECIPE.
RECIPE = "recipe: "
SMALL, CONFIG, ROWS = "tokenizer and other small files", "config.json", "rows of the vocabulary"
CALIBRATION, COMPARISON, TEXTS = "calibration", "texts of ACM", "texts of experts"
STAGES = "stages"
PARAMETERS, SHARDS = "parameters", "shards"
_CONTENT = (SMALL, CONFIG, ROWS, CALIBRATION, COMPARISON, TEXTS)
_LAID_OUT = (PARAMETERS, SHARDS)  # these follow from the recipe, the inputs' tensors and the shard size
# What shows in the low bits of matrix products on a CPU.
THREADS, INSTRUCTIONS = "threads of calibration", "instructions of calibration"
# The same of products that a merge itself consists of: they matter until its last tensor is written.
SOLVING = ("threads of solving", "instructions of solving")


def known_of_merge(
    plan: Plan, inputs: Inputs, copied: Mapping[str, bytes], stages: Mapping[str, str], planned: Collection[Path]
) -> Identity:
    """The part of an identity that is known at once: not what is measured or compared, nor the environment.

    `copied`: the small files that the output takes from the reference. `stages`: name -> digest (see `digest_of_stage`)
    of those that it is made of; `planned`: folders that stand in for them, whose files say nothing by their times.
    torch is not imported, unless rows of vocabularies are matched.
    """
    job: dict[str, Any] = {RECIPE + key: value for key, value in portable_recipe(plan.recipe, inputs).items()}
    job |= {
        "seed": plan.seed,
        "nonfinite": plan.nonfinite,
        PARAMETERS: digest_of(repr([(task.name, sorted(task.parameters.items())) for task in plan.tasks]).encode()),
        SHARDS: digest_of(b"".join(shard.name.encode() + shard.header for shard in plan.shards)),
        SMALL: {name: digest_of(content) for name, content in sorted(copied.items())},
        CONFIG: digest_of(repr(sorted(with_vocabulary(inputs.reference.config, inputs).items())).encode()),
    }
    if inputs.token_rows:  # from the models' tokenizers
        job[ROWS] = _rows(inputs.token_rows, inputs)
    if stages:
        job[STAGES] = dict(stages)
    checkpoints = {checkpoint.place: checkpoint for checkpoint in inputs.checkpoints}
    return Identity(job, [_of_input(checkpoints[place], planned) for place in inputs.places], {})


def identity_of_merge(
    plan: Plan,
    inputs: Inputs,
    copied: Mapping[str, bytes],
    calibration: Calibration | None,
    comparison: Comparison | None,
    experts: Experts | None,
    device: torch.device,
    stages: Mapping[str, str],
    planned: Collection[Path],
) -> Identity:
    """The identity of the merge of one output; see `known_of_merge`."""
    known = known_of_merge(plan, inputs, copied, stages, planned)
    job = dict(known.job)
    if calibration is not None:
        job[CALIBRATION] = calibration.digest()
    if comparison is not None:
        job[COMPARISON] = comparison.digest()
    if experts is not None:
        job[TEXTS] = experts.digest()
    measures = comparison is not None or isinstance(calibration, Measurement)
    environment = _environment(device, measures, plan.recipe.method)
    if device.type == "cpu" and (experts is not None or plan.recipe.method.rows_of_linears):
        # Without texts every product is computed in one thread, whatever their number.
        there = (str(torch.get_num_threads()) if experts else "any", torch.backends.cpu.get_cpu_capability())
        environment |= dict(zip(SOLVING, there, strict=True))
    if plan.recipe.aim or plan.recipe.acm:
        environment |= drawn_with()  # the card has a picture, or has none
    return Identity(job, known.inputs, environment)


def with_unknown_of(before: Identity, known: Identity) -> Identity:
    """Complete the part of an identity that is known at once with all else as it was in the run before."""
    unknown = {key: before.job[key] for key in (CALIBRATION, COMPARISON, TEXTS) if key in before.job}
    return Identity({**known.job, **unknown}, known.inputs, before.environment)


def _rows(rows: TokenRows, inputs: Inputs) -> dict[str, str]:
    """Digests of all that says which rows of the vocabulary belong together, by the models' numbers."""
    numbers = {place: str(number) for number, place in enumerate(inputs.places)}
    found = {numbers[place]: digest(own) for place, own in rows.own.items()}
    found |= {f"given by {numbers[place]}": digest(given) for place, given in rows.given.items()}
    return found | ({"means": str(rows.mean_from)} if rows.mean_from < rows.count else {})


def identity_of_calibration(measurement: Measurement, device: torch.device) -> Identity:
    """The identity of a calibration that is a job by itself."""
    return identity_on({CALIBRATION: measurement.digest()}, measurement.base, device)


def identity_on(job: Mapping[str, Any], model: Checkpoint, device: torch.device) -> Identity:
    """The identity of a job on one model that is run."""
    return Identity(job, [_of_input(model)], _environment(device, True))


def content_of(identity: Identity) -> dict[str, Any]:
    """The part of a job that follows from what lies in the inputs' small files, texts and activations."""
    return {key: identity.job.get(key) for key in _CONTENT}


def asked_for(identity: Identity) -> dict[str, Any]:
    """The part of a job that the user asks for, whatever the inputs hold."""
    return {key: value for key, value in identity.job.items() if key not in (*_CONTENT, *_LAID_OUT)}


def as_kept(identity: Identity) -> Identity:
    """The identity as the journal gives it back."""
    return Identity(**identity.as_json())


def sizes_of(model: Mapping[str, Any]) -> dict[str, int]:
    """File name -> bytes, of one of an identity's inputs."""
    return {name: facts[0] for name, facts in model["files"].items()}


def is_moved(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether a model's files have other times or inodes, as far as both are known."""
    known = {name: facts for name, facts in new["files"].items() if len(facts) > 1}
    return any(facts != old["files"].get(name) for name, facts in known.items())


def digest_of_stage(identity: Identity) -> str:
    """xxh3-128 of all that the output of a merge follows from, but for times and inodes of files, and versions."""
    models = [(model["label"], model["tensors"], sorted(sizes_of(model).items())) for model in identity.inputs]
    return digest_of(json.dumps([as_kept(identity).job, models], sort_keys=True).encode())


def _of_input(checkpoint: Checkpoint, planned: Collection[Path] = ()) -> dict[str, Any]:
    tensors = repr([(t.name, t.dtype.name, t.shape, t.file.name, t.begin) for t in checkpoint])
    files = {name: [stat.st_size, stat.st_mtime_ns, stat.st_ino] for name, stat in checkpoint.stats().items()}
    if checkpoint.folder in planned:  # an adapter that is added to it is here: its files begin with `+`
        files = {name: facts if name.startswith("+") else facts[:1] for name, facts in files.items()}
    return {"label": checkpoint.label, "tensors": digest_of(tensors.encode("utf-8", "surrogatepass")), "files": files}


def _environment(device: torch.device, measures: bool, method: Method | None = None) -> dict[str, str]:
    found = {**versions(method), "device": _name(device)}
    if measures and device.type == "cpu":
        found |= {THREADS: str(torch.get_num_threads()), INSTRUCTIONS: torch.backends.cpu.get_cpu_capability()}
    return found


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def digest_of(data: bytes) -> str:
    """xxh3-128 of bytes, as 32 hex digits."""
    return xxhash.xxh3_128_hexdigest(data)
