"""Calibration within a budget: hidden states in a file, modules one by one, failed allocations; the same numbers."""

from __future__ import annotations

import errno
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from calibrating import BY_ARCHITECTURE, TEXTS, llama_forward, same
from conftest import Run
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lowmem_aim.blocks import runner as runner
from lowmem_aim.blocks import shares as shares
from lowmem_aim.blocks.shares import Needs, Shares, paged, share_out
from lowmem_aim.errors import DiskError, MemoryBudgetError
from lowmem_aim.events import Event, Notice
from lowmem_aim.measuring.mean_activations import mean_activations
from lowmem_aim.models.checkpoint import Checkpoint
from lowmem_aim.models.meta_model import load_meta_model
from lowmem_aim.relaxing.activations import Activations
from lowmem_aim.system import memory, tensors
from lowmem_aim.system.memory import Budget
from lowmem_aim.system.tensor_store import TensorStore

CPU = torch.device("cpu")
MB = 10**6


@pytest.fixture
def spills(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of every tensor that went to a file."""
    seen: list[int] = []
    write = TensorStore._write

    def noted(store: TensorStore, slot: Any, value: Tensor, nbytes: int) -> None:
        seen.append(nbytes)
        write(store, slot, value, nbytes)

    monkeypatch.setattr(TensorStore, "_write", noted)
    return seen


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every tensor that was read whole."""
    names: list[str] = []
    tensor = Checkpoint.tensor

    def noted(checkpoint: Checkpoint, name: str) -> Tensor:
        names.append(name)
        return tensor(checkpoint, name)

    monkeypatch.setattr(Checkpoint, "tensor", noted)
    return names


def measured(folder: Path, **options: Any) -> Activations:
    with Checkpoint.open(folder) as base:
        return mean_activations(base, load_meta_model(base), TEXTS, **options)


# --- the numbers do not depend on the budget --------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", BY_ARCHITECTURE)
def test_the_smallest_budget_gives_the_same_numbers(
    architecture: str, tmp_path: Path, spills: list[int], reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No hidden state has room in RAM, and every module that could be paged is."""
    monkeypatch.setattr(shares, "SMALLEST_PAGED", 1024)
    monkeypatch.setattr(memory, "anonymous_bytes", lambda: 0)
    folder = tiny.build(architecture, tmp_path / "model")
    expected = measured(folder)
    assert not spills
    assert len(reads) == len(set(reads))  # each once
    with Checkpoint.open(folder) as base:
        needs = Needs.of(load_meta_model(base), TEXTS)
    least = needs.work + needs.beside + needs.read + shares.SLACK_BYTES + needs.module
    (tmp_path / "spill").mkdir()
    reads.clear()
    found = measured(folder, budget=Budget(least), spill=tmp_path / "spill")
    assert same(found, expected)
    assert found.base_digests == expected.base_digests
    assert len(spills) >= len(TEXTS) * (tiny.LAYERS + 1)
    assert len(reads) > len(set(reads))
    assert list((tmp_path / "spill").iterdir()) == []
    with pytest.raises(MemoryBudgetError, match="running the model block by block"):
        measured(folder, budget=Budget(least - 1), spill=tmp_path / "spill")


def test_no_more_weights_are_there_than_the_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shares, "SMALLEST_PAGED", 1024)
    folder = tiny.build("llama", tmp_path / "model")
    most = [0]
    with Checkpoint.open(folder) as base:
        meta_model = load_meta_model(base)
        path, block = meta_model.blocks[1]
        sizes = {name: shares.size_of(part) for name, part in shares.owners(path, block)}
        room = sum(sizes.values()) // 2
        scene = runner.BlockRunner(base, meta_model, CPU, Shares(weights=room))
        linear = nn.functional.linear

        def watched(*args: Any) -> Tensor:
            there = [value for value in block.parameters() if not value.is_meta]
            most[0] = max(most[0], sum(value.numel() * value.element_size() for value in there))
            return linear(*args)

        monkeypatch.setattr(nn.functional, "linear", watched)
        with torch.no_grad(), scene.set_up(), scene.loaded(1):
            state = torch.randn(1, 7, 32)
            tables = meta_model.model.model.rotary_emb(state, torch.arange(7)[None])
            scene.run_block(1, runner.Call((state,), {"position_embeddings": tables}))
        assert room // 2 < most[0] <= room
        assert all(value.is_meta for value in block.parameters())


def test_weights_that_are_read_past_their_modules_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: list[str]
) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    def forward(self: Any, x: Tensor) -> Tensor:
        return nn.functional.linear(
            nn.functional.linear(x, torch.cat([self.up_proj.weight])), weight=self.down_proj.weight
        )

    monkeypatch.setattr(LlamaMLP, "forward", forward)
    monkeypatch.setattr(shares, "SMALLEST_PAGED", 1024)
    monkeypatch.setattr(memory, "anonymous_bytes", lambda: 0)
    folder = tiny.build("llama", tmp_path / "model")
    expected = measured(folder)
    with Checkpoint.open(folder) as base:
        needs = Needs.of(load_meta_model(base), TEXTS)
    fixed = needs.work + needs.beside + shares.SLACK_BYTES
    reads.clear()
    assert same(measured(folder, budget=Budget(fixed + 4 * needs.module), spill=tmp_path), expected)
    assert len(reads) > len(set(reads))  # the others come and go
    with pytest.raises(MemoryBudgetError, match=r"must stay in memory, .*`model\.layers\.0\.mlp\.\w+_proj`"):
        measured(folder, budget=Budget(fixed + needs.module), spill=tmp_path)


def test_the_fallback_that_holds_all_states_is_passed_over_where_they_do_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaModel

    monkeypatch.setattr(memory, "anonymous_bytes", lambda: 0)
    monkeypatch.setattr(LlamaModel, "forward", llama_forward(lambda hidden: hidden.mul_(1.25)))
    folder = tiny.build("llama", tmp_path / "model")
    expected = measured(folder)
    with Checkpoint.open(folder) as base:
        needs = Needs.of(load_meta_model(base), TEXTS)
    notices: list[str] = []

    def emit(event: Event) -> None:
        if isinstance(event, Notice):
            notices.append(event.text)

    least = needs.work + needs.beside + shares.SLACK_BYTES + needs.block
    found = measured(folder, budget=Budget(least), spill=tmp_path, emit=emit)
    assert same(found, expected)
    assert ["for every sequence instead, which takes longer" in text for text in notices] == [True]


# --- allocations that fail --------------------------------------------------------------------------------------------


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """short(n): a sequence's forward fails in the midst of a block of which more than n bytes are there."""
    monkeypatch.setattr(shares, "SMALLEST_PAGED", 1024)
    monkeypatch.setattr(runner, "SMALLEST_PAGED", 1024)

    def limit(most: int) -> None:
        from transformers.models.llama.modeling_llama import LlamaMLP

        forward = LlamaMLP.forward

        def limited(self: Any, x: Tensor) -> Tensor:
            there = sum(v.numel() * v.element_size() for v in self.parameters() if not v.is_meta)
            if x.shape[1] == len(TEXTS[1]) and there > most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return forward(self, x)

        monkeypatch.setattr(LlamaMLP, "forward", limited)

    return limit


def test_less_of_a_block_stays_and_no_sequence_counts_twice(
    llama: Path, short: Callable[[int], None], reads: list[str]
) -> None:
    expected = measured(llama / "base")
    notices: list[Event] = []
    short(7000)
    found = measured(llama / "base", emit=notices.append)
    assert same(found, expected)
    assert any("memory ran short" in event.text for event in notices if isinstance(event, Notice))
    assert len(reads) > 2 * len(set(reads))


def test_when_nothing_can_be_let_go_it_is_exit_5(llama: Path, short: Callable[[int], None]) -> None:
    short(-1)
    with pytest.raises(MemoryBudgetError, match=r"one sequence in `model\.layers\.0` does not fit") as caught:
        measured(llama / "base")
    assert caught.value.exit_code == 5


def test_a_failed_allocation_outside_the_blocks_is_exit_5_too(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(runner.BlockRunner, "forward", fails)
    with pytest.raises(MemoryBudgetError, match="memory ran out"):
        measured(llama / "base")


def test_a_state_that_cannot_be_kept_is_made_again_and_counts_once(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = measured(llama / "base")
    put, turns = TensorStore.put, [0]

    def fails_once(store: TensorStore, value: Tensor, slot: Any = None) -> Any:
        turns[0] += slot is not None
        if turns[0] == 3:
            turns[0] += 1
            raise MemoryError
        return put(store, value, slot)

    monkeypatch.setattr(TensorStore, "put", fails_once)
    assert same(measured(llama / "base"), expected)
    assert turns[0] > 4


def test_outside_the_blocks_states_leave_the_device_once(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = measured(llama / "base")
    forward, calls, moved = runner.BlockRunner.forward, [0], [0]

    def fails(scene: Any, tokens: Tensor, driver: Any, past: int | None = None) -> None:
        calls[0] += 1
        if calls[0] in (2, 7):  # while recording, and in a tail
            raise torch.OutOfMemoryError("CUDA out of memory")
        forward(scene, tokens, driver, past)

    def leave(store: TensorStore) -> bool:
        moved[0] += 1
        return True

    monkeypatch.setattr(runner.BlockRunner, "forward", fails)
    monkeypatch.setattr(TensorStore, "leave_device", leave)
    assert same(measured(llama / "base"), expected)
    assert moved[0] == 2


def test_suspended_forwards_that_find_no_memory_give_way_to_paging(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaModel

    from lowmem_aim.measuring import ways as module

    monkeypatch.setattr(LlamaModel, "forward", llama_forward(lambda hidden: hidden.mul_(1.25)))
    expected = measured(llama / "base")
    notices: list[Event] = []

    def fails(*args: Any) -> None:
        raise MemoryBudgetError("no memory for that")

    monkeypatch.setattr(module, "_stepped", fails)
    assert same(measured(llama / "base", emit=notices.append), expected)
    told = [event.text for event in notices if isinstance(event, Notice)]
    assert told[-1].startswith("no memory for that; reading each block again")


def test_memory_that_the_system_refuses_is_a_failed_allocation(monkeypatch: pytest.MonkeyPatch) -> None:
    import mmap

    def refuses(*args: Any, **given: Any) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", refuses)
    with pytest.raises(MemoryError):
        tensors.empty_apart((1 << 20,), torch.float32)
    assert tensors.empty_apart((3,), torch.float32).shape == (3,)


# --- how a budget is divided ------------------------------------------------------------------------------------------


NEEDS = Needs(block=600 * MB, module=140 * MB, module_path="m", read=0, beside=0, work=100 * MB, states=500 * MB)


def test_a_block_goes_before_the_hidden_states(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "anonymous_bytes", lambda: 0)
    fixed = NEEDS.work + shares.SLACK_BYTES
    assert share_out(Budget(fixed + 2000 * MB), CPU, NEEDS) == Shares(600 * MB, 0, 1400 * MB, 100 * MB)
    assert share_out(Budget(fixed + 700 * MB), CPU, NEEDS) == Shares(600 * MB, 0, 100 * MB, 100 * MB)
    assert share_out(Budget(fixed + 200 * MB), CPU, NEEDS) == Shares(200 * MB, 0, 0, 100 * MB)


def test_on_a_device_of_its_own_states_go_to_ram_when_it_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "anonymous_bytes", lambda: 0)
    fixed = NEEDS.work + shares.SLACK_BYTES
    on_host = 200 * MB + shares.SLACK_BYTES
    meta = torch.device("meta")  # no memory of its own is in use
    assert share_out(Budget(on_host, fixed + 900 * MB), meta, NEEDS) == Shares(600 * MB, 300 * MB, 60 * MB)
    with pytest.raises(MemoryBudgetError, match="of VRAM") as caught:
        share_out(Budget(on_host, fixed + 100 * MB), meta, NEEDS)
    assert "--vram 274MB" in caught.value.hint
    with pytest.raises(MemoryBudgetError, match="of RAM"):
        share_out(Budget(100 * MB, fixed + 900 * MB), meta, NEEDS)


def test_the_hint_names_a_budget_that_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "anonymous_bytes", lambda: 300 * MB)
    with pytest.raises(
        MemoryBudgetError, match=r"`m`, takes 140\.0 MB.*needs 580\.0 MB of RAM.*the budget is 400\.0 MB"
    ) as caught:
        share_out(Budget(400 * MB), CPU, NEEDS)
    assert "`--ram 580MB` would do" in caught.value.hint
    assert share_out(Budget(580 * MB), CPU, NEEDS).weights >= NEEDS.module
    with pytest.raises(MemoryBudgetError, match=r"the budget is 100\.0 MB") as caught:
        share_out(Budget(100 * MB), CPU, NEEDS)  # less than runs already
    assert "`--ram 580MB` would do" in caught.value.hint


@given(st.dictionaries(st.text("abc", min_size=1), st.integers(0, 1000)), st.integers(0, 5000))
def test_what_stays_and_the_largest_that_comes_fit_the_room(sizes: dict[str, int], room: int) -> None:
    before, shares.SMALLEST_PAGED = shares.SMALLEST_PAGED, 0
    try:
        away = paged(sizes, room)
    finally:
        shares.SMALLEST_PAGED = before
    held = sum(size for name, size in sizes.items() if name not in away)
    coming = max((sizes[name] for name in away), default=0)
    if room >= max(sizes.values(), default=0):
        assert held + coming <= room
    assert bool(away) == (sum(sizes.values()) > room)


def test_the_largest_stay() -> None:
    sizes = {"q": 52 * MB, "k": 52 * MB, "gate": 141 * MB, "up": 141 * MB, "down": 141 * MB, "norm": 10}
    assert paged(sizes, 600 * MB) == set()
    assert paged(sizes, 520 * MB) == {"k", "q"}
    assert paged(sizes, 300 * MB) == {"gate", "up", "k", "q"}  # the norm is too small to come and go


# --- the store --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.bool, torch.int64])
def test_what_lies_in_a_file_comes_back_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    values = [torch.arange(24).view(2, 3, 4).to(dtype), torch.zeros(0, 5, dtype=dtype), torch.ones((), dtype=dtype)]
    with TensorStore(CPU, device_bytes=0, ram_bytes=0, folder=tmp_path) as store:
        slots = [store.put(value) for value in values]
        for slot, value in zip(slots, values, strict=True):
            found = store.get(slot)
            assert (found.dtype, found.shape) == (value.dtype, value.shape)
            assert torch.equal(found, value)
        assert slots[0].place == "file"
    assert list(tmp_path.iterdir()) == []


def test_ram_first_then_the_file_and_a_slot_keeps_its_place(tmp_path: Path) -> None:
    with TensorStore(CPU, device_bytes=0, ram_bytes=100, folder=tmp_path) as store:
        slots = [store.put(torch.full((10,), float(i))) for i in range(4)]  # 40 bytes each
        assert [slot.place for slot in slots] == ["ram", "ram", "file", "file"]
        for turn in range(3):
            for i, slot in enumerate(slots):
                store.put(store.get(slot) + 1, slot)
                assert torch.equal(store.get(slot), torch.full((10,), i + turn + 1.0))
        assert [slot.place for slot in slots] == ["ram", "ram", "file", "file"]
        assert store._end == 80  # the file does not grow when a tensor takes another's place
        store.put(torch.zeros(1), slots[0])
        assert store.put(torch.zeros(10), slots[2]).place == "ram"  # there is room again


def test_strides_are_kept(tmp_path: Path) -> None:
    mask = torch.ones(1, 1, 5, 5, dtype=torch.bool).expand(1, 4, 5, 5)
    with TensorStore(CPU, device_bytes=0, ram_bytes=0, folder=tmp_path) as store:
        assert store.get(store.put(mask)).stride() == mask.stride()


def test_tensors_that_fill_the_ram_stay_there_however_many_threads_put_them_again(tmp_path: Path) -> None:
    with TensorStore(CPU, device_bytes=0, ram_bytes=4 << 20, folder=tmp_path) as store:
        slots = [store.put(torch.full((1 << 18,), float(i))) for i in range(4)]

        def put_again(number: int) -> None:
            for count in range(20):
                store.put(torch.full((1 << 18,), float(number + count)), slots[number])

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(put_again, range(4)))
        assert [slot.place for slot in slots] == ["ram"] * 4
        assert [float(store.get(slot)[-1]) for slot in slots] == [19.0, 20.0, 21.0, 22.0]
        assert store.put(torch.zeros(1)).place == "file"
        store.drop(slots[0])
        assert store.put(torch.zeros(1 << 18)).place == "ram"


class OnDevice(Tensor):
    """As if it were on a device of its own."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.cpu:
            return args[0].as_subclass(Tensor)
        if func == Tensor.device.__get__:
            return torch.device("cuda")
        return super().__torch_function__(func, types, args, kwargs or {})


def test_states_leave_the_device_when_its_memory_runs_short(tmp_path: Path) -> None:
    store = TensorStore(torch.device("cuda"), device_bytes=100, ram_bytes=50, folder=tmp_path)
    with store:
        slots = [store.put(torch.full((10,), float(i)).as_subclass(OnDevice)) for i in range(4)]
        assert [slot.place for slot in slots] == ["device", "device", "ram", "file"]
        assert store.leave_device()
        assert [slot.place for slot in slots] == ["file", "file", "ram", "file"]
        assert not store.leave_device()
        store._device = CPU  # to look at them here
        assert [float(store.get(slot)[0]) for slot in slots] == [0.0, 1.0, 2.0, 3.0]


def test_a_full_disk_is_exit_4_and_leaves_nothing(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def seek(self, offset: int) -> None: ...

        def write(self, data: Any) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        def close(self) -> None: ...

    monkeypatch.setattr(memory, "anonymous_bytes", lambda: 0)
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **given: Full())
    with Checkpoint.open(llama / "base") as base:
        needs = Needs.of(load_meta_model(base), TEXTS)
    tight = needs.work + needs.beside + shares.SLACK_BYTES + needs.block
    with pytest.raises(DiskError, match="no space is left") as caught:
        measured(llama / "base", budget=Budget(tight), spill=tmp_path)
    assert caught.value.exit_code == 4
    assert list(tmp_path.iterdir()) == []


def test_too_little_disk_for_hidden_states_shows_before_work(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: list[str]
) -> None:
    import shutil
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(memory, "anonymous_bytes", lambda: 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10**9, 10**9, 1000))
    with Checkpoint.open(llama / "base") as base:
        needs = Needs.of(load_meta_model(base), TEXTS)
    tight = needs.work + needs.beside + shares.SLACK_BYTES + needs.block
    with pytest.raises(DiskError, match="running the model, for hidden states, needs"):
        measured(llama / "base", budget=Budget(tight), spill=tmp_path)
    assert not reads


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hidden", "inner", "samples", "too_little"),
    [(256, 2048, 8, "260MB"), pytest.param(512, 6144, 20, "300MB", marks=pytest.mark.long)],
)
def test_the_real_peak_stays_below_the_smallest_budget_that_is_accepted(
    hidden: int,
    inner: int,
    samples: int,
    too_little: str,
    tmp_path: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of the whole process, sampled from outside: fat layers, more hidden states than there is room for."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "bench"))
    import measure
    from measure import cost_of
    from models import save_texts

    monkeypatch.setattr(measure, "_quiet", lambda: False)  # it is memory that counts, whatever else runs

    shape = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": 3, "vocab_size": 512}
    folder = tiny.build("llama", tmp_path / "model", dtype=torch.bfloat16, **shape)
    save_texts(tmp_path / "texts.jsonl", 8, 128, 512)
    log, made = tmp_path / "log.txt", [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    texts = ["--calibration", str(tmp_path / "texts.jsonl"), "--samples", str(samples), "--block-size", "128"]
    command = ["calibrate", str(folder), *texts, "--calibration-dtype", "float32"]
    assert run(*command, "-o", made[0]).code == 0
    asked = [sys.executable, "-m", "lowmem_aim", *command, "-o", str(made[1])]
    assert cost_of([*asked, "--ram", too_little], log).exit_code == 5
    least = log.read_text().partition("`--ram ")[2].partition("`")[0]
    cost = cost_of([*asked, "--ram", least], log)
    assert cost.exit_code == 0, log.read_text()
    assert 100 * MB < cost.anonymous <= int(least.removesuffix("MB")) * MB
    assert made[0].read_bytes() == made[1].read_bytes()


def test_the_command_refuses_a_budget_that_is_too_small_and_leaves_nothing(
    llama: Path, texts: Path, tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "anonymous_bytes", lambda: 0)
    out = tmp_path / "here" / "a.safetensors"
    out.parent.mkdir()
    ran = run("calibrate", llama / "base", "-o", out, "--calibration", texts, "--ram", "20MB")
    assert ran.code == 5
    assert "error: running the model block by block" in ran.err
    assert "hint: `--ram " in ran.err
    assert list(out.parent.iterdir()) == []
    asked = ("--method", "linear", "--base", llama / "base", "--expert", llama / "math", "--omega", "0.3")
    ran = run("merge", tmp_path / "out", *asked, "--calibration", texts, "--ram", "20MB")
    assert ran.code == 5
    assert not (tmp_path / "out").exists()
