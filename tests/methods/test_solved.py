"""Methods that solve: against their formulas in float64, in many tiles; what they keep; and where matrices may lie."""

from __future__ import annotations

from pathlib import Path

import pytest
import solving_cases as cases
import torch
from method_cases import CPU, merge, tensors
from solving_cases import Space, inputs, moment_of, solve
from torch import Tensor

from lowmem_aim.methods import linears, moments, solved
from lowmem_aim.methods.moments import Moment, Tiles, moment_bytes
from lowmem_aim.methods.systems import System, Term

WEIGHT = (0.5, 1.0, 0.7)
METHODS_OF_TEXTS = ("regmean", "regmean_plus")


@pytest.fixture(autouse=True)
def _many_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "TILE", 16)
    monkeypatch.setattr(solved, "TILE", 16)
    monkeypatch.setattr(linears, "ROWS", 8)


def error(ours: Tensor, base: Tensor, truth: Tensor) -> float:
    """The error of a merged delta relative to the delta."""
    return float((ours.double() - base.double() - truth).norm() / truth.norm())


def small(shape: tuple[int, ...], experts: int) -> list[Tensor]:
    """Base and experts, the base so small that rounding it does not count."""
    base, *others = tensors(shape, experts)
    return [base * 1e-3, *(base * 1e-3 + (other - base) for other in others)]


@pytest.mark.parametrize("shape", [(31, 37), (70, 16), (9, 65), (1, 1)])
@pytest.mark.parametrize("ridge", [1e-2, 1e-1])
def test_covariance_is_its_formula(shape: tuple[int, int], ridge: float) -> None:
    base, *experts = small(shape, 3)
    truth = 0.8 * cases.covariance([e - base for e in experts], WEIGHT, ridge)
    given = {"weight": WEIGHT, "ridge": ridge, "lambda": 0.8}
    assert error(solve("covariance", base, experts, given), base, truth) <= 1e-4
    turned = solve("covariance", base.T.contiguous(), [e.T.contiguous() for e in experts], given, transposed=True)
    assert error(turned.T, base, truth) <= 1e-4


@pytest.mark.parametrize("shape", [(31, 37), (70, 16), (9, 65)])
@pytest.mark.parametrize("shrink", [0.9, 0.5])
def test_regmean_is_its_formula(shape: tuple[int, int], shrink: float) -> None:
    base, *experts = small(shape, 3)
    x, space = inputs(shape[1], 3), Space()
    truth = cases.regmean([e - base for e in experts], x, WEIGHT, 1e-4, shrink)
    given = {"weight": WEIGHT, "shrink": shrink}
    found = [[moment_of(one, space) for one in x]]
    for method in METHODS_OF_TEXTS:
        assert error(solve(method, base, experts, given, space, found), base, truth) <= 1e-4
    turned = [t.T.contiguous() for t in (base, *experts)]
    ours = solve("regmean", turned[0], turned[1:], given, space, found, transposed=True)
    assert error(ours.T, base, truth) <= 1e-4


def test_each_matrix_of_a_stack_is_solved_by_itself() -> None:
    base, *experts = small((3, 19, 21), 2)
    ours = solve("covariance", base, experts, {})
    turned = solve("covariance", base.mT.contiguous(), [e.mT.contiguous() for e in experts], {}, transposed=True)
    x, space = [inputs(21, 2, seed=seed) for seed in range(3)], Space()
    found = [[moment_of(one, space) for one in of_matrix] for of_matrix in x]
    regressed = solve("regmean", base, experts, {}, space, found)
    for number in range(3):
        deltas = [(e - base)[number] for e in experts]
        truth = cases.covariance(deltas, (1.0, 1.0), 1e-2)
        assert error(ours[number], base[number], truth) <= 1e-4
        assert error(turned[number].T, base[number], truth) <= 1e-4
        truth = cases.regmean(deltas, x[number], (1.0, 1.0), 1e-4, 0.9)
        assert error(regressed[number], base[number], truth) <= 1e-4


@pytest.mark.parametrize("experts", [1, 3])
def test_one_expert_and_equal_experts_are_kept(experts: int) -> None:
    base, expert = tensors((31, 37), 1)
    x, space = inputs(37, experts), Space()
    found = [[moment_of(one, space) for one in x]]
    for method in METHODS_OF_TEXTS:
        ours = solve(method, base, [expert] * experts, {}, space, found)
        assert float((ours - expert).abs().max()) <= 1e-6
    wide = solve("covariance", base, [expert] * experts, {"ridge": 1e-9})  # a larger one draws to the base
    assert float((wide - expert).abs().max()) <= 1e-4


def test_a_linear_that_no_text_has_reached_is_the_mean() -> None:
    base, *experts = tensors((31, 37), 3)
    mean = sum((w * (e - base).double() for w, e in zip(WEIGHT, experts, strict=True)), torch.zeros(())) / sum(WEIGHT)
    space = Space()
    for nothing in (None, Moment(37, space), moment_of(torch.zeros(5, 37), space)):
        ours = solve("regmean", base, experts, {"weight": WEIGHT}, space, [[nothing] * 3])
        assert error(ours, base, mean) <= 1e-6
    assert space.told == []


