"""Second moments, block by block and within any budget, are those of an ordinary forward."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from calibrating import llama_forward
from long_cases import others_long
from moment_cases import CPU, TEXTS, by_an_ordinary_forward, expert_folders, measured, moments_of, same, solved, whole
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaModel

from lowmem_aim.blocks import shares
from lowmem_aim.blocks.shares import Needs, Shares, share_out
from lowmem_aim.errors import ModelError
from lowmem_aim.events import Event, Notice
from lowmem_aim.methods import moments as tiles
from lowmem_aim.methods.moments import Moment
from lowmem_aim.models.checkpoint import Checkpoint
from lowmem_aim.models.meta_model import load_meta_model
from lowmem_aim.solving import input_moments
from lowmem_aim.solving.matrices import same_moments
from lowmem_aim.solving.needs import needs_of_moments
from lowmem_aim.system import memory
from lowmem_aim.system.memory import Budget
from lowmem_aim.system.tensor_store import TensorStore

KINDS = ("llama", "gpt2", "gemma3_text", "mixtral", "qwen3_moe", "deepseek_v3")
BY_ARCHITECTURE = others_long(KINDS, KINDS[:4])


@pytest.fixture(autouse=True)
def many_small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles a matrix, and several groups of rows."""
    monkeypatch.setattr(tiles, "TILE", 20)
    monkeypatch.setattr(input_moments, "ROWS", 16)
    monkeypatch.setattr(input_moments, "EXPERT_ROWS", 8)


def is_close(found: Tensor | None, expected: Tensor, tolerance: float = 1e-5) -> bool:
    return found is not None and bool((found - expected).norm() <= tolerance * expected.norm())


@pytest.mark.parametrize("architecture", BY_ARCHITECTURE)
def test_they_are_those_of_an_ordinary_forward(architecture: str, tmp_path: Path) -> None:
    folders = expert_folders(architecture, tmp_path)
    found = measured(folders)
    for number, (folder, texts) in enumerate(zip(folders, TEXTS, strict=True)):
        expected = by_an_ordinary_forward(folder, texts)
        assert {name for (name, _), own in found.items() if own[number] is not None} == expected.keys()
        for name, matrix in expected.items():
            assert is_close(found[name, 0][number], matrix), name


def test_matrices_that_are_given_the_same_share_one_moment(tmp_path: Path) -> None:
    with moments_of(expert_folders("mixtral", tmp_path)) as moments:
        moments.come_to(1)

        def only(name: str) -> list[Moment | None]:
            (own,) = moments.of([f"model.layers.1.{name}.weight"] * 2)
            return own

        for names in (
            [f"self_attn.{part}_proj" for part in "qkv"],
            *([f"block_sparse_moe.experts.{expert}.{part}" for part in ("w1", "w3")] for expert in range(4)),
        ):
            first, *others = map(only, names)
            assert None not in first
            assert first[0] is not first[1]
            assert all(same_moments(other, first) for other in others)
        distinct = {id(moment) for name in ("self_attn.q_proj", "self_attn.o_proj") for moment in only(name)}
        assert len(distinct) == 4


def test_experts_that_no_token_reaches_have_none(tmp_path: Path) -> None:
    folders = expert_folders("mixtral", tmp_path, num_local_experts=16)
    texts = [TEXTS[0], [TEXTS[1][0][:3]]]  # of the second: three tokens, two experts each
    found = measured(folders, [0], texts=texts)
    experts = [own for (name, _), own in found.items() if name.endswith("w2.weight")]
    reached = [sum(own[number] is not None for own in experts) for number in (0, 1)]
    assert 2 <= reached[1] <= 6
    assert reached[1] < reached[0]


def test_a_stack_of_experts_in_a_file_has_a_moment_for_each_matrix(tmp_path: Path) -> None:
    folders = expert_folders("gpt_oss", tmp_path)
    name = "model.layers.0.mlp.experts.down_proj"  # (experts, in, out)
    with moments_of(folders) as moments:
        moments.come_to(0)
        own = moments.of([name] * 2)
    assert [[moment and moment.size for moment in row] for row in own] == [[48, 48]] * 4


