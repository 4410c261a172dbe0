"""Moments of inputs: rows are added in fixed groups, and shared as long as nothing contradicts that."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from moment_cases import CPU, whole
from torch import Tensor

from lowmem_aim.blocks.observer import Operand
from lowmem_aim.methods.moments import MatrixSpace
from lowmem_aim.solving import input_moments
from lowmem_aim.solving.input_moments import InputMoments
from lowmem_aim.system.tensor_store import TensorStore

Q, K = (Operand(name, 1, 6, (1, 6)) for name in ("q.weight", "k.weight"))
STACK = Operand("experts", 3, 6, (3, 1, 6))


@pytest.fixture
def moments(monkeypatch: pytest.MonkeyPatch) -> Iterator[InputMoments]:
    monkeypatch.setattr(input_moments, "ROWS", 4)
    monkeypatch.setattr(input_moments, "EXPERT_ROWS", 2)
    with TensorStore(CPU, device_bytes=0, ram_bytes=1 << 20, folder=None) as store:
        yield InputMoments(MatrixSpace(store, CPU), "expert")


def rows(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))


def is_moment_of(found: Tensor, *parts: Tensor) -> bool:
    x = torch.cat(parts).double()
    return torch.allclose(found.double(), x.T @ x, rtol=1e-5, atol=1e-5)


def test_a_later_forward_that_contradicts_sharing_ends_it_from_there_on(moments: InputMoments) -> None:
    both, only_q, only_k = rows(7), rows(5, 1), rows(3, 2)
    for x_of_q, x_of_k in ((both, both), (only_q, only_k), (both, both)):
        moments.note(Q, 0, x_of_q)
        moments.note(K, 0, x_of_k)
        moments.commit()
        moments.settle()
    moments.check("")
    found = moments.taken()
    assert is_moment_of(whole(found["q.weight", 0]), both, only_q, both)
    assert is_moment_of(whole(found["k.weight", 0]), both, only_k, both)


def test_one_that_is_not_called_in_a_later_forward_shares_no_more(moments: InputMoments) -> None:
    both, only_q = rows(3), rows(2, 1)
    for weights, x in (((Q, K), both), ((Q,), only_q)):
        for weight in weights:
            moments.note(weight, 0, x)
        moments.commit()
    moments.check("")
    found = moments.taken()
    assert is_moment_of(whole(found["q.weight", 0]), both, only_q)
    assert is_moment_of(whole(found["k.weight", 0]), both)


def test_a_tensor_that_is_changed_in_place_is_another_input(moments: InputMoments) -> None:
    x = rows(5)
    before = x.clone()
    moments.note(Q, 0, x)
    x.mul_(2)
    moments.note(K, 0, x)
    moments.commit()
    moments.check("")
    found = moments.taken()
    assert is_moment_of(whole(found["q.weight", 0]), before)
    assert is_moment_of(whole(found["k.weight", 0]), x)


def test_what_a_failed_forward_has_noted_is_not_counted(moments: InputMoments) -> None:
    moments.note(Q, 0, rows(5))
    moments.discard()
    moments.note(Q, 0, rows(3, 1))
    moments.commit()
    moments.check("")
    assert is_moment_of(whole(moments.taken()["q.weight", 0]), rows(3, 1))


def test_rows_of_zeros_of_batched_experts_are_of_other_tokens(moments: InputMoments) -> None:
    x = rows(6)
    x[[1, 4]] = 0
    moments.note(STACK, 2, x, padded=True)
    moments.note(STACK, 0, torch.zeros(6, 6), padded=True)
    moments.commit()
    moments.check("")
    found = moments.taken()
    assert found.keys() == {("experts", 2)}
    assert is_moment_of(whole(found["experts", 2]), x)


def test_groups_of_rows_follow_from_the_rows_and_not_from_when_they_are_added(moments: InputMoments) -> None:
    results = []
    for settled_each_time in (True, False):
        for seed, count in enumerate((3, 6, 1, 4)):
            moments.note(Q, 0, rows(count, seed))
            moments.commit()
            if settled_each_time:
                moments.settle()
        moments.check("")
        results.append(whole(moments.taken()["q.weight", 0]))
    assert torch.equal(*results)


def test_half_precision_is_summed_in_float32(moments: InputMoments) -> None:
    x = rows(9).to(torch.float16)
    moments.note(Q, 0, x)
    moments.commit()
    moments.check("")
    assert is_moment_of(whole(moments.taken()["q.weight", 0]), x.float())


def test_vectors_have_no_moments(moments: InputMoments) -> None:
    moments.note(Operand("norm.weight", 1, 6, (6,)), 0, rows(3))
    moments.commit()
    moments.check("")
    assert moments.taken() == {}
