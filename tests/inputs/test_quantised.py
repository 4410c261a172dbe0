"""Quantised models: every row is the format's formula, bit for bit; what cannot be read is refused by name."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from long_cases import others_long
from quantising import FORMATS, Format, is_packed, quantised
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowmem_aim.errors import ModelError
from lowmem_aim.models.checkpoint import Checkpoint
from lowmem_aim.models.quantised import QuantisedCheckpoint, open_model

Bases = Callable[[Format], Path]
NOISE = 256 << 10  # bytes: pages that the system gives or takes by itself


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


@pytest.mark.parametrize(
    ("name", "read"),
    others_long(
        itertools.product(FORMATS, ("mmap", "pread")), [*((name, "mmap") for name in FORMATS), ("mxfp4", "pread")]
    ),
)
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


# --- refused ----------------------------------------------------------------------------------------------------------


class Model:
    """A quantised model of one shard that a test may spoil."""

    def __init__(self, name: str, bases: Bases, folder: Path) -> None:
        form = FORMATS[name]
        quantised(form, bases(form), folder)
        self.folder, self.stored = folder, {}
        for file in sorted(folder.glob("*.safetensors")):
            self.stored |= load_file(file)
            file.unlink()
        (folder / "model.safetensors.index.json").unlink()

    def save(self) -> None:
        save_file(self.stored, self.folder / "model.safetensors")

    def configure(self, **settings: Any) -> None:
        tiny.edit_config(self.folder, quantization_config=settings)

    def named(self, end: str) -> str:
        return next(name for name in self.stored if name.endswith(end))

    def refused(self, *messages: str) -> None:
        self.save()
        with pytest.raises(ModelError) as caught:
            open_model(self.folder)
        for message in messages:
            assert message in f"{caught.value}\n{caught.value.hint}"


MakeModel = Callable[[str], Model]


@pytest.fixture
def spoilt(bases: Bases, tmp_path: Path) -> MakeModel:
    return lambda name: Model(name, bases, tmp_path / "model")


# Of each format: the end of a part's name, and what is done to it.
CUT: list[tuple[str, str]] = [
    ("fp8 in partial blocks", "weight_scale_inv"),
    ("fbgemm", "weight_scale"),
    ("compressed-tensors, channels", "weight_scale"),
    ("int8 of bitsandbytes", "SCB"),
    ("mxfp4", "_proj_scales"),
    ("mxfp4", "_proj_blocks"),
    ("nf4", "absmax"),
    ("nf4", "quant_map"),
    ("nf4", "_proj.weight"),
    ("nf4, double", "nested_absmax"),
    ("nf4, double", "nested_quant_map"),
    ("gptq", "qzeros"),
    ("gptq", "scales"),
    ("gptq", "g_idx"),
    ("gptq", "qweight"),
    ("awq", "qzeros"),
    ("awq", "scales"),
]


@pytest.mark.parametrize(("name", "part"), CUT)
def test_parts_that_do_not_fit_together_are_named(name: str, part: str, spoilt: MakeModel) -> None:
    model = spoilt(name)
    cut = model.named(part)
    model.stored[cut] = model.stored[cut][:-1].clone()
    model.refused("parts of a quantised weight do not fit together", f"`{cut}`", "download the model again")


@pytest.mark.parametrize(("name", "part"), [case for case in CUT if case[1] not in ("g_idx", "weight_packed")])
def test_a_part_that_is_missing_is_told(name: str, part: str, spoilt: MakeModel) -> None:
    model = spoilt(name)
    del model.stored[model.named(part)]
    model.refused("`")


@pytest.mark.parametrize("method", ["aqlm", "hqq", "quanto", "torchao", "bitnet", "\x1b[2J"])
def test_other_methods_are_refused_by_name(method: str, spoilt: MakeModel) -> None:
    model = spoilt("fp8 in blocks")
    model.configure(quant_method=method)
    model.refused(f"is quantised (`quantization_config`: {method}".replace("\x1b", "\\x1b"), "merge the unquantised")


def test_other_kinds_of_the_methods_are_refused_by_name(spoilt: MakeModel) -> None:
    model = spoilt("gptq")
    model.configure(quant_method="gptq", bits=3)
    model.refused("weights of 3 bits are not read, only of 2, 4, 8")
    model.configure(quant_method="awq", bits=4, version="gemv")
    model.refused("AWQ of the version `gemv` is not read")
    model.configure(quant_method="fp8")
    model.refused("of a quantised weight that is not read here (fp8)", "g_idx")


def test_packed_and_asymmetric_compressed_tensors_are_refused_by_name(spoilt: MakeModel) -> None:
    model = spoilt("compressed-tensors, int8")
    name = model.named("_proj.weight")
    zero = f"{name}_zero_point"
    model.stored[zero] = torch.zeros(1, dtype=torch.int8)
    model.refused(f"with zero points (`{zero}`) are not read")
    del model.stored[zero]
    model.stored[f"{name}_packed"] = model.stored.pop(name)
    model.refused("is of a quantised weight that is not read here (compressed-tensors)")


def test_a_model_that_does_not_say_how_it_is_quantised_is_refused(spoilt: MakeModel) -> None:
    model = spoilt("fp8 in blocks")
    tiny.edit_config(model.folder, quantization_config=None)
    model.refused("is quantised (it holds `")


def test_a_config_that_is_left_over_from_training_does_not_matter(bases: Bases, tmp_path: Path) -> None:
    """The weights of a merged QLoRA are plain, and its config may still say otherwise."""
    base = bases(FORMATS["nf4"])
    tiny.perturbed(base, tmp_path / "model", scale=0.0)
    tiny.edit_config(tmp_path / "model", quantization_config=dict(FORMATS["nf4"].settings))
    with open_model(tmp_path / "model") as model, Checkpoint.open(base) as plain:
        assert model.tensors.keys() == plain.tensors.keys()
        assert not model.oddities
        assert "quantization_config" not in model.config


def test_biases_that_old_gptq_models_have_for_nothing_are_left_out(spoilt: MakeModel) -> None:
    """Of a kind of module, in all layers: 0. One that is not 0 in any layer is a bias; and so it may be in a hole."""
    model = spoilt("gptq")
    kinds = ("self_attn.q_proj", "self_attn.o_proj")
    biases = {f"model.layers.{layer}.{kind}.bias": torch.zeros(32).half() for layer in range(3) for kind in kinds}
    biases["model.layers.1.self_attn.q_proj.bias"][3] = 0.5
    model.stored |= biases
    model.save()
    with open_model(model.folder) as found:
        assert {name for name in biases if name in found.tensors} == {name for name in biases if "q_proj" in name}
    model.stored |= {name: torch.zeros_like(value) for name, value in model.stored.items() if name.endswith("scales")}
    model.save()
    with open_model(model.folder) as found:
        assert biases.keys() <= found.tensors.keys()


STATES: list[Any] = [
    [],
    {},
    {"shape": [16, 32]},
    {"shape": "x", "blocksize": 64},
    {"shape": [16, -32], "blocksize": 64},
    {"shape": [16, 32.5], "blocksize": 64},
    {"shape": [1 << 50, 32], "blocksize": 64},
    {"shape": [], "blocksize": 64},
    {"shape": [16, 32], "blocksize": 0},
    {"shape": [16, 32], "blocksize": 7},
    {"shape": [16, 32], "blocksize": True},
    {"shape": [16, 32], "blocksize": 64, "nested_blocksize": 0},
    {"shape": [16, 32], "blocksize": 64, "nested_blocksize": 8},
    {"shape": [16, 32], "blocksize": 64, "nested_offset": []},
    {"shape": [16, 33], "blocksize": 64},
]


@pytest.mark.parametrize("state", STATES)
def test_a_state_that_cannot_be_is_refused(state: Any, spoilt: MakeModel) -> None:
    model = spoilt("nf4")
    name = model.named("k_proj.weight.quant_state.bitsandbytes__nf4")
    model.stored[name] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    model.refused("`", name.removesuffix(".quant_state.bitsandbytes__nf4"))


def test_headers_alone_do_not_say_how_four_bit_weights_are_stored(spoilt: MakeModel) -> None:
    """As in the stand-in for a model on the Hub, whose weights are holes."""
    model = spoilt("nf4")
    name = model.named("quant_state.bitsandbytes__nf4")
    model.stored[name] = torch.zeros_like(model.stored[name])
    model.refused("does not say how", "download the model whole")


def test_groups_that_have_no_scales_are_an_error_when_they_are_read(spoilt: MakeModel) -> None:
    model = spoilt("gptq")
    name = model.named("g_idx")
    for wrong in (-1, 2, 1 << 30):
        model.stored[name][0] = wrong
        model.save()
        with open_model(model.folder) as found, pytest.raises(ModelError, match="names groups that have no scales"):
            found.rows(name.replace("g_idx", "weight"), 0, 1)


def test_a_file_that_changes_is_noticed(bases: Bases, tmp_path: Path) -> None:
    """Also one that holds no more than the scales."""
    form = FORMATS["fbgemm"]
    quantised(form, bases(form), tmp_path / "model")
    with open_model(tmp_path / "model") as model:
        packed = next(name for name in model.tensors if is_packed(form, name))
        model.rows(packed, 0, 1)
        before = model.fingerprint()
        for file in (tmp_path / "model").glob("*.safetensors"):
            file.write_bytes(file.read_bytes() + b" ")
            with pytest.raises(ModelError, match="changed while it was being read"):
                model.check_unchanged()
            file.write_bytes(file.read_bytes()[:-1])
    with open_model(tmp_path / "model") as model:
        assert model.fingerprint() != before  # of other times


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is Linux's to tell")
@pytest.mark.parametrize("formats", [["awq"], pytest.param([*FORMATS], marks=pytest.mark.long)])
def test_decoding_takes_no_more_memory_than_it_declares(formats: list[str], tmp_path: Path) -> None:
    program = Path(__file__).parents[1] / "decoding_footprints.py"
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, program, tmp_path, *formats]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["format"] for line in found] == [name for name in formats for _ in range(2)]
    assert [line for line in found if line["taken"] > line["limit"] + NOISE] == []
