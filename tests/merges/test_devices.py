"""What goes to a device and comes back, by a device that only notes it: no GPU is needed."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from merge_cases import BY_METHOD, FLAGS, digests, recipe
from torch import Tensor

from lowmem_aim.jobs.merge import merge
from lowmem_aim.merging.loop import merge_tensors
from lowmem_aim.system.devices import DeviceStreams

# Methods that solve, and what stands behind an expert's folder for them.
SOLVING = {"covariance": "", "regmean": "={}", "regmean_plus": "={}"}


class Elsewhere(Tensor):
    """A tensor that is on the device: what is computed from it is there too."""


class FakeStreams(DeviceStreams):
    """Rows go up as `Elsewhere` and must come down; the compiled loops, which are the CPU's, see none of it."""

    def up(self, stored: Tensor) -> Tensor:
        assert stored.dtype.is_floating_point
        assert not isinstance(stored, Elsewhere)
        return stored.clone().as_subclass(Elsewhere)

    def down(self, result: Tensor) -> Tensor:
        assert isinstance(result, Elsewhere)
        return result.as_subclass(Tensor).contiguous()


@pytest.fixture(scope="module")
def with_a_copy(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llamas with a tensor of integers, which is copied, not merged. Read only."""
    folder = tmp_path_factory.mktemp("with-a-copy")
    for name in ("base", "math", "code", "chat"):
        tiny.perturbed(llama / name, folder / name, scale=0.0)
        tiny.edit_tensors(folder / name, lambda t: t.update({"model.rotary_emb.steps": torch.arange(3)}))
    return folder


@pytest.mark.parametrize("method", [*BY_METHOD, *SOLVING])
def test_every_slice_goes_up_and_comes_down_and_copies_stay_here(
    with_a_copy: Path, measured: Path, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("A merged model\n\nkeeps what its experts know.\n")
    experts = tuple(str(with_a_copy / name) + SOLVING.get(method, "") for name in ("math", "code"))
    flags = FLAGS.get(method, {"expert": tuple(expert.format(texts) for expert in experts)})
    asked = recipe(with_a_copy, method, **flags, omega=0.3, calibration=str(measured))
    expected = digests(merge(asked, tmp_path / "here"))
    monkeypatch.setitem(merge_tensors.__globals__, "DeviceStreams", FakeStreams)
    monkeypatch.setattr("lowmem_aim.methods.kernels.usable", lambda tensors: not isinstance(tensors[0], Elsewhere))
    monkeypatch.setattr("lowmem_aim.methods.kernels.available", lambda: False)
    assert digests(merge(asked, tmp_path / "there")) == expected
