"""`convert`: pickled weights become the safetensors that the library itself writes; nothing in a pickle is run."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import pickle
import random
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import Ran, Run
from safetensors.torch import load_file

import lowmem_aim
from lowmem_aim.errors import MemoryBudgetError, ModelError
from lowmem_aim.events import Advanced, Event, Notice
from lowmem_aim.jobs import convert as job
from lowmem_aim.jobs.convert import convert
from lowmem_aim.models import pickle_program
from lowmem_aim.models.checkpoint import Checkpoint
from lowmem_aim.models.pickle_process import PickleReader
from lowmem_aim.output import workspace
from lowmem_aim.system import process_limits

SINGLE, PICKLED = "model.safetensors", "pytorch_model.bin"


@pytest.fixture(scope="module")
def child() -> Iterator[PickleReader]:
    with PickleReader.start() as reader:
        yield reader


@pytest.fixture(autouse=True)
def shared_child(child: PickleReader, monkeypatch: pytest.MonkeyPatch) -> None:
    """One child for all tests: importing torch takes seconds."""
    monkeypatch.setattr(PickleReader, "start", lambda: child)
    monkeypatch.setattr(PickleReader, "close", lambda reader: None)


class Place(NamedTuple):
    """A folder with the tiny Llama `base` as `folder`, its weights in `tensors`, not there yet as a file."""

    folder: Path
    new: Path
    run: Run
    tensors: dict[str, torch.Tensor]

    def save(self, content: Any, name: str = PICKLED, **settings: Any) -> Path:
        torch.save(content, self.folder / name, **settings)
        return self.folder / name

    def convert(self, *more: object) -> Ran:
        return self.run("convert", self.folder, self.new, *more)

    def refused(self, code: int, *messages: str, flags: tuple[object, ...] = ()) -> None:
        done = self.convert(*flags)
        assert done.code == code, done.err
        assert "Traceback" not in done.err
        for message in messages:
            assert message in done.err
        assert sorted(path.name for path in self.folder.parent.iterdir()) == ["folder"]


@pytest.fixture
def place(llama: Path, tmp_path: Path, run: Run) -> Place:
    home = tmp_path / "place"
    shutil.copytree(llama / "base", home / "folder")
    (home / "folder" / SINGLE).unlink()
    return Place(home / "folder", home / "new", run, load_file(llama / "base" / SINGLE))


def contents(folder: Path) -> dict[str, bytes]:
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


class TestWhatComesOut:
    def test_a_model_is_what_the_library_writes_with_its_small_files(self, place: Place, llama: Path) -> None:
        place.save(place.tensors)
        before = contents(place.folder)
        done = place.convert()
        assert (done.code, done.out) == (0, f"{place.new}\n"), done.err
        expected, found = contents(llama / "base"), contents(place.new)
        assert found.keys() == expected.keys()
        config = found.pop("config.json")
        assert json.loads(config) == json.loads(expected.pop("config.json"))
        assert found == expected
        assert contents(place.folder) == before
        assert not Path(f"{place.new}.partial").exists()

    def test_shards_keep_their_number_and_get_an_index(self, place: Place) -> None:
        names = sorted(place.tensors)
        halves = [names[::2], names[1::2]]
        weight_map = {}
        for number, half in enumerate(halves, start=1):
            file = f"pytorch_model-0000{number}-of-00002.bin"
            place.save({name: place.tensors[name] for name in half}, file)
            weight_map |= dict.fromkeys(half, file)
        (place.folder / f"{PICKLED}.index.json").write_text(json.dumps({"weight_map": weight_map}))
        assert place.convert().code == 0
        with Checkpoint.open(place.new) as made:
            assert made.tensors.keys() == place.tensors.keys()
            assert all(torch.equal(made.tensor(name), value) for name, value in place.tensors.items())
            assert [file.name for file in made.files] == [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
        index = json.loads((place.new / f"{SINGLE}.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(value.nbytes for value in place.tensors.values())

    def test_numbered_files_without_an_index_are_taken_together(self, place: Place) -> None:
        for number, name in enumerate(sorted(place.tensors), start=1):
            place.save({name: place.tensors[name], "twice": torch.tensor(number)}, _numbered(number, place))
        assert place.convert().code == 0
        with Checkpoint.open(place.new) as made:
            assert made.tensors.keys() == place.tensors.keys() | {"twice"}
            assert int(made.tensor("twice")) == 1  # of the first file

    def test_a_tied_head_is_written_once(self, place: Place) -> None:
        shared = place.tensors["model.embed_tokens.weight"]
        place.save(dict(sorted((place.tensors | {"lm_head.weight": shared}).items())))
        _configure(place, tie_word_embeddings=True)
        done = place.convert()
        assert "`lm_head.weight` is the same tensor as `model.embed_tokens.weight`, and written once" in done.err
        assert load_file(place.new / SINGLE).keys() == place.tensors.keys() - {"lm_head.weight"}

    def test_of_a_tied_pair_the_embedding_stays_whatever_the_order(self, place: Place) -> None:
        _configure(place, tie_word_embeddings=True)
        shared, other = torch.ones(4, 2), torch.ones(2)
        for names in (("lm_head.weight", "wte.weight"), ("decoder.embed_tokens.weight", "shared.weight"), ("a", "b")):
            place.save({names[0]: shared, names[1]: shared, "c": other, "d": other.clone()})
            assert place.convert().code == 0
            kept = names[0] if names[0] == "a" else names[1]
            assert load_file(place.new / SINGLE).keys() == {kept, "c", "d"}
            shutil.rmtree(place.new)

    def test_a_head_that_loaders_would_not_tie_is_written_as_its_own(self, place: Place) -> None:
        shared = place.tensors["model.embed_tokens.weight"]
        place.save(place.tensors | {"lm_head.weight": shared})
        _configure(place, tie_word_embeddings=False)
        assert place.convert().code == 0
        assert torch.equal(load_file(place.new / SINGLE)["lm_head.weight"], shared)

    def test_views_and_strides_of_any_kind(self, place: Place) -> None:
        storage = torch.arange(48, dtype=torch.float32).reshape(6, 8)
        tensors = {
            "whole": storage,
            "transposed": storage.t(),
            "rows": storage[2:4],
            "columns": storage[:, 1::2],
            "repeated": torch.tensor([1.0, 2.0]).expand(3, 2),
            "negated": torch.tensor([1 + 2j]).conj().imag,
            "none": torch.empty(0, 4),
            "number": torch.tensor(2.5, dtype=torch.bfloat16),
            "parameter": torch.nn.Parameter(torch.ones(2, 3).half()),
            "flags": torch.tensor([True, False]),
            "ids": torch.arange(3),
        }
        place.save(tensors)
        assert place.convert().code == 0
        made = load_file(place.new / SINGLE)
        assert made.keys() == tensors.keys()
        for name, value in tensors.items():
            assert made[name].dtype == value.dtype
            assert torch.equal(made[name], value.detach().resolve_neg())

    def test_an_adapter(self, place: Place) -> None:
        tensors = {"base_model.model.q.lora_A.weight": torch.ones(2, 4)}
        place.save(tensors, "adapter_model.bin")
        (place.folder / "config.json").unlink()
        settings = {"peft_type": "LORA", "r": 2}
        (place.folder / "adapter_config.json").write_text(json.dumps(settings))
        done = place.convert()
        assert "not copied" not in done.err
        assert load_file(place.new / "adapter_model.safetensors").keys() == tensors.keys()
        assert json.loads((place.new / "adapter_config.json").read_text()) == settings
        assert not (place.new / "config.json").exists()

    def test_what_stays_behind_is_told(self, place: Place) -> None:
        place.save(place.tensors)
        for name in ("training_args.bin", "2_Dense/pytorch_model.bin"):
            (place.folder / name).parent.mkdir(exist_ok=True)
            (place.folder / name).write_bytes(b"never opened")
        (place.folder / "modeling.py").write_text("raise SystemExit")
        _configure(place, auto_map={"AutoModel": "modeling.X"})
        done = place.convert()
        assert "not converted: `2_Dense/pytorch_model.bin`, `training_args.bin`" in done.err
        assert f"not copied from `{place.folder}`: `2_Dense/`, `modeling.py` (code)" in done.err
        assert "the output's config.json has no `auto_map`" in done.err
        assert not list(place.new.glob("*.py"))


def _numbered(number: int, place: Place) -> str:
    return f"pytorch_model-{number:05}-of-{len(place.tensors):05}.bin"


def _configure(place: Place, **changes: Any) -> None:
    file = place.folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


class _Bomb:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return (Path.touch, (self.file,))


class _Shell(_Bomb):
    def __reduce__(self) -> Any:
        return (os.system, (f"touch '{self.file}'",))


SPARSE = torch.ones(3).to_sparse()
OTHERS: dict[str, Callable[[], Any]] = {
    "a checkpoint of a training": lambda: {"state_dict": {"w": torch.ones(2)}, "epoch": 3},
    "a list": lambda: [torch.ones(2)],
    "a tensor alone": lambda: torch.ones(2),
    "a key that is no text": lambda: {3: torch.ones(2)},
    "a module": lambda: torch.nn.Linear(2, 2),
    "a class": lambda: {"w": torch.ones(2), "type": Place},
    "a sparse tensor": lambda: {"w": SPARSE},
    "a tensor without memory": lambda: {"w": torch.ones(2, device="meta")},
}


class TestOnlyTensors:
    @pytest.mark.parametrize("kind", OTHERS)
    def test_anything_else_is_refused(self, place: Place, kind: str) -> None:
        place.save(OTHERS[kind]())
        place.refused(3, f"`{place.folder / PICKLED}` holds something other than tensors", "hint: only a plain table")

    def test_all_files_are_named_at_once(self, place: Place) -> None:
        for number, name in enumerate(sorted(place.tensors), start=1):
            content: Any = {name: place.tensors[name]} if number > 2 else {name: number}
            place.save(content, _numbered(number, place))
        place.refused(3, f"{_numbered(1, place)}` holds something", f"{_numbered(2, place)}` holds something")

    @pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn, torch.uint16])
    def test_a_dtype_that_nothing_here_reads_is_refused(self, place: Place, dtype: torch.dtype) -> None:
        place.save({"w": torch.ones(2).to(dtype)})
        place.refused(3, f"a dtype that cannot be merged: `w` is {str(dtype).removeprefix('torch.')}")

    @pytest.mark.parametrize("kind", [_Bomb, _Shell])
    @pytest.mark.parametrize("flags", [(), ("--in-memory",)])
    def test_what_a_pickle_names_is_never_called(self, place: Place, tmp_path: Path, kind: Any, flags: Any) -> None:
        bomb = kind(tmp_path / "ran")
        for old in (False, True)[: 1 + bool(flags)]:
            place.save({"w": torch.ones(2), "x": bomb}, _use_new_zipfile_serialization=not old)
            place.refused(3, "holds something other than tensors: it names", flags=flags)
        (place.folder / PICKLED).write_bytes(pickle.dumps(bomb))
        place.refused(3, flags=flags)
        assert not (tmp_path / "ran").exists()

    def test_nothing_else_reads_pickle(self) -> None:
        """Of models and whatever comes with them; numba's own cache of compiled loops is code anyway."""
        readers = set()
        for file in Path(lowmem_aim.__file__).parent.rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                loads = isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.load"
                modules = [node.module] if isinstance(node, ast.ImportFrom) else []
                modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                if loads or {"pickle", "shelve", "joblib", "dill", "marshal"} & set(modules):
                    readers.add(file.name)
        assert readers == {"pickle_program.py"}


