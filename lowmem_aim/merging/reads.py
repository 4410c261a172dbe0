"""A log of what was read of the models: a digest of every tensor, and how many of its elements were not finite."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from lowmem_aim.merging.slices import TensorInputs, TensorReader
from lowmem_aim.models.inputs import Inputs
from lowmem_aim.output.merged import Replaced
from lowmem_aim.output.tensor_facts import Read
from lowmem_aim.planning.sources import Source
from lowmem_aim.planning.tasks import Plan
from lowmem_aim.system.tensors import digest_of_digests

Place = tuple[Path, ...]  # the folders of a model, see `Checkpoint.place`


class ReadLog:
    """A log of what this run, and those before it, have read of each model for one output."""

    def __init__(self, inputs: Inputs) -> None:
        self._inputs = inputs
        self._digests: dict[Place, dict[str, str]] = {}  # model -> tensor -> xxh3-128 of its rows as read
        self._replaced: dict[Place, dict[str, int]] = {}  # model -> tensor -> elements that were not finite

    def add(self, tensor: TensorInputs, found: Mapping[TensorReader, str], *, with_base: bool) -> Read:
        """Add a tensor that has been read to its end, and return the facts about it.

        `found` are its `TensorInputs.digests`. Unless `with_base`, the output does without the base, whatever other
        outputs that were made of the same rows do.
        """
        digests: dict[str, dict[str, str]] = {}
        replaced: dict[str, dict[str, int]] = {}
        for reader in tensor.sources:
            if reader is tensor.base and not with_base:
                continue
            model = str(self._inputs.places.index(reader.checkpoint.place))
            digests.setdefault(model, {})[reader.tensor] = found[reader]
            if count := tensor.replaced_of(reader):
                replaced.setdefault(model, {})[reader.tensor] = count
        read = Read(digests, replaced)
        self.add_all([read])
        return read

    def add_all(self, reads: Iterable[Read]) -> None:
        """Add what earlier runs have read."""
        for read in reads:
            for model, digests in read.digests.items():
                self._digests.setdefault(self._inputs.places[int(model)], {}).update(digests)
            for model, replaced in read.replaced.items():
                self._replaced.setdefault(self._inputs.places[int(model)], {}).update(replaced)

    def digest_of(self, source: Source) -> str | None:
        """xxh3-128 of a model's tensor as read; None if it was not read."""
        return self._digests.get(source.checkpoint.place, {}).get(source.tensor)

    def model_digests(self) -> list[tuple[str, str]]:
        """(label, one xxh3-128 over all tensors of the model that were read, by name), for each model."""
        found = []
        for checkpoint in self._inputs.checkpoints:
            found.append((checkpoint.label, digest_of_digests(self._digests.get(checkpoint.place, {}))))
        return found

    def replaced_elements(self, plan: Plan) -> list[Replaced]:
        """List every tensor that took some of the base's values, model by model, in the output's order."""
        read = [(source.checkpoint, source.tensor) for task in plan.tasks for source in task.experts]
        return [
            Replaced(checkpoint.label, tensor, count)
            for checkpoint in dict.fromkeys(self._inputs.checkpoints)
            for tensor in dict.fromkeys(tensor for of, tensor in read if of is checkpoint)
            if (count := self._replaced.get(checkpoint.place, {}).get(tensor))
        ]
