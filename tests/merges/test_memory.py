"""Budgets: what is free, how a merge divides it, what happens when an allocation fails; and the bytes stay the same."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from merge_cases import BY_METHOD, FLAGS, digests, recipe

from lowmem_aim.errors import MemoryBudgetError, UsageError, joined
from lowmem_aim.events import Event, Notice
from lowmem_aim.jobs.merge import merge
from lowmem_aim.merging import shares
from lowmem_aim.merging.pipeline import Ahead
from lowmem_aim.merging.shares import Needs, Running, Shares, share_out
from lowmem_aim.methods.footprint import Footprint
from lowmem_aim.methods.linear import weighted_sum
from lowmem_aim.methods.method import Rows
from lowmem_aim.system import memory, run
from lowmem_aim.system.memory import Budget, enough, is_allocation_failure, make_budget, too_small
from lowmem_aim.system.options import Options
from lowmem_aim.units import bytes_of, shown

CPU = torch.device("cpu")
MB = 10**6


def named_budget(error: MemoryBudgetError, kind: str) -> int:
    """The bytes of the budget that a refusal names."""
    found = re.search(rf"--{kind} (\d+)MB", error.hint)
    assert found, error.hint
    return int(found[1]) * MB


class TestBudget:
    def test_the_default_is_what_is_free_less_a_reserve(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(memory, "anonymous_bytes", lambda: 300 * MB)
        monkeypatch.setattr(memory, "free_bytes", lambda: 2000 * MB)
        assert make_budget(CPU) == Budget(300 * MB + 1500 * MB)
        monkeypatch.setattr(memory, "free_bytes", lambda: 20_000 * MB)
        assert make_budget(CPU) == Budget(300 * MB + 18_000 * MB)
        assert make_budget(CPU, 1000 * MB).ram_left() == 700 * MB

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            (Options(device="cpu", ram=9000 * MB), ["more than there is (8.0 GB)"]),
            (Options(device="cpu", ram=8000 * MB, threads=2), []),
            (Options(device="cpu", threads=3), ["more than the 2 cores"]),
        ],
    )
    def test_more_than_the_machine_has_is_noticed(
        self, options: Options, said: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(run, "most_bytes", lambda: 8000 * MB)
        monkeypatch.setattr(run, "usable_cores", lambda: 2)
        monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
        noticed: list[Event] = []
        run.start(options, noticed.append)
        texts = [event.text for event in noticed if isinstance(event, Notice)]
        assert len(texts) == len(said)
        assert all(part in text for part, text in zip(said, texts, strict=True))

    def test_vram_needs_a_device_that_has_some(self) -> None:
        with pytest.raises(UsageError, match="vram"):
            make_budget(CPU, vram=MB)

    def test_anonymous_memory_grows_with_what_is_touched(self) -> None:
        """In a process of its own: here the allocator may give memory that an earlier test touched and freed."""
        code = (
            "import torch; from lowmem_aim.system.memory import anonymous_bytes\n"
            "before = anonymous_bytes()\n"
            "held = torch.empty(200_000_000, dtype=torch.uint8)\n"
            "untouched = anonymous_bytes()\n"
            "held[:50_000_000] = 1\n"
            "print(untouched - before, anonymous_bytes() - before)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
        untouched, touched = map(int, done.stdout.split())
        assert untouched < 5 * MB
        assert 45 * MB < touched < 60 * MB

    @pytest.mark.parametrize(
        ("membership", "names", "at"),
        [
            ("0::/box/job\n", ("memory.max", "memory.current", "inactive_file"), "box"),
            (
                "4:memory:/box/job\n",
                ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
                "memory/box",
            ),
        ],
    )
    def test_the_cgroups_limit_counts_and_file_pages_are_free(
        self, tmp_path: Path, membership: str, names: tuple[str, str, str], at: str
    ) -> None:
        (tmp_path / at / "job").mkdir(parents=True)
        for folder, limit in ((tmp_path / at, "1000"), (tmp_path / at / "job", "max")):
            (folder / names[0]).write_text(limit)
            (folder / names[1]).write_text("700")
            (folder / "memory.stat").write_text(f"anon 400\n{names[2]} 250\n")
        (tmp_path / "membership").write_text(membership)
        assert list(memory._cgroups_free(tmp_path, tmp_path / "membership")) == [1000 - 700 + 250]

    def test_sizes_for_people(self) -> None:
        assert [shown(n) for n in (12, 1500, 2 * MB, 3 * 10**9)] == ["12 bytes", "1.5 kB", "2.0 MB", "3.0 GB"]


NEEDS = Needs(row=2048, largest=10**9, stored=8, written=2, footprint=Footprint(12, 0, 3 * MB, 60 * MB), compiled=True)


class TestShares:
    def share(self, left: int, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Shares:
        monkeypatch.setattr(memory, "anonymous_bytes", lambda: 0)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
        return share_out(Budget(left), CPU, replace(NEEDS, **changes))

    def test_slices_shrink_with_the_budget_and_never_grow_beyond_the_cache(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sizes = [self.share(left * MB, monkeypatch).slice_elements for left in (150, 200, 400, 4000, 40_000)]
        assert sizes == sorted(sizes)
        assert sizes[0] < sizes[-1] == shares.CPU_SLICE_ELEMENTS

    def test_a_long_row_leaves_one_worker(self, monkeypatch: pytest.MonkeyPatch) -> None:
        few = self.share(200 * MB, monkeypatch, row=400_000)
        assert (few.workers, few.ahead) == (1, 1)
        assert few.slice_elements >= 400_000

    def test_a_row_that_does_not_fit_is_refused_with_the_numbers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(MemoryBudgetError, match=r"needs .* GB of RAM, .* 1\.0 GB") as caught:
            self.share(1000 * MB, monkeypatch, row=500_000_000)
        assert caught.value.exit_code == 5

    def test_the_budget_that_a_refusal_names_is_accepted(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for used in (0, 300 * MB):
            monkeypatch.setattr(memory, "anonymous_bytes", lambda used=used: used)
            with pytest.raises(MemoryBudgetError) as caught:
                share_out(Budget(MB), CPU, NEEDS)
            named = named_budget(caught.value, "ram")
            assert used + NEEDS.least_ram(True) <= named < 1.03 * (used + NEEDS.least_ram(True)) + MB
            assert share_out(Budget(named), CPU, NEEDS).slice_elements >= shares.LEAST_SLICE_ELEMENTS

    def test_the_same_of_a_device_with_memory_of_its_own(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(memory, "anonymous_bytes", lambda: 0)
        meta = torch.device("meta")  # no memory of its own is in use
        with pytest.raises(MemoryBudgetError, match="of VRAM") as caught:
            share_out(Budget(1000 * MB, MB), meta, NEEDS)
        named = named_budget(caught.value, "vram")
        shared = share_out(Budget(1000 * MB, named), meta, NEEDS)
        assert NEEDS.on_device(shared.slice_elements, shared.workers) <= named
        for vram in (2 * named, 100 * named):  # whatever is given, the slices under way stay below it
            shared = share_out(Budget(1000 * MB, vram), meta, NEEDS)
            assert NEEDS.on_device(shared.slice_elements, shared.workers) <= vram
        with pytest.raises(MemoryBudgetError, match="of RAM"):
            share_out(Budget(10 * MB, named), meta, NEEDS)

    @pytest.mark.parametrize("ram", [340, 600, 4000])
    def test_experts_that_run_between_tensors_have_the_memory_that_slices_do_not_take_meanwhile(
        self, ram: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        running = Running(least=200 * MB, block=300 * MB, vram=0, moments=500 * MB)
        needs = replace(NEEDS, footprint=replace(NEEDS.footprint, matrices=400 * MB), running=running)
        monkeypatch.setattr(memory, "anonymous_bytes", lambda: 0)
        assert needs.least_ram(True) < 340 * MB
        shared = share_out(Budget(ram * MB), CPU, needs)
        held = needs.held() + shared.matrices
        slices = needs.slices(shared.slice_elements, shared.workers, shared.ahead, True)
        assert held + slices <= ram * MB
        assert held + needs.waiting(shared.slice_elements, shared.ahead) + shared.models <= ram * MB
        assert shared.models >= running.least
        assert shared.matrices == min(900 * MB, shared.matrices)
        if ram == 4000:
            assert (shared.matrices, shared.models >= running.least + running.block) == (900 * MB, True)

    def test_on_a_device_slices_matrices_and_experts_share_its_memory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(memory, "anonymous_bytes", lambda: 0)
        running = Running(least=50 * MB, block=0, vram=300 * MB, moments=500 * MB)
        needs, meta = replace(NEEDS, running=running), torch.device("meta")  # no memory of its own is in use
        with pytest.raises(MemoryBudgetError, match="of VRAM") as caught:
            share_out(Budget(1000 * MB, MB), meta, needs)
        named = named_budget(caught.value, "vram")
        for vram in (named, 2 * named, 100 * named):
            shared = share_out(Budget(1000 * MB, vram), meta, needs)
            slices = needs.on_device(shared.slice_elements, shared.workers)
            assert slices + shared.device_matrices + shared.device_models <= vram
            assert shared.device_models >= running.vram

    @pytest.mark.parametrize("ram", [150, 200, 400, 4000])
    def test_what_is_held_and_all_slices_and_two_kept_tensors_fit(
        self, ram: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shared = self.share(ram * MB, monkeypatch)
        slices = NEEDS.slices(shared.slice_elements, shared.workers, shared.ahead, True)
        assert NEEDS.held() + slices + 2 * shared.kept_bytes <= ram * MB

    def test_what_preparing_took_for_a_moment_counts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(memory, "anonymous_bytes", lambda: 0)
        with pytest.raises(MemoryBudgetError, match=r"needs 400\.0 MB"):
            share_out(Budget(300 * MB), CPU, NEEDS, reached=400 * MB)


@pytest.mark.parametrize("method", BY_METHOD)
class TestFailedAllocations:
    def merged(
        self, llama: Path, out: Path, method: str, measured: Path, **options: Any
    ) -> tuple[dict[str, str], list[str]]:
        notices: list[str] = []

        def emit(event: Event) -> None:
            if isinstance(event, Notice):
                notices.append(event.text)

        merge(
            recipe(llama, method, **FLAGS[method], omega=0.3, calibration=str(measured)), out, Options(**options), emit
        )
        return digests(out), notices

    def test_slices_are_halved_and_the_bytes_stay_the_same(
        self, llama: Path, measured: Path, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from lowmem_aim.merging.loop import DeviceStreams

        expected, _ = self.merged(llama, tmp_path / "one", method, measured)
        up, lock, largest = DeviceStreams.up, threading.Lock(), [0]

        def limited(streams: DeviceStreams, stored: torch.Tensor) -> torch.Tensor:
            if stored.numel() > 400:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            with lock:
                largest[0] = max(largest[0], stored.numel())
            return up(streams, stored)

        monkeypatch.setattr(DeviceStreams, "up", limited)
        found, notices = self.merged(llama, tmp_path / "two", method, measured)
        assert found == expected
        assert 0 < largest[0] <= 400
        assert any("memory ran short" in text for text in notices)

    def test_reading_that_fails_goes_on_with_less(
        self, llama: Path, measured: Path, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from lowmem_aim.models.checkpoint import Checkpoint

        expected, _ = self.merged(llama, tmp_path / "one", method, measured)
        rows = Checkpoint.rows

        def limited(checkpoint: Checkpoint, name: str, start: int, stop: int) -> torch.Tensor:
            if stop - start > 40:
                raise MemoryError
            return rows(checkpoint, name, start, stop)

        monkeypatch.setattr(Checkpoint, "rows", limited)
        found, notices = self.merged(llama, tmp_path / "two", method, measured)
        assert found == expected
        assert any("memory ran short" in text for text in notices)


def test_not_even_a_row_is_exit_5_and_leaves_nothing(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lowmem_aim.merging.loop import DeviceStreams

    def never(streams: DeviceStreams, stored: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(DeviceStreams, "up", never)
    with pytest.raises(MemoryBudgetError, match="1 row of"):
        merge(recipe(llama, "linear"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", BY_METHOD)
def test_budgets_do_not_change_the_bytes(
    llama: Path, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The smallest makes slices of a few rows, and keeps no tensor of more than one slice between its passes."""
    from lowmem_aim.merging import shares as job
    from lowmem_aim.merging.slices import TensorInputs

    monkeypatch.setattr(memory, "anonymous_bytes", lambda: 0)
    shares: list[Shares] = []
    least: list[int] = []
    passes: list[bool] = []  # first or not
    slices = TensorInputs.slices

    def noted(tensor: TensorInputs, first_pass: bool) -> Iterator[Rows]:
        passes.append(first_pass)
        return slices(tensor, first_pass)

    def divided(budget: Budget, device: torch.device, needs: Needs, *args: Any, **given: Any) -> Shares:
        least.append(needs.least_ram(True))
        shares.append(share_out(budget, device, needs, *args, **given))
        return shares[-1]

    monkeypatch.setattr(TensorInputs, "slices", noted)
    monkeypatch.setattr(job, "share_out", divided)
    monkeypatch.setattr(job, "GROWTH_BYTES", 0)
    monkeypatch.setattr(job, "LEAST_SLICE_ELEMENTS", 1)
    with pytest.raises(MemoryBudgetError):
        merge(recipe(llama, method, **FLAGS[method]), tmp_path / "refused", Options(ram=1))
    made, read_again = [], []
    for ram in (least[0], least[0] + 40 * MB, 10**9):
        passes.clear()
        made.append(digests(merge(recipe(llama, method, **FLAGS[method]), tmp_path / str(ram), Options(ram=ram))))
        read_again.append(not all(passes))
    assert made[0] == made[1] == made[2]
    sizes = [share.slice_elements for share in shares[::2]]  # reckoned as a check before work, and again
    assert sizes[0] < 1000 < sizes[1] < sizes[2]
    measures = method not in ("linear", "task_arithmetic", "passthrough")
    assert (read_again[0], read_again[2]) == (measures, False)


