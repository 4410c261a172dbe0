"""Measured activations are kept and reused for the same base, tokens and settings, and for no others."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import tiny
import torch
from conftest import Run
from safetensors.torch import load_file, save_file

from lowmem_aim.errors import ModelError
from lowmem_aim.relaxing.activations import Activations


@pytest.fixture
def merge(llama: Path, texts: Path, tmp_path: Path, run: Run):  # type: ignore[no-untyped-def]
    count = iter(range(100))

    def call(*more: object, base: Path = llama / "base") -> tuple[bool, bytes]:
        """Merge with AIM; whether it calibrated, and the bytes of the result."""
        out = tmp_path / f"out-{next(count)}"
        command = ("merge", out, "--method", "linear", "--base", base, "--expert", llama / "math")
        done = run(*command, "--omega", 0.4, "--calibration", texts, *more)
        assert done.code == 0, done.err
        return "calibrate: done" in done.err, (out / "model.safetensors").read_bytes()

    return call


def test_a_second_merge_reuses_what_the_first_measured(merge, own_cache: Path) -> None:  # type: ignore[no-untyped-def]
    first = merge()
    assert first[0]
    assert merge() == (False, first[1])
    assert merge("--omega", 0.1)[0] is False  # omega is no part of what is measured
    assert len(list((own_cache / "lowmem_aim").glob("*.safetensors"))) == 1


def test_no_cache_neither_reads_nor_writes(merge, own_cache: Path) -> None:  # type: ignore[no-untyped-def]
    assert merge("--no-cache")[0]
    assert not (own_cache / "lowmem_aim").exists()


def test_other_texts_settings_or_base_are_measured_again(  # type: ignore[no-untyped-def]
    merge, llama: Path, tmp_path: Path
) -> None:
    merge()
    assert merge("--no-pack")[0]
    assert merge("--samples", 1)[0]
    assert merge("--calibration-dtype", "bfloat16")[0]
    assert merge(base=tiny.perturbed(llama / "base", tmp_path / "other", scale=0.1))[0]


def test_bases_with_equal_sizes_and_times_are_told_apart(merge, llama: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    bases = [tiny.perturbed(llama / "base", tmp_path / str(n) / "base", scale=0.1, seed=n) for n in (1, 2)]
    for base in bases:  # as in unpacked archives
        for file in base.iterdir():
            os.utime(file, (1, 1))
    assert [merge(base=base)[0] for base in bases] == [True, True]


def test_a_damaged_cache_file_is_measured_again(merge, own_cache: Path) -> None:  # type: ignore[no-untyped-def]
    first = merge()
    (file,) = (own_cache / "lowmem_aim").glob("*.safetensors")
    file.write_bytes(b"junk")
    assert merge() == first


def test_a_calibrated_file_gives_the_same_merge(merge, llama: Path, texts: Path, tmp_path: Path, run: Run) -> None:  # type: ignore[no-untyped-def]
    done = run("calibrate", llama / "base", "-o", tmp_path / "a.safetensors", "--calibration", texts)
    assert (done.code, done.out.strip()) == (0, str(tmp_path / "a.safetensors"))
    assert merge("--calibration", tmp_path / "a.safetensors") == (False, merge()[1])


def test_calibrate_writes_the_same_bytes_twice_and_never_over_a_file(
    llama: Path, texts: Path, tmp_path: Path, run: Run
) -> None:
    command = ("calibrate", llama / "base", "--calibration", texts, "-o")
    for name in ("a.safetensors", "b.safetensors"):
        assert run(*command, tmp_path / name).code == 0
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert run(*command, tmp_path / "a.safetensors").code == 2
    assert run(*command, tmp_path / "a.bin").code == 2
    assert run(*command, tmp_path / "none" / "a.safetensors").code == 2


class TestFile:
    def test_round_trip(self, tmp_path: Path) -> None:
        before = Activations({"w": torch.rand(1, 3)}, {"h": "e"}, {"w": "00"}, "ff", 2, 30, "float32", {"w": 1})
        before.save(tmp_path / "a.safetensors")
        after = Activations.load(tmp_path / "a.safetensors")
        assert torch.equal(after.means["w"], before.means["w"])
        assert {k: v for k, v in vars(after).items() if k != "means"} == {
            k: v for k, v in vars(before).items() if k != "means"
        }

    def test_metadata_nested_beyond_reason(self, tmp_path: Path) -> None:
        nested = "[" * 100_000 + "]" * 100_000
        save_file({"w": torch.ones(1)}, tmp_path / "a.safetensors", metadata={"lowmem_aim": nested})
        with pytest.raises(ModelError, match="not an activations file"):
            Activations.load(tmp_path / "a.safetensors")

    @pytest.mark.parametrize(
        ("means", "facts"),
        [
            (torch.tensor([[-1.0]]), {}),
            (torch.tensor([[float("nan")]]), {}),
            (torch.tensor([[1.0]], dtype=torch.float64), {}),
            (torch.tensor([[1.0]]), {"surprise": 1}),
            (torch.tensor([[1.0]]), {"tied": [1]}),
            (torch.tensor([[1.0]]), {"base_digests": {"w": 3}}),
            (torch.tensor([[1.0]]), {"tokens": "many"}),
        ],
    )
    def test_files_that_are_not_activations(
        self, means: torch.Tensor, facts: dict[str, object], tmp_path: Path
    ) -> None:
        path = tmp_path / "a.safetensors"
        Activations({"w": torch.ones(1, 1)}).save(path)
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            header = json.loads(file.metadata()["lowmem_aim"])
        save_file({"w": means}, path, metadata={"lowmem_aim": json.dumps(header | facts)})
        assert load_file(path)
        with pytest.raises(ModelError):
            Activations.load(path)