def test_a_block_that_is_measured_is_not_measured_again_and_others_are_forgotten(tmp_path: Path) -> None:
    with moments_of(expert_folders("llama", tmp_path)) as moments:
        first, second = (f"model.layers.{block}.mlp.up_proj.weight" for block in (0, 1))
        moments.come_to(0)
        before = moments.of([first] * 2)
        moments.come_to(0)
        assert all(map(same_moments, moments.of([first] * 2), before))
        moments.come_to(1)
        assert moments.of([first] * 2) == [[None, None]]
        assert None not in moments.of([second] * 2)[0]
        assert (moments.blocks, moments.block_of(second)) == (tiny.LAYERS, 1)
        assert moments.block_of("model.embed_tokens.weight") is None


def by_a_whole_merged_model(folders: list[Path]) -> list[dict[str, Tensor]]:
    """Each expert's X^T X by tensor, on the states of the merged model, which is solved layer by layer."""
    merged, *experts = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval() for folder in (folders[0], *folders)
    )
    with torch.no_grad():
        for name, value in merged.named_parameters():
            value.copy_(torch.stack([expert.get_parameter(name) for expert in experts]).mean(0))
        found: list[dict[str, Tensor]] = [{}, {}]
        for layer in range(tiny.LAYERS):
            for expert, grams, texts in zip(experts, found, TEXTS, strict=True):
                calls: list[Any] = []
                of_merged = merged.model.layers[layer]
                hook = of_merged.register_forward_pre_hook(
                    lambda module, args, kwargs, calls=calls: calls.append((args, kwargs)), with_kwargs=True
                )
                for tokens in texts:
                    merged(tokens[None], use_cache=False)
                hook.remove()
                add_moments_of(expert.model.layers[layer], f"model.layers.{layer}", calls, grams)
            for name, value in of_merged.named_parameters(prefix=f"model.layers.{layer}"):
                if value.dim() == 2:
                    weights = [expert.get_parameter(name) for expert in experts]
                    value.copy_(solved(weights, [grams[name] for grams in found]))
    return found


def add_moments_of(block: nn.Module, path: str, calls: list[Any], found: dict[str, Tensor]) -> None:
    def add(name: str, module: Any, args: Any) -> None:
        rows = args[0].reshape(-1, args[0].shape[-1]).double()
        found[name] = found.get(name, 0) + rows.T @ rows

    for name, module in block.named_modules(prefix=path):
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(partial(add, f"{name}.weight"))
    for args, kwargs in calls:
        block(*args, **kwargs)


def test_with_a_merged_model_the_states_are_those_after_its_blocks(tmp_path: Path) -> None:
    """RegMean++ (arXiv 2508.03121) against the same by whole models."""
    folders = expert_folders("llama", tmp_path)
    found = measured(folders, plus_plus=True)
    expected = by_a_whole_merged_model(folders)
    for (name, _), own in found.items():
        for number, matrix in enumerate(own):
            assert is_close(matrix, expected[number][name], 1e-3), name
    plain = measured(folders)
    last = ("model.layers.2.mlp.up_proj.weight", 0)
    assert not is_close(plain[last][0], expected[0][last[0]], 1e-2)  # it makes a difference


