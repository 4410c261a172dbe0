"""Quantised models: every row is the format's formula, bit for bit; what cannot be read is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from quantising import FORMATS, Format, is_packed, quantised
from torch import Tensor

from lowmem_aim.models.quantised import QuantisedCheckpoint, open_model

Bases = Callable[[Format], Path]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    """A tiny model of a format's architecture in bfloat16, built once."""
    folder, made = tmp_path_factory.mktemp("bases"), {}

    def base(form: Format) -> Path:
        if form.architecture not in made:
            made[form.architecture] = tiny.build(
                form.architecture, folder / form.architecture, dtype=torch.bfloat16, **form.changes
            )
        return made[form.architecture]

    return base


def same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.parametrize("read", ["mmap", "pread"])
@pytest.mark.parametrize("name", FORMATS)
def test_every_row_is_the_formula(name: str, read: Any, bases: Bases, tmp_path: Path) -> None:
    form = FORMATS[name]
    weights = quantised(form, bases(form), tmp_path / "model")
    with open_model(tmp_path / "model", read=read) as model:
        assert isinstance(model, QuantisedCheckpoint)
        assert model.tensors.keys() == weights.keys()
        assert "quantization_config" not in model.config
        packed = [name for name in weights if is_packed(form, name)]
        assert len(packed) >= 6
        for weight in packed:
            info, expected = model.tensors[weight], weights[weight]
            assert (info.shape, info.dtype.name, info.output_dtype.name) == (expected.shape, "float32", "bfloat16")
            assert same(model.tensor(weight), expected)
            rows, columns = info.matrix
            flat = expected.reshape(rows, columns)
            for start, stop in [
                (0, rows),
                (0, 1),
                (rows - 1, rows),
                (3, 4),
                (5, min(rows, 24)),
                (1, 1),
                (7, min(rows, 47)),
            ]:
                assert same(model.rows(weight, start, stop), flat[start:stop]), (weight, start, stop)
            assert model.rows(weight, 2, 9).is_contiguous()
        for plain in set(weights) - set(packed):
            assert same(model.tensor(plain), weights[plain])
