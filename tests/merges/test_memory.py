"""Budgets: what is free, how a merge divides it, what happens when an allocation fails; and the bytes stay the same."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from merge_cases import BY_METHOD, FLAGS, digests, recipe

from lowmem_aim.errors import MemoryBudgetError, UsageError
from lowmem_aim.events import Event, Notice
from lowmem_aim.jobs.merge import merge
from lowmem_aim.merging import shares
from lowmem_aim.merging.pipeline import Ahead
from lowmem_aim.merging.shares import Needs, Shares, share_out
from lowmem_aim.methods.linear import weighted_sum
from lowmem_aim.methods.method import Rows
from lowmem_aim.system import memory
from lowmem_aim.system.memory import Budget, is_allocation_failure, make_budget
from lowmem_aim.system.options import Options
from lowmem_aim.units import shown

CPU = torch.device("cpu")
MB = 10**6


class TestBudget:
    def test_the_default_is_what_is_free_less_a_reserve(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(memory, "anonymous_bytes", lambda: 300 * MB)
        monkeypatch.setattr(memory, "free_bytes", lambda: 2000 * MB)
        assert make_budget(CPU) == Budget(300 * MB + 1500 * MB)
        monkeypatch.setattr(memory, "free_bytes", lambda: 20_000 * MB)
        assert make_budget(CPU) == Budget(300 * MB + 18_000 * MB)
        assert make_budget(CPU, 1000 * MB).ram_left() == 700 * MB

    def test_less_than_the_program_itself_is_refused_with_the_number(self) -> None:
        with pytest.raises(MemoryBudgetError, match=r"takes .* before any work") as caught:
            make_budget(CPU, 1000)
        assert caught.value.exit_code == 5

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


class TestShares:
    def share(self, left: int, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Shares:
        monkeypatch.setattr(memory, "anonymous_bytes", lambda: 0)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
        given: dict[str, Any] = {"models": 4, "stored_bytes": 10, "row": 2048, "compiled": True}
        return share_out(Budget(left), CPU, Needs(**given | changes))

    def test_slices_shrink_with_the_budget_and_never_grow_beyond_the_cache(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sizes = [self.share(left * MB, monkeypatch).slice_elements for left in (150, 200, 400, 4000, 40_000)]
        assert sizes == sorted(sizes)
        assert sizes[0] < sizes[-1] == shares.CPU_SLICE_ELEMENTS

    def test_a_long_row_leaves_one_worker(self, monkeypatch: pytest.MonkeyPatch) -> None:
        few = self.share(150 * MB, monkeypatch, row=400_000)
        assert (few.workers, few.ahead) == (1, 1)
        assert few.slice_elements >= 400_000

    def test_a_row_that_does_not_fit_is_refused_with_the_numbers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(
            MemoryBudgetError, match=r"a row of 500000000 elements in 4 models needs some .* 1\.0 GB"
        ) as caught:
            self.share(1000 * MB, monkeypatch, row=500_000_000)
        assert caught.value.exit_code == 5


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
    with pytest.raises(MemoryBudgetError, match="one row of"):
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
    passes: list[bool] = []  # first or not
    slices = TensorInputs.slices

    def noted(tensor: TensorInputs, first_pass: bool) -> Iterator[Rows]:
        passes.append(first_pass)
        return slices(tensor, first_pass)

    monkeypatch.setattr(TensorInputs, "slices", noted)
    monkeypatch.setattr(job, "share_out", lambda *args, **given: shares.append(share_out(*args, **given)) or shares[-1])
    made, read_again = [], []
    for ram in (200_000, 2 * MB, 10**9):
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
