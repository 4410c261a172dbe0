"""The methods of angles and norms against float64 formulas; what they do where an angle or a norm is zero."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import references as ref
import tiny
import torch
from method_cases import SHAPES, assert_close, merge, tensors

from lowmem_aim.methods.method import Subject
from lowmem_aim.methods.registry import METHODS
from lowmem_aim.models.checkpoint import Checkpoint
from lowmem_aim.models.reader import Reader
from lowmem_aim.models.roles import TensorRoles


def apart(shape: tuple[int, ...], count: int) -> list[torch.Tensor]:
    """Base and experts at wide angles, with something in common."""
    base, *experts = tensors(shape, count)
    far = [tensors(shape, 1, seed=20 + i)[0] for i in range(count)]
    return [base, *(e + 0.5 * f for e, f in zip(experts, far, strict=True))]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("based", [False, True])
class TestAgainstFloat64:
    @pytest.mark.parametrize("along", [(True, False), (False, False), (False, True)])
    def test_nuslerp(self, shape: tuple[int, ...], based: bool, along: tuple[bool, bool]) -> None:
        base, *experts = apart(shape, 2)
        flatten, row_wise = along
        given = {"weight": (0.3, 0.5), "nuslerp_flatten": flatten, "nuslerp_row_wise": row_wise}
        ours = merge("nuslerp", base, experts, given, based=based)
        assert_close(ours, ref.nuslerp(base if based else None, experts, [0.3, 0.5], flatten, row_wise))

    @pytest.mark.parametrize("normalize", [False, True])
    def test_multislerp(self, shape: tuple[int, ...], based: bool, normalize: bool) -> None:
        base, *experts = apart(shape, 3)
        weight = [0.2, 0.7, 0.4]
        given = {"weight": tuple(weight), "normalize_weights": normalize}
        ours = merge("multislerp", base, experts, given, based=based)
        assert_close(ours, ref.multislerp(base if based else None, experts, weight, normalize))


@pytest.mark.parametrize("shape", SHAPES)
class TestMore:
    def test_karcher(self, shape: tuple[int, ...]) -> None:
        base, *experts = apart(shape, 3)
        models = [base, *experts] if torch.Size(shape).numel() > 2 else [base, base * 2]  # signs alone may cancel
        ours = merge("karcher", base, models, {"max_iter": 60, "tol": 1e-9}, based=False)
        assert_close(ours, ref.karcher(models, 60))

    @pytest.mark.parametrize("given", [(1.0, 1.0), (1.3, 0.8)])
    @pytest.mark.parametrize("inputs_first", [False, True])
    def test_widen(self, shape: tuple[int, ...], given: tuple[float, float], inputs_first: bool) -> None:
        base, *experts = tensors(shape, 3)
        parameters = dict(zip(("above_average_value_ratio", "score_calibration_value"), given, strict=True))
        ours = merge("widen", base, experts, parameters, input_dim=-2 if inputs_first else -1)
        assert_close(ours, ref.widen(base, experts, *given, inputs_first))


class TestDegenerate:
    def test_a_model_of_norm_zero_does_not_count(self) -> None:
        _, a, b = apart((5, 7), 2)
        zero = torch.zeros(5, 7)
        ours = merge("multislerp", zero, [a, zero, b], {"weight": (0.3, 9.0, 0.6)}, based=False)
        assert_close(ours, ref.multislerp(None, [a, b], [0.3, 0.6]))
        assert_close(merge("karcher", zero, [a, zero, b], {"max_iter": 60}, based=False), ref.karcher([a, b], 60))

    def test_where_all_are_zero_so_is_the_result(self) -> None:
        zero, base = torch.zeros(5, 7), tensors((5, 7), 1)[0]
        assert torch.equal(merge("karcher", zero, [zero, zero], {}, based=False), zero)
        assert torch.equal(merge("multislerp", base, [base, base], {"weight": (1.0, 1.0)}), base)
        assert torch.equal(merge("nuslerp", base, [base, base], {"weight": (1.0, 1.0)}), base)

    def test_opposite_models_give_the_first(self) -> None:
        base, expert = tensors((5, 7), 1)
        pair = [expert, -2.0 * expert]
        assert torch.equal(merge("karcher", base, pair, {}, based=False), expert)
        assert torch.equal(merge("multislerp", base, pair, {"weight": (1.0, 1.0)}, based=False), expert)

    @pytest.mark.parametrize("factor", [-3.0, -2.0, -0.7, -1.0])
    def test_opposite_vectors_of_any_length_stay_small(self, factor: float) -> None:
        for seed in range(20):
            delta = 0.01 * tensors((64, 64), 1, seed=seed)[0]
            base = torch.zeros(64, 64)
            largest = 3.0 * float(delta.abs().max())
            for method in ("nuslerp", "multislerp"):
                found = merge(method, base, [delta, factor * delta], {"weight": (0.5, 0.5)})
                assert float(found.abs().max()) <= largest

    def test_zeros_where_they_are_allowed(self) -> None:
        base, a, b = apart((5, 7), 2)
        assert_close(
            merge("karcher", base, [a, a, b], {"tol": 0.0, "max_iter": 60}, based=False), ref.karcher([a, a, b], 60)
        )
        assert_close(merge("karcher", base, [a, a], {"tol": 0.0}, based=False), a.double())
        for eps in (0.0, 1e-8):
            assert torch.equal(merge("multislerp", base, [a, b], {"weight": (0.0, 0.0), "eps": eps}), base)
            assert torch.equal(merge("multislerp", base, [a, a], {"weight": (1.0, -1.0), "eps": eps}, based=False), a)
        for based in (False, True):
            wrong = METHODS["multislerp"].check(Subject("w", (5, 7), 35, 2, 0, based=based), {"weight": (0.0, 0.0)})
            assert bool(wrong) == (not based)

    @pytest.mark.parametrize("along", [(True, False), (False, False), (False, True)])
    def test_nuslerp_of_one_direction_is_linear_and_weights_that_cancel_meet_half_way(
        self, along: tuple[bool, bool]
    ) -> None:
        _, expert = tensors((5, 7), 1)
        given: dict[str, Any] = {"nuslerp_flatten": along[0], "nuslerp_row_wise": along[1]}
        ours = merge("nuslerp", expert, [expert, 2.0 * expert], {"weight": (1.0, 3.0), **given}, based=False)
        assert_close(ours, expert.double() * 1.75)
        ours = merge("nuslerp", expert, [expert, 2.0 * expert], {"weight": (1.0, -1.0), **given}, based=False)
        assert_close(ours, expert.double() * 1.5)

    def test_nuslerp_of_a_row_or_column_of_zeros_turns_by_a_right_angle(self) -> None:
        a, b = (t.clone() for t in tensors((5, 7), 1))
        a[2], b[:, 3] = 0.0, 0.0
        for row_wise in (False, True):
            given = {"weight": (1.0, 1.0), "nuslerp_flatten": False, "nuslerp_row_wise": row_wise}
            ours = merge("nuslerp", a, [a, b], given, based=False)
            assert_close(ours, ref.nuslerp(None, [a, b], [1.0, 1.0], False, row_wise))

    def test_widen_of_columns_of_zeros_turns_nothing(self) -> None:
        base, *experts = (t.clone() for t in tensors((6, 8), 2))
        base[:, 2], experts[0][:, 5], experts[1][:, 5] = 0.0, 0.0, 0.0
        assert_close(merge("widen", base, experts, {}), ref.widen(base, experts, 1.0, 1.0))

    def test_widen_of_a_lone_expert_is_that_expert(self) -> None:
        base, expert = tensors((6, 8), 1)
        assert_close(merge("widen", base, [expert], {}), expert.double())

    def test_widen_keeps_its_accuracy_at_any_magnitude(self) -> None:
        base, *experts = tensors((300, 40), 2)
        scale = torch.logspace(-30, 15, 40)
        wide = [t * scale for t in (base, *experts)]
        found = merge("widen", wide[0], wide[1:], {}, step=7)
        truth = ref.widen(wide[0], wide[1:], 1.0, 1.0)
        assert float(((found.double() - truth).abs() / scale).max()) < 1e-6

    def test_too_many_columns_for_nuslerp_are_refused_before_work(self) -> None:
        given = {"weight": (1.0, 1.0), "nuslerp_flatten": False, "nuslerp_row_wise": True}
        stack = Subject("experts", (8, 4096, 8192), 8 * 4096 * 8192, 2)
        assert "columns" in METHODS["nuslerp"].check(stack, given)
        assert not METHODS["nuslerp"].check(stack, given | {"nuslerp_flatten": True})


def test_the_outline_knows_which_weights_have_their_inputs_first(tmp_path: Path) -> None:
    with Checkpoint.open(tiny.build("gpt2", tmp_path / "gpt2"), "gpt2") as checkpoint:
        found = _roles(checkpoint, use_cache=True).inputs_first
        assert found == _roles(checkpoint, use_cache=True).inputs_first  # from the cache
    assert "transformer.h.0.attn.c_attn.weight" in found
    assert "transformer.wte.weight" in found
    with Checkpoint.open(tiny.build("gpt_oss", tmp_path / "oss"), "oss") as checkpoint:
        found = _roles(checkpoint, use_cache=False).inputs_first
    assert "model.layers.0.mlp.experts.down_proj" in found
    assert "model.embed_tokens.weight" in found
    assert "lm_head.weight" not in found
    assert "model.layers.0.self_attn.q_proj.weight" not in found


def _roles(checkpoint: Checkpoint, use_cache: bool) -> TensorRoles:
    with Reader(use_cache) as reader:
        return reader.roles(checkpoint)
