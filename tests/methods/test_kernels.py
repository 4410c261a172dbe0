"""The compiled loops give the bytes of the torch code that they stand for, element for element."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from method_cases import NAME, PARAMETERS, measured
from torch import Tensor

from lowmem_aim.methods import kernels, low_rank
from lowmem_aim.methods.method import Rows, Subject
from lowmem_aim.methods.registry import METHODS
from lowmem_aim.methods.selection import ALL, NONE, Everything, Largest, Share
from lowmem_aim.relaxing.aim import relax

pytestmark = pytest.mark.skipif(not kernels.available(), reason="numba is not installed")

SHAPES = [(1, 1), (3, 5), (7, 1030), (2500, 1), (40, 300)]


@pytest.fixture
def in_torch(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Calls a function with the loops turned off."""

    def call(function: Any, *args: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "usable", lambda tensors: False)
            return function(*args)

    return call


def models(shape: tuple[int, int], dtype: torch.dtype, count: int = 3) -> list[Tensor]:
    """A base and experts with equal values, zeros of both signs, tiny and large numbers among them."""
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(shape, generator=generator)
    experts = [base + 0.1 * torch.randn(shape, generator=generator) for _ in range(count)]
    for number, tensor in enumerate((base, *experts)):
        flat = tensor.view(-1)
        flat[number::17] = 0.0
        flat[5::19] = -0.0
        flat[7::23] *= 1e-30
        flat[11::29] *= 1e20
    return [tensor.to(dtype) for tensor in (base, *experts)]


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int16 if tensor.dtype.itemsize == 2 else torch.int32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("method", PARAMETERS)
def test_every_method_gives_the_same_bytes(method: str, dtype: torch.dtype, in_torch: Any) -> None:
    for shape, step in (((3, 5), 1), ((7, 1030), 2), ((2500, 1), 700), ((40, 300), 17)):
        base, *experts = models(shape, dtype)
        compare(method, base, experts[: METHODS[method].most], step, in_torch)


@pytest.mark.parametrize("method", ["linear", "ties", "dare_linear", "slerp", "widen"])
def test_float16_is_widened_first(method: str, in_torch: Any) -> None:
    base, *experts = (model.clamp(-6e4, 6e4).to(torch.float16) for model in models((7, 1030), torch.float32))
    compare(method, base, experts[: METHODS[method].most], 2, in_torch)


def compare(method: str, base: Tensor, experts: list[Tensor], step: int, in_torch: Any) -> None:
    subject = Subject(NAME, tuple(base.shape), base.numel(), len(experts), seed=5)

    def merged() -> Tensor:
        combine = measured(METHODS[method].start(subject, PARAMETERS[method]), base, experts, step)
        result: Tensor = combine(Rows(base, tuple(experts), 0))
        return result

    assert torch.equal(bits(merged()), bits(in_torch(merged))), base.shape


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_relaxation_gives_the_same_bytes(dtype: torch.dtype, shape: tuple[int, int], in_torch: Any) -> None:
    base, expert = models(shape, dtype, 1)
    merged = expert.float()
    for shrink in (torch.rand(1, shape[1]), torch.rand(shape[0], 1), torch.zeros(1, 1), torch.ones(shape)):
        assert torch.equal(bits(relax(merged.clone(), base, shrink)), bits(in_torch(relax, merged, base, shrink)))


@pytest.mark.parametrize("columns", [1, 7, 128, 3000])
def test_ranks_are_those_of_a_stable_sort(columns: int) -> None:
    values = torch.randn(5, columns, generator=torch.Generator().manual_seed(0)).abs()
    values[1] = values[1].round()
    values[2, ::2] = 0.0
    values[3] *= 1e-42
    magnitudes = values.view(torch.int32)
    expected = magnitudes.argsort(dim=-1, stable=True).argsort(dim=-1)
    assert torch.equal(kernels.row_ranks(magnitudes).long(), expected)