class TestFormats:
    def test_an_old_file_says_what_memory_it_takes_and_is_loaded_whole_on_demand(self, place: Place) -> None:
        file = place.save(place.tensors, _use_new_zipfile_serialization=False)
        size = f"{file.stat().st_size / 1e3:.1f} kB"
        place.refused(3, "before torch 1.6", f"as a whole it takes {size} of memory", "hint: `--in-memory` loads it")
        assert place.convert("--in-memory").code == 0
        made = load_file(place.new / SINGLE)
        assert all(torch.equal(made[name], value) for name, value in place.tensors.items())

    def test_a_compressed_file_is_loaded_whole_on_demand(self, place: Place) -> None:
        plain = place.save(place.tensors, "plain.zip")
        with (
            zipfile.ZipFile(plain) as source,
            zipfile.ZipFile(place.folder / PICKLED, "w", zipfile.ZIP_DEFLATED) as out,
        ):
            for entry in source.infolist():
                out.writestr(entry.filename, source.read(entry.filename))
        place.refused(3, "it is compressed", "as a whole it takes")
        assert place.convert("--in-memory").code == 0
        assert load_file(place.new / SINGLE).keys() == place.tensors.keys()

    def test_a_file_that_the_system_does_not_map_says_the_same(
        self, place: Place, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def load(*arguments: Any, **settings: Any) -> None:
            assert settings["mmap"]
            raise RuntimeError("unable to mmap 9 bytes from file <x>: Cannot allocate memory (12)")

        file = place.save(place.tensors)
        monkeypatch.setattr(torch, "load", load)
        with pytest.raises(ModelError, match=r"Cannot allocate memory.*; as a whole it takes") as caught:
            pickle_program.load(file, whole=False)
        assert "--in-memory" in caught.value.hint

    def test_a_whole_load_that_does_not_fit_is_told_before(self, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
        place.save(place.tensors)
        monkeypatch.setattr(job, "free_bytes", lambda: 1000)
        place.refused(5, "of memory as a whole, but 1.0 kB are free", flags=("--in-memory",))

    def test_damage_is_named(self, place: Place) -> None:
        whole = place.save(place.tensors).read_bytes()
        for content in (b"", b"junk" * 100, whole[:-100], whole[: len(whole) // 2], b"PK\x03\x04" + b"\0" * 100):
            (place.folder / PICKLED).write_bytes(content)
            place.refused(3, f"`{place.folder / PICKLED}`")
            place.refused(3, f"`{place.folder / PICKLED}` is damaged", flags=("--in-memory",))

    def test_random_damage_never_ends_the_child(self, place: Place, child: PickleReader) -> None:
        """Of the parts that are parsed: the pickle, at the front, and the zip's own tables."""
        file = place.save({name: place.tensors[name] for name in sorted(place.tensors)[:3]})
        whole, chance = file.read_bytes(), random.Random(0)
        for _ in range(150):
            spoilt = bytearray(whole)
            for _ in range(chance.randint(1, 4)):
                place_in_front = chance.random() < 0.6
                at = chance.randrange(1200) if place_in_front else len(whole) - 1 - chance.randrange(900)
                spoilt[at] = chance.randrange(256)
            file.write_bytes(spoilt)
            with contextlib.suppress(ModelError, MemoryBudgetError):
                for tensor in child.open(file, whole=chance.random() < 0.5):
                    read_all(child, tensor.name)
            assert child.process.poll() is None


class TestTheChild:
    @pytest.mark.skipif(sys.platform != "linux", reason="namespaces are Linux's")
    def test_it_has_no_network(self, child: PickleReader) -> None:
        if child.network:
            pytest.skip(child.network)
        assert os.readlink(f"/proc/{child.process.pid}/ns/net") != os.readlink("/proc/self/ns/net")

    def test_where_it_has_one_that_is_told(
        self, place: Place, child: PickleReader, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        place.save(place.tensors)
        monkeypatch.setattr(child, "network", "Operation not permitted")
        done = place.convert()
        assert done.code == 0
        assert "could use the network: this system does not take it away (Operation not permitted)" in done.err

    @pytest.mark.skipif(not process_limits.is_limited(), reason="the figure is Linux's")
    def test_it_holds_one_tensor_at_a_time(self, place: Place, child: PickleReader) -> None:
        tensors = {f"w{i}": torch.full((1024, 1024), float(i)).t() for i in range(8)}  # 4 MiB each, not contiguous
        file = place.save(tensors)
        child.open(file, whole=False)
        sizes = []
        for name in tensors:
            pieces = child.data(name)
            assert next(pieces)
            sizes.append(_anonymous(child.process.pid))
            assert sum(map(len, pieces)) < 4 << 20
        assert max(sizes) - min(sizes) < 6 << 20

    def test_a_file_that_was_cut_off_meanwhile_ends_it_and_nothing_else(
        self, place: Place, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.undo()  # a child of its own
        file = place.save({"w": torch.ones(1 << 20)})
        with PickleReader.start() as reader:
            reader.open(file, whole=False)
            os.truncate(file, 100)
            with pytest.raises(ModelError, match="was cut off while it was being read"):
                read_all(reader, "w")


def read_all(reader: PickleReader, name: str) -> bytes:
    return b"".join(reader.data(name))


def _anonymous(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


class TestFolders:
    def test_the_new_folder_must_not_exist(self, place: Place) -> None:
        place.save(place.tensors)
        place.new.mkdir()
        done = place.convert()
        assert done.code == 2
        assert f"`{place.new}` exists already" in done.err
        assert list(place.new.iterdir()) == []
        (place.new / "a.txt").touch()
        assert place.convert().err.count("error: ") == 1
        (place.new / "a.txt").unlink()
        place.new.rmdir()
        done = place.run("convert", place.folder, place.folder / "new")
        assert done.code == 2
        assert "lies inside an input model" in done.err

    def test_a_folder_that_is_not_there_is_not_looked_for_on_the_hub(self, place: Place) -> None:
        done = place.run("convert", place.folder.parent / "nowhere", place.new)
        assert done.code == 3
        assert "there is no model folder" in done.err
        assert "Hub" not in done.err

    def test_nothing_to_convert(self, place: Place, llama: Path) -> None:
        place.refused(3, "has neither pytorch_model.bin, nor its shards, nor adapter_model.bin")
        (place.folder / "consolidated.00.pth").touch()
        place.refused(3, "`consolidated.00.pth` is not one of these")
        shutil.copy(llama / "base" / SINGLE, place.folder)
        place.refused(3, "has safetensors already (`model.safetensors`)")

    def test_no_folder(self, place: Place) -> None:
        done = place.run("convert", "owner/model", place.new)
        assert done.code == 3
        assert "hint: `hf download owner/model --local-dir FOLDER`" in done.err
        assert place.run("convert", place.folder / "none", place.new).code == 3

    def test_missing_shards_and_tensors_are_named(self, place: Place) -> None:
        place.save(place.tensors, _numbered(2, place))
        place.refused(3, f"{_numbered(1, place)}` is missing", f"{_numbered(3, place)}` is missing")
        weight_map = {"w": _numbered(2, place)}
        (place.folder / f"{PICKLED}.index.json").write_text(json.dumps({"weight_map": weight_map}))
        place.refused(3, f"{_numbered(2, place)}` lacks `w`")
        for odd in ("../x.bin", "x.safetensors", 3, None):
            (place.folder / f"{PICKLED}.index.json").write_text(json.dumps({"weight_map": {"w": odd}}))
            place.refused(3, "not a plain file name that ends in .bin")

    def test_a_link_out_of_the_folder_is_refused(self, place: Place, tmp_path: Path) -> None:
        place.save(place.tensors).rename(tmp_path / "elsewhere.bin")
        (place.folder / PICKLED).symlink_to(tmp_path / "elsewhere.bin")
        place.refused(3, f"`{place.folder / PICKLED}` is a link that leads out of its model folder")


class Stopped(BaseException):
    """As a signal would."""


class TestEnds:
    def test_a_kill_leaves_no_model_and_the_same_command_starts_over(
        self, place: Place, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        place.save(place.tensors)

        def stop(*arguments: Any) -> None:
            raise Stopped

        with monkeypatch.context() as patch:
            patch.setattr(job, "_write_small", stop)
            patch.setattr(workspace, "_clear", lambda private: None)  # a kill cleans nothing up
            patch.setattr(workspace, "_remove_empty", lambda folders: None)
            with pytest.raises(Stopped):
                convert(str(place.folder), place.new)
        left = Path(f"{place.new}.partial")
        assert not place.new.exists()
        assert list(left.rglob(SINGLE))
        assert not list(left.rglob("config.json"))
        assert place.convert().code == 0
        assert load_file(place.new / SINGLE).keys() == place.tensors.keys()
        assert not left.exists()

    def test_config_json_is_written_last(self, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
        place.save(place.tensors)
        written: list[str] = []
        plain = job.write_file
        monkeypatch.setattr(job, "write_file", lambda file, data: (written.append(file.name), plain(file, data)))
        assert place.convert().code == 0
        assert written[-1] == "config.json"

    def test_an_interruption_leaves_nothing(self, place: Place) -> None:
        place.save(place.tensors)

        def emit(event: Event) -> None:
            if isinstance(event, Advanced):
                raise Stopped

        with pytest.raises(Stopped):
            convert(str(place.folder), place.new, emit=emit)
        assert [path.name for path in place.new.parent.iterdir()] == ["folder"]

    def test_a_full_disk_is_told_before(self, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
        place.save(place.tensors)
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(100, 99, 1))  # type: ignore[attr-defined]
        place.refused(4, "the converted model needs")

    def test_a_file_that_changes_between_plan_and_work_is_an_error(self, place: Place) -> None:
        for number, name in enumerate(sorted(place.tensors), start=1):
            place.save({name: place.tensors[name]}, _numbered(number, place))

        def emit(event: Event) -> None:
            if isinstance(event, Notice | Advanced):
                place.save({"other": torch.ones(2)}, _numbered(len(place.tensors), place))

        with pytest.raises(ModelError, match="changed while it was being read"):
            convert(str(place.folder), place.new, emit=emit)
        assert not place.new.exists()
