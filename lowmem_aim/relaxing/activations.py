"""The activation statistics of a base model, as a small safetensors file: what `calibrate` writes and `relax` reads.

One float32 tensor per scaled weight, under the weight's name in the checkpoint: the mean |x| of each input channel of
its module, shaped to broadcast against the weight: (1, in) for a linear's (out, in), (in, 1) for a transposed one,
(n,) for a norm, (experts, 1, in) or (experts, in, 1) for fused experts, also where they are (experts * rows, columns).
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from lowmem_aim.errors import ModelError, printable
from lowmem_aim.system.files import input_errors, is_there, open_regular, write_file
from lowmem_aim.system.on_demand import torch

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = "lowmem-aim activations 1"
_MAKE = "make one with `lowmem-aim calibrate`"


@dataclass(frozen=True)
class Activations:
    """The activation statistics of a base, and the identity of what they were measured on.

    `means`: weight name -> statistic, shaped as this module's docstring says. `tied`: name of the head's weight -> name
    of the embedding's weight that the head shares.
    """

    means: Mapping[str, Tensor]
    tied: Mapping[str, str] = field(default_factory=dict)
    # Identity of what was measured: a merge on another base is refused.
    base_digests: Mapping[str, str] = field(default_factory=dict)  # tensor name -> xxh3-128 of its bytes
    tokens_digest: str = ""  # xxh3-128 over all sequences
    sequences: int = 0
    tokens: int = 0
    dtype: str = ""  # of the forward passes
    unreached_experts: Mapping[str, int] = field(default_factory=dict)  # weight name -> experts that saw no token

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all. Raises DiskError."""
        facts = {key: value for key, value in asdict(_facts(self)).items() if key != "means"}
        header = json.dumps({"format": FORMAT} | facts, sort_keys=True)
        # One metadata key only: with more, the library's order differs from process to process.
        from safetensors.torch import save  # with torch

        write_file(path, save(dict(self.means), metadata={"lowmem_aim": header}))

    @classmethod
    def load(cls, path: Path) -> Activations:
        """Read a file that `save` wrote. Raises ModelError if the file is missing, damaged or something else."""
        shown = printable(os.fspath(path))
        facts, file = _opened(path, "pt")
        with file, _as_no_activations(shown):
            means = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        bad = [n for n, t in means.items() if t.dtype != torch.float32 or not t.isfinite().all() or (t < 0).any()]
        if bad:
            problems = [f"`{shown}`: the statistic of `{printable(n)}` is not a mean of magnitudes" for n in bad]
            raise ModelError(problems, _MAKE)
        return cls(means, **facts)


def facts_of(path: Path) -> tuple[Activations, int]:
    """The identity of what a file's statistics were measured on, without them, and their number; torch is not imported.

    Raises ModelError as `Activations.load`.
    """
    facts, file = _opened(path, "numpy")
    with file:
        return Activations({}, **facts), len(file.keys())


def _opened(path: Path, framework: str) -> tuple[dict[str, Any], Any]:
    """The facts of a file that `save` wrote, and the file, opened. Raises ModelError."""
    shown = printable(os.fspath(path))
    with input_errors(path):
        if not is_there(path):
            raise ModelError(f"there is no activations file `{shown}`", _MAKE)
        os.close(open_regular(path))
    with _as_no_activations(shown):
        file: Any = safe_open(path, framework=framework)
        facts = json.loads((file.metadata() or {}).get("lowmem_aim", "{}"))
    if not isinstance(facts, dict) or facts.pop("format", None) != FORMAT:
        raise ModelError(f"`{shown}` is a safetensors file, but not of activations", _MAKE)
    if not _well_formed(facts):
        raise ModelError(f"`{shown}` was written by another version of lowmem-aim", hint="calibrate again")
    return facts, file


@contextlib.contextmanager
def _as_no_activations(shown: str) -> Iterator[None]:
    """Raise ModelError for what the library, or JSON, finds wrong with a file during the block."""
    try:
        yield
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise ModelError(f"`{shown}` is not an activations file: {printable(str(error))}", _MAKE) from error


def _well_formed(facts: dict[str, Any]) -> bool:
    """Whether the facts of a file have the names and kinds that `save` gives them."""
    values = {"tied": str, "base_digests": str, "unreached_experts": int}  # of the tables
    known = {f.name for f in fields(Activations)} - {"means"}
    return set(facts) == known and all(
        isinstance(fact, dict) and all(isinstance(value, values[name]) for value in fact.values())
        if name in values
        else isinstance(fact, str if name in ("tokens_digest", "dtype") else int)
        for name, fact in facts.items()
    )


def _facts(activations: Activations) -> Activations:
    """Copy all but the means, whose tensors `asdict` would copy."""
    return Activations({}, **{k: v for k, v in vars(activations).items() if k != "means"})