def test_rounding_to_bfloat16_is_torchs_and_sees_what_is_not_finite() -> None:
    patterns = torch.randint(-(1 << 31), 1 << 31, (1 << 20,), generator=torch.Generator().manual_seed(0))
    values = patterns.to(torch.int32).view(torch.float32)
    values = torch.where(values.isfinite() & (values.abs() < 3e38), values, 1.0)
    rounded, finite = kernels.to_bfloat16(values[None])
    assert finite
    assert torch.equal(bits(rounded), bits(values[None].to(torch.bfloat16)))
    for bad in (math.inf, -math.inf, math.nan, 3.4e38):
        assert not kernels.to_bfloat16(torch.tensor([[1.0, bad]]))[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_finite_finds_one_bad_value(dtype: torch.dtype, bad: float) -> None:
    values = torch.full((3, 700), -torch.finfo(dtype).max, dtype=dtype)
    assert kernels.finite(values)
    values[2, 333] = bad
    assert not kernels.finite(values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sums_are_exact_over_the_whole_range(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    exponents = torch.randint(-120, 120, (5000,), generator=generator).float()
    a, b = (torch.randn(5000, generator=generator) * torch.exp2(exponents.roll(k)) for k in (0, 1))
    a, b = a.to(dtype), b.to(dtype)
    exact_a, exact_b = [Fraction(x) for x in a.tolist()], [Fraction(x) for x in b.tolist()]
    aa, ab, bb = kernels.gram_sums([a[None], b[None]], None)
    assert Fraction(aa, 1 << 1074) == sum(x * x for x in exact_a)
    assert Fraction(bb, 1 << 1074) == sum(x * x for x in exact_b)
    assert Fraction(ab, 1 << 1074) == sum(x * y for x, y in zip(exact_a, exact_b, strict=True))
    delta = b.float() - a.float()
    whole, kept = kernels.absolute_sums(
        a[None], b[None], ("largest", (int(delta.abs().median().view(torch.int32)), 0, 0, 0))
    )
    assert Fraction(whole, 1 << 1074) == sum(abs(Fraction(x)) for x in delta.tolist())
    large = delta[delta.abs() > delta.abs().median()]
    assert Fraction(kept, 1 << 1074) == sum(abs(Fraction(x)) for x in large.tolist())
    assert kept < whole


@pytest.mark.parametrize(
    "selection",
    [Everything(), Share(0.3, 1, NAME, 2), Share(0.0, 1, NAME, 2), Share(1.0, 1, NAME, 2), ALL, NONE, Largest(0, 40)],
)
@pytest.mark.parametrize("start", [0, 17, 1 << 33])
def test_selections_say_the_same_to_both(selection: Any, start: int) -> None:
    base, expert = models((9, 130), torch.bfloat16, 1)
    delta = expert.float() - base.float()
    mask = selection.mask(delta, start)
    kept = selection.kept(start, delta.numel())
    _, ours = kernels.absolute_sums(base, expert, kept)
    terms = delta if mask is None else torch.where(mask, delta, 0.0)
    assert Fraction(ours, 1 << 1074) == sum(abs(Fraction(x)) for x in terms.flatten().tolist())


def test_a_slice_across_the_counters_low_word_is_left_to_torch() -> None:
    assert Share(0.5, 0, NAME, 0).kept((1 << 32) - 3, 10) is None
    base, expert = models((1, 10), torch.bfloat16, 1)
    subject = Subject(NAME, (1, 10), 10, 1)
    combine = measured(METHODS["dare_linear"].start(subject, {"weight": (1.0,), "density": (0.5,)}), base, [expert], 1)
    whole = combine(Rows(base, (expert,), (1 << 32) - 3))
    parts = [combine(Rows(base[:, a:b], (expert[:, a:b],), (1 << 32) - 3 + a)) for a, b in ((0, 3), (3, 10))]
    assert torch.equal(bits(whole), bits(torch.cat(parts, dim=1)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("rank", "factors"), [(1, None), (4, "rows"), (7, "columns"), (64, None)])
def test_low_rank_changes(rank: int, factors: str | None, dtype: torch.dtype, in_torch: Any) -> None:
    random = torch.Generator().manual_seed(rank)
    for rows, columns in SHAPES:
        stored = models((rows, columns), torch.float32)[0].clamp(-6e4, 6e4).to(dtype)
        left, right = torch.randn(rows, rank, generator=random), torch.randn(rank, columns, generator=random)
        shape = {"rows": (rows, 1), "columns": (1, columns)}.get(factors or "", (0, 0))
        scale = None if factors is None else torch.rand(shape, generator=random, dtype=torch.float64)
        given = (stored, left, right, 0.37, scale)
        assert torch.equal(bits(low_rank.with_low_rank(*given)), bits(in_torch(low_rank.with_low_rank, *given)))


@pytest.mark.parametrize("shape", SHAPES)
def test_column_squares(shape: tuple[int, int], in_torch: Any) -> None:
    rows = models(shape, torch.float32)[0].clamp(-1e15, 1e15)
    found, expected = torch.zeros(2, shape[1], dtype=torch.float64)
    for start in range(0, shape[0], 3):
        low_rank.add_column_squares(rows[start : start + 3], found)
    in_torch(low_rank.add_column_squares, rows, expected)
    assert found.equal(expected)
