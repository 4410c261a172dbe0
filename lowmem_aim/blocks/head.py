"""A model's output head, read a few rows at a time: whole, it may be larger than a block."""

from __future__ import annotations

from torch import Tensor

from lowmem_aim.blocks.runner import BlockRunner


class OutputHead:
    """The output head of a model that is set up; a tied one is the embedding that it shares."""

    def __init__(self, runner: BlockRunner) -> None:
        self._runner, head = runner, runner.meta_model.head
        module = runner.model.get_submodule(head)
        self._dtype = module.weight.dtype
        self.rows, self.columns = module.weight.shape
        name = runner.weights.map.name(f"{head}.weight")
        self._weight = runner.meta_model.tied.get(name, name)
        self._bias = runner.weights.map.name(f"{head}.bias") if module.bias is not None else None

    def part(self, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        """The weight's rows start:stop, (rows, hidden), and their biases, (rows,), on the device. Raises ModelError."""
        source = self._runner.weights.base
        weight = source.rows(self._weight, start, stop)
        bias = None if self._bias is None else self._here(source.rows(self._bias, start, stop).reshape(-1))
        return self._here(weight), bias

    def _here(self, stored: Tensor) -> Tensor:
        # A copy: products on file mappings, at any alignment, may round differently.
        return stored.to(self._runner.device, self._dtype, copy=True)
