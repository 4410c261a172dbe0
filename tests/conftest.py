"""Tests run offline, with a cache and a file of defaults of their own, and never see the user's."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

# Before torch and the Hub's library are imported: both read their settings then.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Loops that are compiled for one test serve the next; they depend on nothing but the loops' own text.
os.environ.setdefault("NUMBA_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "loops"))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads that spin starve shared cores

# Torch and transformers are imported by the fixtures that need them: whoever only hands out tests needs neither.
pytest.register_assert_rewrite("calibrating", "cards", "faults", "merge_cases", "method_cases", "stopping")

if TYPE_CHECKING:
    from hub.server import Hub


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


@pytest.fixture(autouse=True)
def own_defaults(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The place for a test's file of defaults; the developer's own is not read. No agent has started the tests."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(own_cache / "config"))
    for name in ("AI_AGENT", "AGENT"):
        monkeypatch.delenv(name, raising=False)
    return own_cache / "config" / "lowmem-aim" / "config.toml"


class SharedReader(NamedTuple):
    """The own `start` and `end` of `ReaderProcess`, from before it was shared."""

    start: Callable[[], Any]
    end: Callable[[Any], None]


@pytest.fixture(scope="session", autouse=True)
def shared_reader() -> Iterator[SharedReader]:
    """One child process reads models' small files for all tests: importing transformers takes seconds each time."""
    from lowmem_aim.models.reader_process import ReaderProcess

    running: list[ReaderProcess] = []
    own = SharedReader(ReaderProcess.start, ReaderProcess.end)

    def shared() -> ReaderProcess:
        if not running or running[0].process.poll() is not None:
            running[:] = [own.start()]
        return running[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ReaderProcess, "start", shared)
        patch.setattr(ReaderProcess, "end", lambda process: None)
        yield own
    for process in running:
        own.end(process)


@pytest.fixture
def own_reader(shared_reader: SharedReader, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test's readers start children of their own, with its limits."""
    from lowmem_aim.models.reader_process import ReaderProcess

    monkeypatch.setattr(ReaderProcess, "start", shared_reader.start)
    monkeypatch.setattr(ReaderProcess, "end", shared_reader.end)


@dataclass(frozen=True)
class Ran:
    """What a command of the program did."""

    code: int
    out: str
    err: str


Run = Callable[..., Ran]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Call the command line in this process: `run("merge", recipe, out)`."""

    def call(*arguments: object) -> Ran:
        from lowmem_aim.cli.main import main

        monkeypatch.setattr(sys, "argv", ["lowmem-aim", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        shown = capsys.readouterr()
        return Ran(int(ended.value.code or 0), shown.out, shown.err)

    return call


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Llama `base` and the experts `math`, `code` and `chat`, float32. Read only."""
    import tiny

    folder = tmp_path_factory.mktemp("llama")
    base = tiny.build("llama", folder / "base")
    for seed, name in enumerate(("math", "code", "chat"), start=1):
        tiny.perturbed(base, folder / name, scale=0.05, seed=seed)
    return folder


@pytest.fixture(scope="session")
def measured(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The activations of the tiny Llama `base`, measured once. Read only."""
    from calibrating import activations_of

    folder = tmp_path_factory.mktemp("measured")
    file = folder / "texts.txt"
    file.write_text("the quick brown fox jumps over the lazy dog\n\n" * 3)
    return activations_of(llama / "base", file, folder / "activations.safetensors")


@pytest.fixture
def known(llama: Path, tmp_path: Path, run: Run) -> None:
    """The models' structure is in the cache: another process need not import transformers for it, which takes seconds.

    All of the tiny Llamas have the same.
    """
    assert run("merge", tmp_path / "known", "--method", "linear", "--expert", llama / "math").code == 0


@pytest.fixture
def each_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor is a commit of its own."""
    from lowmem_aim.output import writer

    monkeypatch.setattr(writer, "GROUP_BYTES", 1)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A calibration file of uneven texts."""
    file = tmp_path / "texts.jsonl"
    lines = ["The quick brown fox.", "jumps over", "a lazy dog that has been sleeping all day long in the sun"]
    file.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return file


class Place(NamedTuple):
    """A folder that a test may spoil: `base` and the experts `math` and `code`, tiny Llamas, and the merge of them."""

    folder: Path
    run: Run

    def merge(self, *more: object, method: str = "ties") -> Ran:
        command = ("merge", self.out, "--method", method, "--base", self.folder / "base")
        return self.run(*command, "--expert", self.folder / "math", "--expert", self.folder / "code", *more)

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def refused(self, done: Ran, code: int, *messages: str) -> None:
        assert done.code == code, done.err
        assert any(line.startswith("error: ") for line in done.err.splitlines()), done.err
        assert "Traceback" not in done.err
        for message in messages:
            assert message in done.err
        assert done.out == ""
        assert not self.out.exists()


@pytest.fixture
def place(llama: Path, tmp_path: Path, run: Run) -> Place:
    import tiny

    for name in ("base", "math", "code"):
        tiny.perturbed(llama / name, tmp_path / name, scale=0.0)
    return Place(tmp_path, run)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The Hub, played by a server on this machine, with a cache of its own; the test says what it holds."""
    from hub.playing import asked, playing
    from hub.server import Hub

    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    state = Hub()
    with playing(state) as address, asked(address, tmp_path / "cache"):
        yield state


@pytest.fixture(scope="session")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of three shards, each many times as large as the first request for a header. Read only."""
    import tiny

    folder = tmp_path_factory.mktemp("sharded") / "model"
    tiny.build("llama", folder, shard_size="2MB", intermediate_size=4096)
    assert len(list(folder.glob("*.safetensors"))) == 3
    return folder