class TestErrors:
    def test_inputs_that_overflow_are_an_error_that_names_expert_and_module(self, tmp_path: Path) -> None:
        folders = expert_folders("llama", tmp_path)
        tiny.edit_tensors(folders[1], lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].fill_(1e30))
        with pytest.raises(ModelError, match=r"expert2.*`model.layers.1.mlp.down_proj` overflow") as caught:
            measured(folders)
        assert "whatever `--nonfinite` says" in caught.value.hint

    def test_a_model_whose_blocks_cannot_be_run_one_by_one_is_refused_with_a_way_out(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folders = expert_folders("llama", tmp_path)
        monkeypatch.setattr(LlamaModel, "forward", llama_forward(lambda hidden: hidden * 1.01))
        with pytest.raises(ModelError, match="cannot be run one by one") as caught:
            measured(folders)
        assert "covariance" in caught.value.hint

    def test_experts_with_other_numbers_of_blocks_are_refused(self, tmp_path: Path) -> None:
        folders = [tiny.build("llama", tmp_path / str(count), num_hidden_layers=count) for count in (2, 3)]
        with pytest.raises(ModelError, match="`2` has 2, `3` has 3"), moments_of(folders):
            pass


# --- the same bytes, whatever happens ---------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", others_long(("llama", "mixtral", "gpt2"), ("llama",)))
def test_three_budgets_give_the_same_bytes(architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With everything in memory; with states and matrices in files; and with modules that come and go."""
    monkeypatch.setattr(shares, "SMALLEST_PAGED", 1024)
    monkeypatch.setattr(memory, "anonymous_bytes", lambda: 0)
    folders = expert_folders(architecture, tmp_path)
    expected = measured(folders, range(2))
    least = share_out(Budget(least_bytes(folders)), CPU, needs(folders))
    assert not least.ram_states
    for given, budget in ((Shares(ram_states=0), None), (least, Budget(least_bytes(folders)))):
        with TensorStore(CPU, device_bytes=0, ram_bytes=0, folder=tmp_path) as store:
            assert same(measured(folders, range(2), store=store, shares=given, budget=budget, spill=tmp_path), expected)


def needs(folders: list[Path]) -> Needs:
    with contextlib.ExitStack() as stack:
        models = [load_meta_model(stack.enter_context(Checkpoint.open(folder))) for folder in folders]
        return needs_of_moments(list(zip(models, TEXTS, strict=True)))


def least_bytes(folders: list[Path]) -> int:
    return needs(folders).least_ram(on_host=True)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, str, int], list[int]]:
    """Have one call of a function fail for lack of memory; returns a list of how many calls are left until then."""

    def fails_once(owner: Any, name: str, call: int) -> list[int]:
        left, function = [call], getattr(owner, name)

        def failing(*args: Any) -> Any:
            left[0] -= 1
            if not left[0]:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return function(*args)

        monkeypatch.setattr(owner, name, failing)
        return left

    return fails_once


@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [
        (torch, "addmm", 12),  # of the tiles of a matrix, some have their rows already, others do not
        (torch, "addmm", 77),
        (nn.functional, "linear", 7),  # a block has noted some inputs
        (nn.functional, "linear", 30),
    ],
)
def test_an_allocation_that_fails_changes_no_byte(
    owner: Any, name: str, call: int, tmp_path: Path, failing: Callable[[Any, str, int], list[int]]
) -> None:
    folders = expert_folders("llama", tmp_path)
    expected = measured(folders, [0])
    with moments_of(folders) as moments:
        left = failing(owner, name, call)
        moments.come_to(0)
        assert left[0] < 0
        for (tensor, number), own in expected.items():
            for found, matrix in zip(moments.of([tensor] * 2)[number], own, strict=True):
                assert found is not None
                assert matrix is not None
                assert torch.equal(whole(found), matrix), tensor


def test_where_memory_is_short_the_moments_leave_the_device_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: Callable[[Any, str, int], list[int]]
) -> None:
    left = list[TensorStore]()
    monkeypatch.setattr(TensorStore, "leave_device", lambda store: not left.append(store) if store is moving else False)
    folders = expert_folders("llama", tmp_path)
    seen: list[Event] = []
    with TensorStore(CPU, device_bytes=0, ram_bytes=1 << 30, folder=None) as moving:
        failing(nn.functional, "linear", 7)
        with moments_of(folders, store=moving, emit=seen.append) as moments:
            moments.come_to(0)
    assert left == [moving]
    assert Notice("memory ran short: what is measured leaves the device", "warning") in seen
