"""Speeds are measured by the work itself, on what is left as it was. No test asks how fast anything is."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from method_cases import PARAMETERS, resolved
from torch import Tensor

from lowmem_aim.errors import DiskError
from lowmem_aim.jobs import speed
from lowmem_aim.jobs.speed import COLUMNS, DISTINCT_SLICES, disk_speed, matmul_speed, merge_speed
from lowmem_aim.methods.method import Method, Rows, Subject
from lowmem_aim.methods.registry import METHODS
from lowmem_aim.system.interrupts import Interrupted

CPU = torch.device("cpu")


def raising(error: BaseException) -> Callable[..., Any]:
    def call(*_: Any, **__: Any) -> Any:
        raise error

    return call


def seconds_that_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look at the clock finds that one more second is over."""
    clock = iter(range(1000))
    monkeypatch.setattr(speed, "time", SimpleNamespace(perf_counter=lambda: float(next(clock))))


class TestDisk:
    @pytest.fixture
    def model(self, tmp_path: Path) -> Path:
        file = tmp_path / "model.safetensors"
        file.write_bytes(os.urandom(9 << 20))
        os.utime(file, ns=(10**18, 10**18))
        return file

    def test_what_is_written_is_never_seen_and_nothing_of_it_stays(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sizes, seen = [], []

        def synced(descriptor: int) -> None:
            sizes.append(os.fstat(descriptor).st_size)
            seen.extend(os.listdir(tmp_path))

        monkeypatch.setattr(speed, "_sync", synced)
        found = disk_speed(tmp_path, seconds=0.02)
        assert found.write > 0
        assert found.read is not None
        assert found.read > 0
        assert sizes[0] == speed.PIECE_BYTES
        assert not list(tmp_path.iterdir())
        assert not seen or os.name == "nt"

    @pytest.mark.parametrize("error", [KeyboardInterrupt(), Interrupted(), MemoryError()])
    def test_nothing_stays_after_an_interruption(
        self, tmp_path: Path, error: BaseException, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(speed, "_sync", raising(error))
        with pytest.raises(type(error)):
            disk_speed(tmp_path)
        assert not list(tmp_path.iterdir())

    def test_inputs_are_read_and_stay_byte_for_byte(self, model: Path, tmp_path: Path) -> None:
        before = model.read_bytes()
        model.chmod(0o400)
        (tmp_path / "elsewhere").mkdir()
        found = disk_speed(tmp_path / "elsewhere", [model], seconds=0.1)
        assert found.read is not None
        assert found.read > 0
        assert model.read_bytes() == before
        assert model.stat().st_mtime_ns == 10**18
        assert sorted(path.name for path in tmp_path.rglob("*")) == ["elsewhere", "model.safetensors"]

    def test_of_inputs_that_are_small_or_cannot_be_read_it_tells_no_speed(self, model: Path, tmp_path: Path) -> None:
        small = tmp_path / "small.safetensors"
        small.write_bytes(bytes(1000))
        for inputs in ([small], [model, tmp_path / "none.safetensors"], [tmp_path]):
            found = disk_speed(tmp_path, inputs, seconds=0.0)
            assert found.read is None
            assert found.write > 0

    def test_every_place_of_the_inputs_may_be_read(self, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        starts = []
        monkeypatch.setattr(speed, "_let_go", lambda file, start: starts.append((file.name, start)))
        other = model.with_name("other.safetensors")
        other.write_bytes(bytes(3 << 20))
        monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=10))  # writing is over at once
        disk_speed(model.parent, [model, other], seconds=60.0)
        assert sorted(starts) == [(str(model), 0), (str(model), speed.PIECE_BYTES), (str(other), 0)]

    def test_it_takes_a_tenth_of_the_free_space_at_most(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        sizes = []
        monkeypatch.setattr(speed, "_sync", lambda descriptor: sizes.append(os.fstat(descriptor).st_size))
        for free in (0, 123_456, 200_000_000):
            monkeypatch.setattr("shutil.disk_usage", lambda folder, free=free: SimpleNamespace(free=free))
            disk_speed(tmp_path, seconds=60.0 if free < 10**6 else 0.05)
            assert 1 <= sizes[-1] <= max(1, free // 10)

    def test_a_folder_that_takes_no_files_is_an_error_with_its_name(self, model: Path, tmp_path: Path) -> None:
        for folder in (tmp_path / "none", model):
            with pytest.raises(DiskError, match=folder.name):
                disk_speed(folder)

    def test_a_full_disk_is_an_error_with_its_reason(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(speed, "_sync", raising(OSError(errno.ENOSPC, "No space left on device")))
        with pytest.raises(DiskError, match="no space is left"):
            disk_speed(tmp_path)
        assert not list(tmp_path.iterdir())

    def test_a_file_that_may_not_grow_is_an_error(self, tmp_path: Path) -> None:
        resource = pytest.importorskip("resource")
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4 << 20, before[1]))
        try:
            with pytest.raises(DiskError, match="it would be larger than `ulimit -f`"):
                disk_speed(tmp_path, seconds=600.0)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert not list(tmp_path.iterdir())

    def test_it_needs_no_posix(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("posix_fadvise", "POSIX_FADV_DONTNEED", "pread"):
            monkeypatch.delattr(os, name, raising=False)
        assert disk_speed(tmp_path, seconds=0.0).read is not None


def given(name: str) -> tuple[Method, dict[str, Any], int]:
    """A method, its parameters as a recipe resolves them, and how many experts."""
    method = METHODS[name]
    experts = method.most or 3
    own = {key: value[:experts] if isinstance(value, tuple) else value for key, value in PARAMETERS[name].items()}
    return method, resolved(name, own, [torch.empty(0)] * experts), experts


@pytest.mark.parametrize(("relaxed", "dtype"), [(False, torch.float32), (True, torch.bfloat16)])
@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_can_be_measured(name: str, relaxed: bool, dtype: torch.dtype) -> None:
    method, parameters, experts = given(name)
    tiny: dict[str, Any] = {"device": CPU, "threads": 2, "seconds": 0.0, "slice_elements": 1}
    assert merge_speed(method, parameters, experts, relaxed=relaxed, dtype=dtype, **tiny) > 0


class TestMerge:
    """By a method that only looks at what it is given."""

    def seen(self, monkeypatch: pytest.MonkeyPatch, name: str = "linear", **changes: Any) -> list[Rows]:
        seen: list[Rows] = []
        self.threads: set[tuple[int, str]] = set()
        self.subjects: list[Subject] = []

        def looking(tensor: Subject, **_: Any) -> Iterator[Any]:
            self.subjects.append(tensor)

            def combine(rows: Rows) -> Tensor:
                seen.append(rows)
                self.threads.add((torch.get_num_threads(), threading.current_thread().name.rpartition("_")[0]))
                return rows.experts[0].clone()

            return combine
            yield  # a generator

        method = replace(METHODS[name], script=looking)
        settings: dict[str, Any] = {"device": CPU, "relaxed": False, "dtype": torch.float32, "threads": 2}
        settings |= {"seconds": 0.0, "slice_elements": 2 * COLUMNS} | changes
        self.speed = merge_speed(method, {}, 2, **settings)
        return seen

    def test_it_counts_what_was_merged_after_the_first_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seconds_that_pass(monkeypatch)
        seen = self.seen(monkeypatch, seconds=2.0)  # begins at 0, looks at 1 and at 2, ends at 3
        assert self.speed == 2 * DISTINCT_SLICES * 2 * COLUMNS / 3
        assert len(seen) == 3 * DISTINCT_SLICES

    def test_slices_make_up_one_tensor_of_numbers_like_weights(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seen = self.seen(monkeypatch, "ties")[:DISTINCT_SLICES]
        subject = self.subjects[0]
        assert (subject.shape, subject.numel) == ((2 * len(seen), COLUMNS), 2 * len(seen) * COLUMNS)
        assert sorted(rows.start for rows in seen) == [2 * COLUMNS * number for number in range(len(seen))]
        base = torch.cat([rows.base for rows in seen])
        first, second = (torch.cat([rows.experts[model] - rows.base for rows in seen]) for model in range(2))
        assert float(base.std()) == pytest.approx(0.02, rel=0.1)
        assert float(first.std()) == pytest.approx(0.002, rel=0.1)
        assert abs(float(torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1])) < 0.1

    def test_threads_compute_slices_and_operations_have_one_each(self, monkeypatch: pytest.MonkeyPatch) -> None:
        before = torch.get_num_threads()
        self.seen(monkeypatch, threads=3)
        assert self.threads == {(1, "compute")}
        assert torch.get_num_threads() == before

    @pytest.mark.parametrize(
        ("name", "relaxed", "based", "held"),
        [("ties", False, True, True), ("linear", False, False, False), ("linear", True, False, True)],
    )
    def test_the_base_is_read_where_a_merge_would(
        self, name: str, relaxed: bool, based: bool, held: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen = self.seen(monkeypatch, name, relaxed=relaxed)
        assert {rows.stored_base.numel() > 0 for rows in seen} == {held}
        assert self.subjects[0].based is based

    @pytest.mark.parametrize("relaxed", [False, True])
    def test_aim_is_part_of_it_where_it_is_asked_for(self, relaxed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        relaxed_slices: list[Tensor] = []
        original = speed.relax

        def noting(merged: Tensor, base: Tensor, shrink: Tensor) -> Tensor:
            relaxed_slices.append(shrink)
            return original(merged, base, shrink)

        monkeypatch.setattr(speed, "relax", noting)
        seen = self.seen(monkeypatch, "ties", relaxed=relaxed)
        assert len(relaxed_slices) == len(seen) * relaxed
        assert all(shrink.shape == (1, COLUMNS) for shrink in relaxed_slices)

    def test_slices_have_the_size_of_a_merges(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from lowmem_aim.merging import shares

        monkeypatch.setattr("lowmem_aim.methods.kernels.available", lambda: False)
        seen = self.seen(monkeypatch, slice_elements=None)
        assert {rows.experts[0].numel() for rows in seen} == {shares.TORCH_SLICE_ELEMENTS}

    def test_a_method_that_fails_says_so(self, monkeypatch: pytest.MonkeyPatch) -> None:
        method, parameters, experts = given("ties")
        monkeypatch.setattr(speed, "relax", raising(RuntimeError("no such device")))
        with pytest.raises(RuntimeError, match="no such device"):
            merge_speed(
                method, parameters, experts, device=CPU, relaxed=True, dtype=torch.float32, threads=2, slice_elements=1
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_counted_by_their_operations(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds_that_pass(monkeypatch)
    assert matmul_speed(CPU, dtype, seconds=3.0) == 2 * speed.TOKENS * 1024 * 1024  # one a second
