"""The methods that rank a tensor's elements: della, sce, arcee_fusion; against float64 formulas, and their traps."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import references as ref
import torch
from conftest import Place
from method_cases import CPU, NAME, SHAPES, assert_close, measured, merge, tensors

from lowmem_aim.errors import MemoryBudgetError
from lowmem_aim.merging.slices import Stride
from lowmem_aim.methods.arcee_fusion import order_statistics
from lowmem_aim.methods.masks import draws_of
from lowmem_aim.methods.method import Subject
from lowmem_aim.methods.registry import METHODS


@pytest.mark.parametrize("shape", SHAPES)
class TestAgainstFloat64:
    @pytest.mark.parametrize("method", ["della", "della_linear"])
    @pytest.mark.parametrize("rescale", [False, True])
    def test_della(self, shape: tuple[int, ...], method: str, rescale: bool) -> None:
        base, *experts = tensors(shape, 3)
        weight, densities, epsilons = [0.5, 1.0, 0.7], [0.3, 0.5, 1.0], [0.2, 0.45, 0.15]
        given = {"weight": tuple(weight), "density": tuple(densities), "epsilon": tuple(epsilons), "rescale": rescale}
        ours = merge(method, base, experts, given, seed=3)
        diffs = ref.deltas(base, experts)
        masks = []
        for i, (d, k, e) in enumerate(zip(diffs, densities, epsilons, strict=True)):
            draws = draws_of(seed=3, name=NAME, position=i, start=0, count=d.numel(), device=CPU).reshape(shape)
            masks.append((draws.double() + 2**31) / 2**32 < ref.della_chances(d, k, e))
        sparse = [d * m * ref.rescale_factor(d, m, rescale, k) for d, m, k in zip(diffs, masks, densities, strict=True)]
        elect = method == "della"
        truth = ref.task_arithmetic_tail(base, sparse, weight, elect=elect, normalize=elect, scale=1.0)
        assert_close(ours, truth)

    @pytest.mark.parametrize("topk", [0.0, 0.02, 0.4, 1.0])
    def test_sce(self, shape: tuple[int, ...], topk: float) -> None:
        base, *experts = tensors(shape, 3)
        experts[1] = torch.where(experts[1] > 0.5, experts[0], experts[1])
        assert_close(merge("sce", base, experts, {"select_topk": topk}), ref.sce(base, experts, topk))

    def test_arcee_fusion(self, shape: tuple[int, ...]) -> None:
        base, expert = tensors(shape, 1)
        expert = torch.where((expert * 40).round() % 3 == 0, expert + 0.7, expert)  # with elements that stand out
        ours = merge("arcee_fusion", base, [expert], {})
        assert torch.equal(ours.double(), ref.arcee_fusion(base, expert))


class TestDella:
    def test_the_kept_share_is_the_density_and_larger_elements_stay_more_often(self) -> None:
        base, expert = torch.zeros(400, 500), torch.arange(1.0, 501.0).expand(400, 500).contiguous()
        given = {"weight": (1.0,), "density": (0.4,), "epsilon": (0.3,), "rescale": False}
        kept = merge("della_linear", base, [expert], given) != 0
        assert abs(float(kept.double().mean()) - 0.4) < 3 * math.sqrt(0.24 / kept.numel())
        for part, chance in ((kept[:, :50], 0.13), (kept[:, -50:], 0.67)):
            assert abs(float(part.double().mean()) - chance) < 4 * math.sqrt(chance * (1 - chance) / part.numel())

    def test_a_norm_is_one_row(self) -> None:
        base, expert = torch.zeros(4000), torch.arange(1.0, 4001.0)
        given = {"weight": (1.0,), "density": (0.5,), "epsilon": (0.49,), "rescale": False}
        kept = merge("della_linear", base, [expert], given) != 0
        assert kept[:400].sum() < 60
        assert kept[-400:].sum() > 340

    @pytest.mark.parametrize(("density", "epsilon"), [(0.1, 0.15), (0.9, 0.1), (0.1, 0.1)])
    def test_chances_beyond_0_and_1_are_refused_before_work(self, place: Place, density: float, epsilon: float) -> None:
        done = place.merge("--density", density, "-p", f"epsilon={epsilon}", method="della")
        place.refused(done, 2, "density - epsilon and density + epsilon must lie between 0 and 1")

    def test_a_density_of_0_or_1_needs_no_room_for_epsilon(self) -> None:
        subject = Subject(NAME, (3, 4), 12, 2)
        assert not METHODS["della"].check(subject, {"density": (1.0, 0.0), "epsilon": (0.15, 0.15)})
        base, expert, other = tensors((3, 4), 2)
        assert_close(merge("della", base, [expert], {"weight": (1.0,)}), expert.double())
        given = {"weight": (1.0, 1.0), "density": (1.0, 0.0), "epsilon": (0.15, 0.15)}
        assert_close(merge("della", base, [expert, other], given), expert.double())


class TestSce:
    def test_a_topk_that_selects_nothing_is_the_base(self) -> None:
        """mergekit returns a tensor of another rank there."""
        base, *experts = tensors((3, 4), 2)
        assert torch.equal(merge("sce", base, experts, {"select_topk": 0.01}), base)
        assert torch.equal(merge("sce", base, [experts[0]] * 2, {"select_topk": 0.9}), base)  # no variance at all

    def test_equal_variances_are_kept_from_the_lowest_index_on(self) -> None:
        base = torch.zeros(8)
        experts = [torch.ones(8), torch.full((8,), 3.0)]
        ours = merge("sce", base, experts, {"select_topk": 0.5})
        assert ours.nonzero().flatten().tolist() == [0, 1, 2, 3]

    def test_no_change_is_the_base(self) -> None:
        base, _ = tensors((3, 4), 1)
        assert torch.equal(merge("sce", base, [base, base], {}), base)


class TestArceeFusion:
    def test_the_divergence_of_close_rows_is_no_noise(self) -> None:
        """In float32 the divergence of such rows is as often negative as not."""
        generator = torch.Generator().manual_seed(0)
        base = torch.randn(64, 300, generator=generator) * 0.02
        expert = base + 1e-5 * torch.randn(64, 300, generator=generator)
        ours = merge("arcee_fusion", base, [expert], {})
        assert torch.equal(ours.double(), ref.arcee_fusion(base, expert))
        assert 0.01 < float((ours != base).double().mean()) < 0.2

    def test_the_same_model_is_that_model(self) -> None:
        base, _ = tensors((5, 7), 1)
        assert torch.equal(merge("arcee_fusion", base, [base], {}), base)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_it_is_written_in_the_dtype_that_is_asked_for(
        self, place: Place, dtype: torch.dtype, tmp_path: Path
    ) -> None:
        """mergekit writes float32."""
        from safetensors.torch import load_file

        name = str(dtype).removeprefix("torch.")
        command = ("merge", place.out, "--method", "arcee_fusion", "--base", place.folder / "base")
        done = place.run(*command, "--expert", place.folder / "math", "--dtype", name)
        assert done.code == 0, done.err
        assert {value.dtype for value in load_file(place.out / "model.safetensors").values()} == {dtype}

    @pytest.mark.parametrize("step", [1, 5, 1 << 30])
    def test_order_statistics_are_those_of_a_sort(self, step: int) -> None:
        generator = torch.Generator().manual_seed(1)
        values = torch.randn(83, 11, generator=generator, dtype=torch.float64)
        values *= torch.logspace(-200, 200, 11, dtype=torch.float64)
        values[::3] = values[0].clone()
        values[1::9] = -0.0
        values[2::9] = 0.0
        places = [0, 17, 400, 400, 700, 912]

        def of_slice(rows: Any) -> torch.Tensor:
            first = rows.start // 11
            return values[first : first + rows.count].flatten()

        found = measured(order_statistics(of_slice, places), values.float(), [values.float()], step)  # type: ignore[arg-type]
        ordered = values.flatten().sort().values
        assert found == [float(ordered[place]) for place in places]


def test_a_whole_row_that_does_not_fit_ends_the_merge_instead_of_being_cut() -> None:
    with pytest.raises(MemoryBudgetError, match="5000 rows"):
        Stride(1 << 20).too_large(5000, 1, NAME, fixed=True)