def test_what_counts_as_a_failed_allocation() -> None:
    assert is_allocation_failure(MemoryError())
    assert is_allocation_failure(torch.OutOfMemoryError("x"))
    assert is_allocation_failure(RuntimeError("std::bad_alloc"))
    assert is_allocation_failure(RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate"))
    assert not is_allocation_failure(RuntimeError("shapes differ"))
    assert not is_allocation_failure(ValueError("out of memory"))


class TestAhead:
    def test_it_reads_no_further_than_its_depth(self) -> None:
        read = []
        with Ahead((read.append(i) or i for i in range(100)), 3) as items:  # type: ignore[func-returns-value]
            assert next(items) == 0
            for _ in range(200):
                if len(read) >= 5:
                    break
                threading.Event().wait(0.01)
        assert len(read) <= 6  # one taken, three in the queue, one in the hand, perhaps one more as it was closed

    def test_an_exception_surfaces_where_the_items_are_taken(self) -> None:
        def items() -> Any:
            yield 1
            raise KeyError("broken")

        with Ahead(items(), 2) as ahead:
            assert next(ahead) == 1
            with pytest.raises(KeyError, match="broken"):
                next(ahead)


def test_halves_are_the_whole() -> None:
    rows = Rows(torch.arange(15.0).view(5, 3), (torch.arange(15.0).view(5, 3) * 2,), 30)
    a, b = rows.halves()
    assert (a.start, b.start, a.count + b.count) == (30, 36, 5)
    assert torch.equal(torch.cat([a.base, b.base]), rows.base)
    assert torch.equal(torch.cat([weighted_sum(r.experts, (0.5,)) for r in (a, b)]), rows.base)


def test_the_smallest_budget_that_a_refusal_names_is_accepted_and_kept(tmp_path: Path) -> None:
    """`make test-memory` tries every method, on larger tensors, with more budgets."""
    tiny.build("llama", tmp_path / "base", dtype=torch.bfloat16, vocab_size=30_000, hidden_size=256)
    for number, name in enumerate(("one", "two")):
        tiny.perturbed(tmp_path / "base", tmp_path / name, seed=number)
    program = Path(__file__).parents[1] / "smallest_budgets.py"
    cases = ("arcee_fusion:mmap", "widen:mmap", "ties:pread", "ties+dare_ties+della+model_stock+linear:mmap")
    cases += ("covariance:pread", "regmean:mmap", "regmean_plus/both:mmap")
    command = [sys.executable, str(program), str(tmp_path), *cases]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [one["case"] for one in found] == list(cases)
    for one in found:
        assert one["peak"] <= one["budget"], one


class TestRefusals:
    """A budget that is too small is told once, with the one number that will do."""

    def test_of_several_needs_only_the_largest_is_told(self) -> None:
        merging = too_small("merging", "RAM", 90 * MB, 300 * MB, 100 * MB, "fewer models take less")
        running = too_small("running", "RAM", 230 * MB, 300 * MB, 100 * MB, "shorter texts take less")
        on_device = too_small("merging", "VRAM", 10 * MB, 0, 1 * MB, "fewer models take less")
        elsewhere = UsageError("something else", "a step")
        told = joined([elsewhere, merging, running, on_device])
        assert told.problems == (*elsewhere.problems, *running.problems, *on_device.problems)
        assert joined([merging, merging]).problems == merging.problems

    @pytest.mark.parametrize("least", [1, 699 * MB, 701 * MB, 12_345 * MB])
    def test_the_number_is_the_same_wherever_it_is_shown(self, least: int) -> None:
        total = enough(300 * MB, least)
        assert total >= 300 * MB + least
        assert bytes_of(shown(total)) == total
        refusal = too_small("it", "RAM", least, 300 * MB, 0, "")
        assert named_budget(refusal, "ram") == refusal.enough == total

    def test_ram_and_vram_that_are_too_small_are_both_told(self) -> None:
        needs = Needs(row=1, largest=1 << 20, stored=4, written=2, footprint=Footprint(), compiled=True)
        with pytest.raises(MemoryBudgetError) as caught:
            share_out(Budget(1, 1), torch.device("meta"), needs)
        assert [" of RAM" in problem for problem in caught.value.problems] == [True, False]
        assert named_budget(caught.value, "ram") > 0
        assert named_budget(caught.value, "vram") > 0
