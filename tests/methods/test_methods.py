"""Every method at float32 against plain float64 formulas, on tensors of odd shapes; and slicing changes nothing."""

from __future__ import annotations

import inspect

import pytest
import references as ref
import torch
from method_cases import CPU, NAME, PARAMETERS, SHAPES, assert_close, measured, merge, slices, tensors

from lowmem_aim.methods.masks import keep_mask
from lowmem_aim.methods.method import Subject
from lowmem_aim.methods.registry import METHODS
from lowmem_aim.methods.ties import largest


@pytest.mark.parametrize("shape", SHAPES)
class TestAgainstFloat64:
    @pytest.mark.parametrize("normalize", [True, False])
    def test_linear(self, shape: tuple[int, ...], normalize: bool) -> None:
        _, *models = tensors(shape, 3)
        ours = merge("linear", models[0], models, {"weight": (0.2, 0.5, 0.9), "normalize": normalize})
        assert_close(ours, ref.linear(models, [0.2, 0.5, 0.9], normalize))

    @pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0])
    def test_slerp(self, shape: tuple[int, ...], t: float) -> None:
        base, _ = tensors(shape, 1)
        expert = tensors(shape, 1, seed=9)[0]  # at a wide angle
        assert_close(merge("slerp", base, [expert], {"t": t}), ref.slerp(base, expert, t))

    @pytest.mark.parametrize(("normalize", "scale"), [(False, 1.0), (True, 0.7)])
    def test_task_arithmetic(self, shape: tuple[int, ...], normalize: bool, scale: float) -> None:
        base, *experts = tensors(shape, 3)
        weight = [0.5, 1.0, -0.25]
        ours = merge(
            "task_arithmetic", base, experts, {"weight": tuple(weight), "normalize": normalize, "lambda": scale}
        )
        sparse = ref.deltas(base, experts)
        truth = ref.task_arithmetic_tail(base, sparse, weight, elect=False, normalize=normalize, scale=scale)
        assert_close(ours, truth)

    @pytest.mark.parametrize("density", [0.0, 0.01, 0.3, 0.999, 1.0])
    @pytest.mark.parametrize(("normalize", "rescale"), [(True, False), (False, True), (True, "density")])
    def test_ties(self, shape: tuple[int, ...], density: float, normalize: bool, rescale: bool | str) -> None:
        base, *experts = tensors(shape, 3)
        weight, densities = [0.5, 1.0, 0.7], [density, 0.5, 1.0]
        given = {"weight": tuple(weight), "density": tuple(densities), "normalize": normalize, "rescale": rescale}
        ours = merge("ties", base, experts, given | {"lambda": 0.8})
        diffs = ref.deltas(base, experts)
        masks = [ref.largest_mask(d, k) for d, k in zip(diffs, densities, strict=True)]
        sparse = [d * m * ref.rescale_factor(d, m, rescale, k) for d, m, k in zip(diffs, masks, densities, strict=True)]
        assert_close(ours, ref.task_arithmetic_tail(base, sparse, weight, elect=True, normalize=normalize, scale=0.8))

    @pytest.mark.parametrize("method", ["breadcrumbs", "breadcrumbs_ties"])
    @pytest.mark.parametrize("rescale", [False, True])
    def test_breadcrumbs(self, shape: tuple[int, ...], method: str, rescale: bool) -> None:
        base, *experts = tensors(shape, 4)
        weight, densities, gammas = [0.5, 1.0, 0.7, 0.2], [0.0, 0.5, 0.9, 1.0], [0.5, 0.1, 0.3, 0.2]
        given = {"weight": tuple(weight), "density": tuple(densities), "gamma": tuple(gammas), "rescale": rescale}
        ours = merge(method, base, experts, given)
        diffs = ref.deltas(base, experts)
        masks = [ref.middle_mask(d, k, g) for d, k, g in zip(diffs, densities, gammas, strict=True)]
        sparse = [d * m * ref.rescale_factor(d, m, rescale, k) for d, m, k in zip(diffs, masks, densities, strict=True)]
        elect = method == "breadcrumbs_ties"
        assert_close(ours, ref.task_arithmetic_tail(base, sparse, weight, elect=elect, normalize=False, scale=1.0))

    def test_breadcrumbs_that_drop_nothing_keep_as_ties_do(self, shape: tuple[int, ...]) -> None:
        base, expert = tensors(shape, 1)
        for gamma in (0.0, 0.5 / base.numel()):
            density = 0.5 if base.numel() > 1 else 1.0  # of one element ties keeps that one, breadcrumbs none
            given = {"weight": (1.0,), "density": (density,), "gamma": (gamma,)}
            ours = merge("breadcrumbs", base, [expert], given)
            assert torch.equal(ours, merge("ties", base, [expert], {"weight": (1.0,), "density": (density,)}))

    @pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
    @pytest.mark.parametrize("rescale", [True, False, "density"])
    def test_dare(self, shape: tuple[int, ...], method: str, rescale: bool | str) -> None:
        base, *experts = tensors(shape, 3)
        weight, densities = [0.5, 1.0, 0.7], [0.0, 0.5, 1.0]
        given = {"weight": tuple(weight), "density": tuple(densities), "rescale": rescale}
        ours = merge(method, base, experts, given, seed=3)
        diffs = ref.deltas(base, experts)
        masks = [
            keep_mask(k, seed=3, name=NAME, position=i, start=0, count=base.numel(), device=CPU).reshape(shape)
            for i, k in enumerate(densities)
        ]
        sparse = [d * m * ref.rescale_factor(d, m, rescale, k) for d, m, k in zip(diffs, masks, densities, strict=True)]
        elect = method == "dare_ties"
        assert_close(ours, ref.task_arithmetic_tail(base, sparse, weight, elect=elect, normalize=False, scale=1.0))

    @pytest.mark.parametrize("filter_wise", [False, True])
    @pytest.mark.parametrize("count", [2, 4])
    def test_model_stock(self, shape: tuple[int, ...], filter_wise: bool, count: int) -> None:
        base, *experts = tensors(shape, count)
        experts = [e + 0.1 * (1 + i) * experts[0] for i, e in enumerate(experts)]  # deltas with something in common
        truth = ref.model_stock(base, experts, filter_wise)
        assert_close(merge("model_stock", base, experts, {"filter_wise": filter_wise}), truth)

    @pytest.mark.parametrize("t", [0.0, 0.01, 5.0])
    def test_nearswap(self, shape: tuple[int, ...], t: float) -> None:
        base, expert = tensors(shape, 1)
        ours = merge("nearswap", base, [expert], {"t": t})
        assert_close(ours, ref.nearswap(base, expert, t))
        assert t < 5.0 or torch.equal(ours, expert)

    @pytest.mark.parametrize("epsilon", [0.0, 0.05, 0.1])
    def test_ram(self, shape: tuple[int, ...], epsilon: float) -> None:
        base, *experts = tensors(shape, 3)
        diffs = ref.deltas(base, experts)
        assert_close(merge("ram", base, experts, {"epsilon": epsilon}), ref.ram(base, diffs, epsilon))
        given = {"epsilon": epsilon, "r": 0.3, "alpha": 0.6}
        assert_close(merge("ramplus_tl", base, experts, given), ref.ram(base, diffs, epsilon, (0.3, 0.6)))

    def test_passthrough(self, shape: tuple[int, ...]) -> None:
        base, expert = tensors(shape, 1)
        assert torch.equal(merge("passthrough", base, [expert], {}), expert)
        assert_close(merge("passthrough", base, [expert], {"scale": (0.5,)}), expert.double() * 0.5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("density", [0.0, 0.1, 0.37, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("step", [1, 3, 1 << 30])
def test_the_mask_of_ties_is_the_k_largest_equal_ones_by_index(
    shape: tuple[int, ...], density: float, step: int
) -> None:
    base, expert = tensors(shape, 1)
    base, expert = (base * 4).round() / 4, (expert * 8).round() / 8  # so coarse that most magnitudes are shared
    subject = Subject(NAME, shape, base.numel(), 1)
    script = largest(subject, (density,))
    (cut,) = measured(script, base, [expert], step)  # type: ignore[arg-type]
    parts = []
    for rows in slices(base, [expert], step):
        delta = rows.experts[0] - rows.base
        mask = cut.mask(delta, rows.start)
        parts.append(torch.ones_like(delta, dtype=torch.bool) if mask is None else mask)
    mask = torch.cat(parts).reshape(shape)
    truth = ref.largest_mask(expert - base, density)
    # Whether a zero stays changes nothing, so zeros may be kept beyond k.
    assert torch.equal(mask & (expert != base), truth & (expert != base))


def test_every_method_is_among_those_tested() -> None:
    assert set(PARAMETERS) == set(METHODS)


@pytest.mark.parametrize("method", PARAMETERS)
@pytest.mark.parametrize("shape", [(97,), (61, 37), (3, 5, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slices_and_threads_change_no_bit(method: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    experts = METHODS[method].most or 3
    base, *others = tensors(shape, experts, dtype)
    whole = merge(method, base, others, PARAMETERS[method])
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            for step in (1, 7, 1 << 30):
                assert torch.equal(merge(method, base, others, PARAMETERS[method], step), whole), (count, step)
    finally:
        torch.set_num_threads(threads)


def test_threads_change_no_bit_of_a_large_tensor() -> None:
    base, *experts = tensors((301, 2003), 2, torch.bfloat16)  # above torch's grain size, so that it does split the work
    given = {"weight": (0.3, 0.4), "density": (0.2, 0.5), "rescale": True}
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            results += [merge("ties", base, experts, given, step) for step in (64, 1 << 30)]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results[1:])


class TestTraps:
    """What today's tools get wrong."""

    def test_ties_keeps_exactly_k_of_equal_magnitudes_lowest_index_first(self) -> None:
        base = torch.zeros(10)
        expert = torch.tensor([0.5, -1.0, 1.0, 0.5, -1.0, 1.0, 2.0, 0.25, 1.0, -0.5])
        ours = merge("ties", base, [expert], {"weight": (1.0,), "density": (0.4,), "normalize": True})
        assert ours.nonzero().flatten().tolist() == [1, 2, 4, 6]
        for step in (1, 3):
            assert torch.equal(merge("ties", base, [expert], {"weight": (1.0,), "density": (0.4,)}, step), ours)

    def test_ties_keeps_one_element_at_least_and_none_at_density_0(self) -> None:
        base, expert = tensors((3, 3), 1)
        assert torch.equal(merge("ties", base, [expert], {"weight": (1.0,), "density": (0.0,)}), base)
        kept = merge("ties", base, [expert], {"weight": (1.0,), "density": (0.1,)}) != base
        assert kept.flatten().nonzero().flatten().tolist() == [int((expert - base).abs().argmax())]

    def test_a_merge_of_bfloat16_is_rounded_once(self) -> None:
        """Arithmetic in bfloat16 rounds a good third of the elements wrongly."""
        _, *models = tensors((200, 300), 3, torch.bfloat16)
        weight = [0.3, 0.5, 0.4]
        right = ref.linear(models, weight).to(torch.bfloat16)
        ours = merge("linear", models[0], models, {"weight": tuple(weight)}).to(torch.bfloat16)
        narrow = sum(w * model.to(torch.bfloat16) for w, model in zip(weight, models, strict=True)) / sum(weight)
        assert float((ours != right).double().mean()) < 1e-3
        assert float((narrow != right).double().mean()) > 0.3

    def test_no_delta_gives_the_base(self) -> None:
        base, _ = tensors((5, 7), 1)
        given = {"weight": (1.0,), "density": (0.5,), "rescale": True}
        for method in ("ties", "dare_ties", "dare_linear"):
            assert torch.equal(merge(method, base, [base], given), base), method

    def test_slerp_of_a_zero_tensor_is_linear(self) -> None:
        zero, expert = torch.zeros(3, 4), tensors((3, 4), 1)[1]
        assert torch.equal(merge("slerp", zero, [expert], {"t": 0.25}), expert * 0.25)

    @pytest.mark.parametrize("filter_wise", [False, True])
    def test_model_stock_of_opposite_deltas_is_the_base(self, filter_wise: bool) -> None:
        base, expert = tensors((5, 7), 1, torch.bfloat16)
        delta = expert - base
        assert torch.equal(merge("model_stock", base, [base + delta, base - delta], {"filter_wise": filter_wise}), base)

    @pytest.mark.parametrize("filter_wise", [False, True])
    def test_model_stock_without_a_delta_is_the_base(self, filter_wise: bool) -> None:
        base, _ = tensors((5, 7), 1)
        assert torch.equal(merge("model_stock", base, [base, base], {"filter_wise": filter_wise}), base)

    def test_slerp_of_opposite_tensors_is_linear(self) -> None:
        base, _ = tensors((3, 4), 1)
        assert_close(merge("slerp", base, [-base], {"t": 0.25}), base.double() * 0.5)

    def test_weights_that_cancel_divide_by_one_in_the_task_vector_family(self) -> None:
        base, *experts = tensors((4, 5), 2)
        given = {"weight": (1.0, -1.0), "normalize": True}
        truth = ref.task_arithmetic_tail(
            base, ref.deltas(base, experts), [1.0, -1.0], elect=False, normalize=False, scale=1.0
        )
        assert_close(merge("task_arithmetic", base, experts, given), truth)

    def test_weights_that_cancel_are_an_error_in_linear(self) -> None:
        subject = Subject("w", (4, 5), 20, 2, 0)
        check = METHODS["linear"].check
        assert "sum to zero" in check(subject, {"weight": (1.0, -1.0), "normalize": True})
        assert not check(subject, {"weight": (1.0, -1.0), "normalize": False})


def test_one_expert_at_full_density_and_weight_is_that_expert_to_a_rounding() -> None:
    base, expert = tensors((31, 37), 1)
    for method in ("task_arithmetic", "ties", "dare_linear", "dare_ties"):
        assert_close(merge(method, base, [expert], {"weight": (1.0,)}), expert.double())


def test_combine_never_writes_to_its_inputs() -> None:
    for method, given in PARAMETERS.items():
        base, *experts = tensors((9, 11), METHODS[method].most or 3)
        before = [t.clone() for t in (base, *experts)]
        merge(method, base, experts, given, step=2)
        assert all(torch.equal(a, b) for a, b in zip(before, (base, *experts), strict=True)), method


def test_parameters_come_from_the_signature_with_mergekits_names_and_defaults() -> None:
    assert {name: p.default for name, p in METHODS["ties"].parameters.items()} == {
        "weight": inspect.Parameter.empty,
        "density": 1.0,
        "normalize": True,
        "rescale": False,
        "lambda": 1.0,
        "int8_mask": False,
    }
    assert METHODS["dare_ties"].parameters["rescale"].default is True
    assert METHODS["dare_linear"].parameters["normalize"].default is False
    assert METHODS["slerp"].parameters["t"].required
