"""What `doctor` tells: whole whatever is missing, safe to print, and silent about secrets."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import constants

import lowmem_aim
from lowmem_aim import units
from lowmem_aim.errors import DiskError, UsageError
from lowmem_aim.jobs import doctor
from lowmem_aim.jobs.doctor import UNKNOWN, Doctor, examine
from lowmem_aim.jobs.speed import disk_speed

SECTIONS = {
    "software": {"lowmem-aim", "python", "platform", "nvidia_driver", *doctor.PACKAGES},
    "processor": {"model", "cores", "container_cores", "threads", "instructions", "compiled_loops"},
    "memory": {"total", "free", "container_limit", "swap_total", "swap_free"},
    "folder": {
        *("path", "mount", "filesystem", "network", "free", "preallocates", "sparse"),
        *("read", "write", "problem"),
    },
    "caches": {"activations", "hub", "hf_home", "offline", "token"},
    "terminal": {"terminal", "columns", "colours", "blocks", "term", "no_color"},
    "defaults": {"path", "there", "values", "problem"},
}


HEADINGS = ["software", "processor", "memory", "GPU", "folder", "caches", "terminal", "defaults"]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "disk_speed", partial(disk_speed, seconds=0.0))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))  # not the user's


def failing(*_: Any, **__: Any) -> Any:
    raise RuntimeError("nobody knows")


def headings(found: Doctor) -> list[str]:
    return [line[:12].strip() for line in found.lines() if line[:1] not in (" ", "")]


def advice(found: Doctor, level: str) -> str:
    texts = [line for line in found.lines() if line.startswith(f"{level}: ")]
    assert texts == [f"{a.level}: {a.text}" for a in found.advice if a.level == level]
    return "\n".join(texts)


def test_the_json_has_every_section_with_its_keys(tmp_path: Path) -> None:
    found = examine(tmp_path)
    told = json.loads(json.dumps(found.as_json()))
    assert told == found.as_json()
    assert set(told) == {"doctor", "gpus", "advice", *SECTIONS}
    assert told["doctor"] == 1
    assert {name: set(told[name]) for name in SECTIONS} == SECTIONS
    assert all(set(item) == {"level", "text"} for item in told["advice"])


def test_the_facts_are_this_machines(tmp_path: Path) -> None:
    found = examine(tmp_path)
    assert found.software["lowmem-aim"] == lowmem_aim.__version__
    assert found.software["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found.software["torch"] == metadata.version("torch")
    assert 0 < found.memory["free"] <= found.memory["total"]
    assert found.processor["cores"] >= 1
    assert found.folder["read"] > 0
    assert found.folder["write"] > 0
    assert found.folder["free"] > 0
    assert found.folder["path"] == str(tmp_path)
    assert found.folder["filesystem"] != UNKNOWN
    assert found.folder["problem"] is None


def test_people_get_every_section_and_the_numbers(tmp_path: Path) -> None:
    found = examine(tmp_path)
    assert headings(found)[: len(HEADINGS)] == HEADINGS
    text = "\n".join(found.lines())
    for number in (found.memory["total"], found.folder["read"], found.folder["write"]):
        assert units.shown(int(number)) in text


def test_nothing_is_left_in_the_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    os.utime(tmp_path / "model.safetensors", ns=(10**18, 10**18))
    examine(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert (tmp_path / "model.safetensors").read_bytes() == b"weights"
    assert (tmp_path / "model.safetensors").stat().st_mtime_ns == 10**18


def test_a_folder_that_is_none_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "none", tmp_path / "file"):
        with pytest.raises(UsageError, match=path.name):
            examine(path)


def test_a_relative_folder_is_told_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert examine(Path(".")).folder["path"] == str(tmp_path)


class TestUnknown:
    @pytest.mark.parametrize(
        ("target", "section", "facts"),
        [
            ("importlib.metadata.version", "software", doctor.PACKAGES),
            ("platform.platform", "software", ["platform"]),
            ("lowmem_aim.jobs.doctor._driver", "software", ["nvidia_driver"]),
            ("lowmem_aim.jobs.doctor.usable_cores", "processor", ["cores"]),
            ("lowmem_aim.system.memory.cgroup_folders", "processor", ["container_cores"]),
            ("torch.backends.cpu.get_cpu_capability", "processor", ["instructions"]),
            ("lowmem_aim.methods.kernels.available", "processor", ["compiled_loops"]),
            ("psutil.virtual_memory", "memory", ["total", "free"]),
            ("psutil.swap_memory", "memory", ["swap_total", "swap_free"]),
            ("psutil.disk_partitions", "folder", ["mount", "filesystem", "network"]),
            ("shutil.disk_usage", "folder", ["free", "read", "write"]),
            ("tempfile.TemporaryFile", "folder", ["preallocates", "sparse", "read", "write"]),
            ("lowmem_aim.jobs.doctor.cache_folder", "caches", ["activations"]),
            ("os.walk", "caches", ["activations", "hub"]),
            ("rich.console.Console.is_terminal", "terminal", ["terminal", "columns"]),
        ],
    )
    def test_a_fact_that_cannot_be_had_costs_no_other(
        self, target: str, section: str, facts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(target, property(failing) if target.endswith("is_terminal") else failing)
        found = examine(tmp_path)
        monkeypatch.undo()
        table = found.as_json()[section]
        assert {name for name in facts if table[name] == UNKNOWN} == set(facts)
        assert set(table) == SECTIONS[section]
        assert table["lowmem-aim"] if section == "software" else any(v != UNKNOWN for v in table.values())
        assert UNKNOWN in "\n".join(found.lines())

    def test_gpus(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("torch.cuda.device_count", failing)
        found = examine(tmp_path)
        assert found.as_json()["gpus"] == UNKNOWN
        assert any(line.startswith(f"{'GPU':12}{UNKNOWN};") for line in found.lines())

    def test_all_of_them_at_once(self) -> None:
        nothing: dict[str, Any] = {name: dict.fromkeys(facts, UNKNOWN) for name, facts in SECTIONS.items()}
        nothing["folder"]["problem"] = None  # known where it is unknown how fast the disk is
        blind = Doctor(**nothing, gpus=UNKNOWN)
        assert blind.advice == []
        assert headings(blind) == HEADINGS
        assert all(UNKNOWN in line for line in blind.lines() if line[:1] != " ")
        assert json.dumps(blind.as_json())


class TestWhatPeopleSee:
    def test_names_from_outside_cannot_reach_the_terminal(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = tmp_path / "a\nb\x1b[2J"
        folder.mkdir()
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
        monkeypatch.setenv("TERM", "\x1b]0;owned\x07")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub"))
        monkeypatch.setattr(doctor, "_model", lambda: "fast\x1b[31m")
        monkeypatch.setattr(doctor, "_mount", lambda folder: SimpleNamespace(fstype="nfs", mountpoint="/\x1b[2J"))
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
        found = examine(folder)
        monkeypatch.setattr(doctor, "disk_speed", failing)
        for line in (*found.lines(), *examine(folder).lines()):
            assert line.isprintable(), ascii(line)
        assert "\\x1b[2J" in "\n".join(found.lines())
        assert found.as_json()["folder"]["path"] == str(folder)

    def test_a_tokens_value_never_shows(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("HF_TOKEN", raising=False)
        assert examine(tmp_path).caches["token"] is False
        monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
        found = examine(tmp_path)
        assert found.caches["token"] is True
        assert "HF_TOKEN: set" in "\n".join(found.lines())
        assert "verysecret" not in json.dumps(found.as_json()) + "\n".join(found.lines())

    @pytest.mark.parametrize(
        ("encoding", "environment", "blocks", "colours"),
        [
            ("utf-8", {"TERM": "xterm-256color"}, True, "256"),
            ("ascii", {"TERM": "xterm-256color"}, False, "256"),
            ("utf-8", {"TERM": "xterm-256color", "NO_COLOR": "1"}, True, None),
            ("utf-8", {"TERM": "dumb"}, True, None),
        ],
    )
    def test_what_the_terminal_can_show(
        self,
        encoding: str,
        environment: dict[str, str],
        blocks: bool,
        colours: str | None,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        for name in ("NO_COLOR", "COLORTERM", "FORCE_COLOR"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
        monkeypatch.setattr(sys, "stderr", stream)
        terminal = examine(tmp_path).terminal
        assert (terminal["terminal"], terminal["blocks"], terminal["colours"]) == (True, blocks, colours)
        assert terminal["no_color"] is ("NO_COLOR" in environment)
        monkeypatch.undo()

    def test_stderr_that_is_no_terminal(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "stderr", io.StringIO())
        found = examine(tmp_path)
        assert found.terminal["terminal"] is False
        assert f"{'terminal':12}stderr is not a terminal: progress is shown in plain lines" in found.lines()


class TestCaches:
    def test_they_are_counted_and_an_absent_one_is_empty(self, tmp_path: Path, own_cache: Path) -> None:
        cache = own_cache / "lowmem_aim" / "activations"
        cache.mkdir(parents=True)
        (cache / "one").write_bytes(bytes(1000))
        (cache.parent / "two").write_bytes(bytes(234))
        (cache / "link").symlink_to(cache / "one")
        link = (cache / "link").lstat().st_size
        caches = examine(tmp_path).caches
        assert caches["activations"] == {"path": str(own_cache / "lowmem_aim"), "bytes": 1234 + link}
        assert caches["hub"] == {"path": str(tmp_path / "hub"), "bytes": 0}

    def test_one_that_takes_too_long_is_a_path_only(
        self, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (own_cache / "lowmem_aim").mkdir()
        (own_cache / "lowmem_aim" / "one").touch()
        monkeypatch.setattr(doctor, "COUNTING_SECONDS", -1.0)
        found = examine(tmp_path)
        assert found.caches["activations"] == {"path": str(own_cache / "lowmem_aim"), "bytes": None}
        assert "too many files to count" in "\n".join(found.lines())


class TestAdvice:
    @pytest.fixture
    def patched(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Doctor]:
        def call(target: str, value: Any) -> Doctor:
            monkeypatch.setattr(target, value)
            return examine(tmp_path)

        return call

    def test_numba_is_missed(self, patched: Callable[..., Doctor]) -> None:
        original = metadata.version

        def version(name: str) -> str:
            if name == "numba":
                raise metadata.PackageNotFoundError
            return original(name)

        found = patched("importlib.metadata.version", version)
        assert found.software["numba"] is None
        assert "numba not installed" in "\n".join(found.lines())
        assert "pip install numba" in advice(found, "warning")

    def test_numba_is_there_in_vain(self, patched: Callable[..., Doctor], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(doctor, "_version", lambda name: "1.0")
        why = "its loops are not used (LOWMEM_AIM_KERNELS is 0)"
        monkeypatch.setattr("lowmem_aim.methods.kernels.unavailable", lambda: "LOWMEM_AIM_KERNELS is 0")
        assert why in advice(patched("lowmem_aim.methods.kernels.available", lambda: False), "warning")
        assert why not in advice(patched("lowmem_aim.methods.kernels.available", lambda: True), "warning")

    def test_compiled_loops_cannot_be_kept(
        self, tmp_path: Path, patched: Callable[..., Doctor], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(doctor, "_version", lambda name: "1.0")
        monkeypatch.delenv("NUMBA_CACHE_DIR")
        monkeypatch.setattr("lowmem_aim.methods.kernels.available", lambda: True)
        assert "compiled loops cannot be saved" not in advice(examine(tmp_path), "warning")
        (tmp_path / "file").touch()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        assert f"`{tmp_path / 'file' / 'lowmem_aim'}" in advice(examine(tmp_path), "warning")

    def test_ram_is_short(self, patched: Callable[..., Doctor]) -> None:
        assert "1.9 GB of RAM" in advice(
            patched("lowmem_aim.system.memory.free_bytes", lambda: 1_900_000_000), "warning"
        )
        assert "RAM" not in advice(patched("lowmem_aim.system.memory.free_bytes", lambda: 2_000_000_000), "warning")

    def test_a_container_has_fewer_cores_than_threads(
        self, tmp_path: Path, patched: Callable[..., Doctor], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("torch.get_num_threads", lambda: 8)
        for name, text in (("cpu.max", "150000 100000\n"), ("outer", ""), ("none", "")):
            (tmp_path / name).write_text(text)
        found = patched(
            "lowmem_aim.system.memory.cgroup_folders", lambda controller: iter([tmp_path, tmp_path / "none"])
        )
        assert found.processor["container_cores"] == 1.5
        assert "`--threads 2`" in advice(found, "hint")
        (tmp_path / "cpu.max").write_text("max 100000\n")
        assert examine(tmp_path).processor["container_cores"] is None
        (tmp_path / "cpu.cfs_quota_us").write_text("50000\n")
        (tmp_path / "cpu.cfs_period_us").write_text("100000\n")
        assert examine(tmp_path).processor["container_cores"] == 0.5
        assert "`--threads 1`" in advice(examine(tmp_path), "hint")
        (tmp_path / "cpu.cfs_quota_us").write_text("-1\n")
        assert "--threads" not in advice(examine(tmp_path), "hint")

    def test_a_container_has_less_memory(self, patched: Callable[..., Doctor]) -> None:
        found = patched(
            "lowmem_aim.system.memory._limited_cgroups", lambda *_: iter([(3 * 10**6, 0), (2 * 10**6, 10**6)])
        )
        assert found.memory["container_limit"] == 2 * 10**6
        assert found.memory["free"] == 10**6
        assert "the container's limit is 2.0 MB" in "\n".join(found.lines())
        assert (
            patched("lowmem_aim.system.memory._limited_cgroups", lambda *_: iter([(1 << 62, 0)])).memory[
                "container_limit"
            ]
            is None
        )

    @pytest.mark.parametrize(
        ("kind", "warned"),
        [("nfs4", True), ("cifs", True), ("fuse.sshfs", True), ("ext4", False), ("overlay", False), ("fuseblk", False)],
    )
    def test_a_network_filesystem(
        self, kind: str, warned: bool, tmp_path: Path, patched: Callable[..., Doctor]
    ) -> None:
        mounts = [
            SimpleNamespace(mountpoint=str(tmp_path), fstype="hidden"),
            SimpleNamespace(mountpoint=str(tmp_path), fstype=kind),
            SimpleNamespace(mountpoint="/", fstype="rootfs"),
            SimpleNamespace(mountpoint=str(tmp_path / "inside"), fstype="tmpfs"),
            SimpleNamespace(mountpoint=str(tmp_path) + "beside", fstype="tmpfs"),
        ]
        found = patched("psutil.disk_partitions", lambda all: mounts)
        assert (found.folder["mount"], found.folder["filesystem"]) == (str(tmp_path), kind)
        assert found.folder["network"] is warned
        assert (f"`{kind}` may be a network filesystem" in advice(found, "warning")) is warned

    def test_a_folder_that_cannot_be_written(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(folder: Path) -> Any:
            raise DiskError(f"`{folder}` cannot be written: No space left on device")

        monkeypatch.setattr(doctor, "disk_speed", full)
        found = examine(tmp_path)
        assert (found.folder["read"], found.folder["write"]) == (UNKNOWN, UNKNOWN)
        assert "No space left on device" in advice(found, "warning")

    def test_a_driver_without_a_gpu_that_torch_can_use(
        self, tmp_path: Path, patched: Callable[..., Doctor], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        file = tmp_path / "version"
        file.write_text(
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  550.54.15  Release Build\nGCC 12.2.0\n"
        )
        monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
        monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
        found = patched("lowmem_aim.jobs.doctor._DRIVER", file)
        assert found.software["nvidia_driver"] == "550.54.15"
        assert "no GPU that torch" in advice(found, "warning")
        assert "none that torch can use" in "\n".join(found.lines())

    def test_gpus_have_their_numbers(
        self, tmp_path: Path, patched: Callable[..., Doctor], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
        monkeypatch.setattr("torch.cuda.get_device_name", lambda number: f"Card {number}\x1b[2J")
        monkeypatch.setattr("torch.cuda.get_device_properties", lambda number: SimpleNamespace(total_memory=80 * 10**9))
        monkeypatch.setattr("torch.cuda.mem_get_info", lambda number: failing() if number else (79 * 10**9, 80 * 10**9))
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda number: (9, 0))
        monkeypatch.setattr(doctor, "_driver", lambda: "550.54.15")
        found = patched("torch.cuda.device_count", lambda: 2)
        first, second = found.as_json()["gpus"]
        assert first == {
            "device": "cuda:0",
            "name": "Card 0\x1b[2J",
            "total": 80 * 10**9,
            "free": 79 * 10**9,
            "capability": "9.0",
        }
        assert second["free"] == UNKNOWN
        lines = [line for line in found.lines() if "cuda:" in line]
        assert lines[0] == (
            f"{'GPU':12}cuda:0: Card 0\\x1b[2J, 79.0 GB of 80.0 GB are free, compute capability 9.0, driver 550.54.15"
        )
        assert "unknown of 80.0 GB" in lines[1]
        assert "NVIDIA" not in advice(found, "warning")