def test_an_expert_that_no_text_has_reached_leaves_the_matter_to_the_others() -> None:
    base, *experts = small((31, 37), 3)
    space = Space()
    only = moment_of(torch.randn(200, 37, generator=torch.Generator().manual_seed(2)), space)
    ours = solve("regmean", base, experts, {"ridge": 1e-7}, space, [[only, None, None]])
    assert error(ours, base, (experts[0] - base).double()) <= 1e-3


def test_an_expert_that_is_the_base_does_not_count_in_a_covariance() -> None:
    base, *experts = small((31, 37), 2)
    alone = solve("covariance", base, experts, {})
    assert torch.equal(solve("covariance", base, [*experts, base], {}), alone)
    assert torch.equal(solve("covariance", base, [base], {}), base)


def test_a_singular_system_is_solved_with_a_larger_ridge_which_is_told() -> None:
    base, *experts = small((31, 37), 2)
    x = [torch.ones(4, 37), torch.ones(4, 37)]  # of rank 1
    space = Space()
    found = [[moment_of(one, space) for one in x]]
    ours = solve("regmean", base, experts, {"shrink": 1.0, "ridge": 0.0}, space, found)
    (told,) = space.told
    assert "solved with a ridge of 1e-0" in told
    assert "singular" in told
    assert ours.isfinite().all()


def test_a_system_that_no_ridge_makes_regular_is_averaged_which_is_told() -> None:
    base, *experts = tensors((31, 37), 2)
    space = Space()
    wrong = moment_of(torch.full((4, 37), 1e19), space)  # overflows: the moment is infinite
    ours = solve("regmean", base, experts, {}, space, [[wrong, wrong]])
    (told,) = space.told
    assert "averaged" in told
    assert error(ours, base, sum((e - base).double() for e in experts) / 2) <= 1e-6  # type: ignore[operator]


@pytest.mark.parametrize(("rest", "factor"), [("average", 1.0), ("task_arithmetic", 2.0)])
def test_what_is_no_linear_is_the_mean_or_task_arithmetic(rest: str, factor: float) -> None:
    base, *experts = tensors((31, 37), 2)
    mean = sum(((e - base).double() for e in experts), torch.zeros(())) / 2
    for method in ("covariance", *METHODS_OF_TEXTS):
        ours = merge(method, base, experts, {"weight": (1.0, 1.0), "rest": rest})
        assert error(ours, base, factor * mean) <= 1e-6


@pytest.mark.parametrize("transposed", [False, True])
def test_where_matrices_lie_and_how_many_threads_compute_change_no_byte(tmp_path: Path, transposed: bool) -> None:
    base, *experts = tensors((61, 53), 3)
    found = []
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)  # as a merge has it
        for ram_bytes, workers in ((1 << 30, 1), (1 << 30, 3), (20_000, 2), (0, 2)):
            space = Space(ram_bytes, tmp_path, workers)
            with space.store:
                found.append(solve("covariance", base, experts, {}, space, transposed=transposed))
                assert space.store._left["ram"] == ram_bytes  # all matrices are gone
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, found[0]) for one in found)


@pytest.mark.parametrize("size", [1, 15, 16, 17, 40, 64])
def test_the_memory_of_a_matrix_is_known_beforehand(size: int) -> None:
    space = Space(1 << 20)
    moment = moment_of(torch.ones(3, size), space)
    assert moment_bytes(size) == (1 << 20) - space.store._left["ram"]
    moment.drop()
    assert moment.is_zero
    assert space.store._left["ram"] == 1 << 20


@pytest.mark.parametrize("size", [5, 16, 50])
def test_a_system_in_tiles_is_solved_as_a_whole(size: int) -> None:
    generator = torch.Generator().manual_seed(1)
    space = Space()
    x, extra = torch.randn(60, size, generator=generator), torch.rand(size, generator=generator)
    system = System([Term(moment_of(x, space), 0.5, extra)], 0.1, space)
    rows = torch.randn(7, size, generator=generator)
    truth = rows.double() @ torch.linalg.inv(0.5 * x.double().T @ x.double() + torch.diag(extra.double() + 0.1))
    assert torch.allclose(system.solve(rows.clone()).double(), truth, rtol=1e-4, atol=1e-6)


def test_tiles_that_were_never_put_are_zero() -> None:
    tiles = Tiles(40, Space())
    assert tiles.is_zero
    assert tiles.get((2, 1)) is None
    into = torch.ones(2, 40)
    Moment(40, Space()).times(torch.ones(2, 40), into)
    assert torch.equal(into, torch.ones(2, 40))
    assert torch.equal(Moment(40, Space()).diagonal(), torch.zeros(40, device=CPU))
