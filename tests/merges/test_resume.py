"""A run that ends early goes on with the same command and ends with the same bytes; another job is refused."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
from conftest import Run
from merge_cases import BY_METHOD, FLAGS, digests, recipe
from safetensors.torch import load_file, save_file
from stopping import SHARDS, Stopped, held, stop, stopping_after

from lowmem_aim.errors import DiskError, LockedError, ModelError, ResumeError, UsageError, VerifyError
from lowmem_aim.events import Event, TensorDone
from lowmem_aim.jobs.merge import merge
from lowmem_aim.jobs.plan import plan
from lowmem_aim.merging.slices import TensorInputs
from lowmem_aim.output import journal as journal_file
from lowmem_aim.output import workspace as output
from lowmem_aim.output import writer as write
from lowmem_aim.output.folder import FACTS, LOG, PRIVATE, SUMS, is_finished, staged_bytes
from lowmem_aim.output.journal import Journal
from lowmem_aim.output.records import VERSION, Group, Identity, PlanSize, Schema
from lowmem_aim.output.verify import verify
from lowmem_aim.output.writer import Commit, ShardWriter, finished_prefix
from lowmem_aim.recipe.reader import read_recipe
from lowmem_aim.recipe.yaml_tree import parse
from lowmem_aim.system import lock
from lowmem_aim.system.options import Options
from lowmem_aim.view.status import status_of

# --- going on ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", BY_METHOD)
def test_interrupted_again_and_again_it_ends_with_the_same_bytes(
    method: str, llama: Path, texts: Path, tmp_path: Path, each_tensor: None
) -> None:
    job = recipe(llama, method, **FLAGS[method], omega=0.3, calibration=str(texts))
    merge(job, tmp_path / "whole", SHARDS)
    out = tmp_path / "out"
    for tensors in (3, 1, 9, 4):
        stop(job, out, tensors)
        assert not (out / "config.json").exists()
    notices: list[str] = []
    merge(job, out, SHARDS, stopping_after(1000, notices))
    assert any(text.startswith("resuming: ") and " tensors, " in text for text in notices)
    assert digests(out) == digests(tmp_path / "whole")


def test_what_is_finished_is_not_read_again(
    llama: Path, tmp_path: Path, each_tensor: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = recipe(llama, "linear")
    stop(job, tmp_path / "out", 20)
    finished = status_of(tmp_path / "out").tensors
    read: list[str] = []
    slices = TensorInputs.slices

    def noted(tensor: TensorInputs, first_pass: bool) -> Any:
        read.append(tensor.task.name)
        return slices(tensor, first_pass)

    monkeypatch.setattr(TensorInputs, "slices", noted)
    merge(job, tmp_path / "out", SHARDS)
    total = len(load_file(llama / "base" / "model.safetensors"))
    assert 0 < finished <= 21  # how far the syncs of the last ones came is the disk's affair
    assert len(read) == total - finished


def test_measured_activations_are_kept_whatever_becomes_of_the_cache(
    llama: Path, texts: Path, tmp_path: Path, each_tensor: None, monkeypatch: pytest.MonkeyPatch
) -> None:

    job = recipe(llama, "linear", omega=0.3, calibration=str(texts))
    options = Options(shard_bytes=40_000, use_cache=False)
    merge(job, tmp_path / "whole", options)
    stop(job, tmp_path / "out", 5, options)

    def never(*args: Any, **given: Any) -> None:
        raise AssertionError("calibrated again")

    monkeypatch.setattr("lowmem_aim.measuring.mean_activations.mean_activations", never)
    merge(job, tmp_path / "out", options)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_before_anything_is_finished_nothing_is_left(llama: Path, tmp_path: Path) -> None:
    stop(recipe(llama, "linear"), tmp_path / "a" / "out", 0, Options())
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "grow", "journal", "row", "lost row"])
def test_damage_leads_to_work_done_again(damage: str, llama: Path, tmp_path: Path, each_tensor: None) -> None:
    job, out = recipe(llama, "ties"), tmp_path / "out"
    merge(job, tmp_path / "whole", SHARDS)
    stop(job, out, 15)
    shards = sorted((out / PRIVATE / "staging").glob("*.safetensors"))
    journal = out / PRIVATE / "journal.sqlite"
    if damage == "flip":
        flip(shards[0], shards[0].stat().st_size * 8 // 2)
    elif damage == "cut":
        os.truncate(shards[-1], 100)
    elif damage == "remove":
        shards[0].unlink()
    elif damage == "grow":
        with shards[0].open("ab") as stream:
            stream.write(b"junk")
    elif damage == "journal":
        journal.write_bytes(random.Random(0).randbytes(5000))
    else:
        where = "kind = 'group'" + (" AND name LIKE '%000000002'" if damage == "lost row" else "")
        with sqlite3.connect(journal) as connection:
            connection.execute(f"UPDATE entries SET value = replace(value, '1', '2') WHERE {where}")
        connection.close()
    merge(job, out, SHARDS)
    verify(out, f"{PRIVATE}/{SUMS}")
    assert digests(out) == digests(tmp_path / "whole")


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.long)])
def test_killed_at_any_step_of_the_finish_it_is_no_model_and_goes_on(
    every: int, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = recipe(llama, "linear")
    merge(job, tmp_path / "whole", SHARDS)
    replace, sync = os.replace, output.sync_folder
    steps = 0
    for stop_at in range(0, 1000, every):
        left, out = [stop_at], tmp_path / f"out-{stop_at}"

        def counted(work: Callable[..., None], left: list[int] = left) -> Callable[..., None]:
            def step(*args: Any) -> None:
                if left[0] == 0:
                    raise Stopped
                left[0] -= 1
                work(*args)

            return step

        monkeypatch.setattr("lowmem_aim.output.workspace.os.replace", counted(replace))
        monkeypatch.setattr(output, "sync_folder", counted(sync))
        try:
            merge(job, out, SHARDS)
        except Stopped:
            complete = (out / "config.json").exists()
            assert not complete or {f.name for f in (tmp_path / "whole").iterdir()} <= {f.name for f in out.iterdir()}
        else:
            steps = stop_at
        monkeypatch.undo()
        merge(job, out, SHARDS)
        assert digests(out) == digests(tmp_path / "whole")
        assert is_finished(out)
        if steps:
            break
    assert steps > 15


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("trouble", ["lost", "truncated"])
def test_a_staged_shard_that_is_spoilt_before_the_finish_is_made_again(
    trouble: str, fresh: bool, llama: Path, tmp_path: Path, each_tensor: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, out = recipe(llama, "linear"), tmp_path / "out"

    def spoiling(space: output.Workspace, *given: Any) -> None:
        shard = sorted(space.staging.glob("*.safetensors"))[1]
        if trouble == "truncated":
            os.truncate(shard, shard.stat().st_size - 1)
        else:
            shard.unlink()
        output.publish(space, *given)

    monkeypatch.setattr("lowmem_aim.jobs.merge.publish", spoiling)
    with pytest.raises(DiskError, match=r"the staged file .* (is gone|has .* bytes instead of)") as caught:
        merge(job, out, SHARDS)
    assert "the next run makes it again" in caught.value.hint
    assert not (out / "config.json").exists()
    monkeypatch.undo()
    assert digests(merge(job, out, replace(SHARDS, fresh=fresh))) == digests(merge(job, tmp_path / "whole", SHARDS))


def test_a_list_of_names_that_another_version_wrote_of_lost_shards_is_no_dead_end(
    llama: Path, tmp_path: Path, each_tensor: None
) -> None:
    job, out = recipe(llama, "linear"), tmp_path / "out"
    stop(job, out, 7)
    (out / PRIVATE / "publishing.json").write_text(json.dumps({"model-00001-of-00003.safetensors": None}))
    assert digests(merge(job, out, SHARDS)) == digests(merge(job, tmp_path / "whole", SHARDS))


@pytest.mark.parametrize("trouble", ["locked journal", "lock", "foreign file", "take back"])
def test_trouble_at_the_start_costs_nothing_that_is_finished(
    trouble: str, llama: Path, tmp_path: Path, each_tensor: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, out = recipe(llama, "linear"), tmp_path / "out"
    stop(job, out, 15)
    finished = status_of(out).tensors
    holder = sqlite3.connect(out / PRIVATE / "journal.sqlite", isolation_level=None)
    expected: type[Exception] = DiskError

    def fails(*args: Any, **given: Any) -> None:
        raise OSError(28, "No space left on device")

    if trouble == "locked journal":
        holder.execute("BEGIN EXCLUSIVE")
        connect = sqlite3.connect
        monkeypatch.setattr(sqlite3, "connect", lambda *args, **given: connect(*args, timeout=0.1, **given))
    elif trouble == "lock":
        monkeypatch.setattr("lowmem_aim.system.lock.FileLock.acquire", fails)
    elif trouble == "foreign file":
        (out / "notes.txt").write_text("mine")
        monkeypatch.setattr("lowmem_aim.output.folder.check_output", lambda *args: None)  # it came after that
        expected = UsageError
    else:
        monkeypatch.setattr("lowmem_aim.output.workspace.Path.mkdir", fails)
    with pytest.raises(expected):
        merge(job, out, SHARDS)
    monkeypatch.undo()
    holder.close()
    (out / "notes.txt").unlink(missing_ok=True)
    assert status_of(out).tensors == finished
    merge(job, out, SHARDS)
    assert is_finished(out)


def test_files_that_the_user_puts_there_meanwhile_are_his(llama: Path, tmp_path: Path, each_tensor: None) -> None:
    job, out = recipe(llama, "linear"), tmp_path / "out"

    def emit(event: Event) -> None:
        if isinstance(event, TensorDone) and not event.earlier:
            (out / "README.md").write_text("mine")

    with pytest.raises(DiskError, match=r"README\.md` appeared in the output folder") as caught:
        merge(job, out, SHARDS, emit)
    assert "the same command resumes" in caught.value.hint
    assert (out / "README.md").read_text() == "mine"
    with pytest.raises(UsageError, match="not empty"):
        merge(job, out, SHARDS)
    (out / "README.md").rename(tmp_path / "README.md")
    merge(job, out, SHARDS)
    assert digests(out) == digests(merge(job, tmp_path / "whole", SHARDS))


def test_another_job_is_refused_without_touching_what_was_published(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, out = recipe(llama, "linear"), tmp_path / "out"

    def killed(*args: Any) -> None:
        raise Stopped

    monkeypatch.setattr(output, "_seal", killed)
    with pytest.raises(Stopped):
        merge(job, out, SHARDS)
    monkeypatch.undo()
    before = digests(out)
    with pytest.raises(ResumeError):
        merge(recipe(llama, "task_arithmetic", weight=("0.3",)), out, SHARDS)
    assert digests(out) == before
    assert "config.json" in before
    merge(job, out, SHARDS)
    assert digests(out) == before


# --- what is not the same ---------------------------------------------------------------------------------------------


@pytest.fixture
def models(llama: Path, tmp_path: Path) -> Path:
    """Copies that may be changed."""
    for name in ("base", "math", "code", "chat"):
        tiny.perturbed(llama / name, tmp_path / "models" / name, scale=0.0)
    return tmp_path / "models"


def test_another_recipe_seed_or_size_is_refused_with_the_difference(
    models: Path, tmp_path: Path, each_tensor: None, run: Run
) -> None:
    out = tmp_path / "out"
    stop(recipe(models, "dare_linear", density=("0.4",), weight=("0.3",)), out, 15)
    command = ["merge", out, "--method", "dare_linear", "--base", models / "base", "--shard-size", "40000"]
    for name in ("math", "code", "chat"):
        command += ["--expert", models / name]
    done = run(*command, "--density", "0.4", "--weight", "0.3", "--seed", "7")
    assert done.code == 7
    assert "seed: 0 then, 7 now" in done.err
    assert "--fresh" in done.err
    done = run(*command, "--density", "0.5", "--weight", "0.3")
    assert done.code == 7
    assert "models[" in done.err
    assert run(*command, "--density", "0.4", "--weight", "0.3").code == 0


def test_fresh_starts_over(models: Path, tmp_path: Path, each_tensor: None) -> None:
    out = tmp_path / "out"
    stop(recipe(models, "linear"), out, 15)
    other = recipe(models, "task_arithmetic", weight=("0.3",))
    with pytest.raises(ResumeError, match="merge_method"):
        merge(other, out, SHARDS)
    merge(other, out, Options(shard_bytes=40_000, fresh=True))
    assert digests(out) == digests(merge(other, tmp_path / "whole", SHARDS))


def test_an_input_of_another_time_is_read_again_and_accepted(models: Path, tmp_path: Path, each_tensor: None) -> None:
    job, out, notices = recipe(models, "ties"), tmp_path / "out", []
    merge(job, tmp_path / "whole", SHARDS)
    stop(job, out, 15)
    os.utime(models / "math" / "model.safetensors", (1, 1))
    merge(job, out, SHARDS, stopping_after(1000, notices))
    assert any("`math` has new or moved files" in text for text in notices)
    assert any(text.startswith("resuming: ") for text in notices)
    assert digests(out) == digests(tmp_path / "whole")


def test_an_input_of_other_content_is_refused_by_name(models: Path, tmp_path: Path, each_tensor: None) -> None:
    job, out = recipe(models, "ties"), tmp_path / "out"
    stop(job, out, 15)
    file = models / "math" / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"][0, 0] += 1  # of the first tensor of the output
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ResumeError, match=r"`math` no longer has the same `lm_head\.weight`") as caught:
        merge(job, out, SHARDS)
    assert caught.value.exit_code == 7


def test_other_versions_are_refused_or_accepted_and_told(
    models: Path, tmp_path: Path, each_tensor: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, out = recipe(models, "linear"), tmp_path / "out"
    stop(job, out, 15)
    from lowmem_aim.jobs import identity

    monkeypatch.setattr(identity, "versions", lambda method: {"lowmem-aim": "0.1.0", "torch": "9.9"})
    with pytest.raises(ResumeError, match=r"torch: .* then, 9\.9 now") as caught:
        merge(job, out, SHARDS)
    assert "--accept-environment" in caught.value.hint
    merge(job, out, Options(shard_bytes=40_000, accept_environment=True))
    steps = json.loads((out / "lowmem_aim.json").read_text())["environments"]
    assert [step["torch"] == "9.9" for step in steps] == [False, True]
    assert "resumed in another environment" in (out / "README.md").read_text()


# --- when it is finished ----------------------------------------------------------------------------------------------


def test_the_same_command_on_a_finished_output_changes_nothing(models: Path, tmp_path: Path) -> None:
    job, out, notices = recipe(models, "linear"), tmp_path / "out", []
    merge(job, out)
    before = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in out.iterdir() if file.is_file()}
    assert merge(job, out, emit=stopping_after(0, notices)) == out
    assert any("finished already" in text for text in notices)
    assert {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in before} == before
    verify(out, f"{PRIVATE}/{SUMS}")
    with pytest.raises(UsageError, match="not empty: it holds another merge"):
        merge(recipe(models, "task_arithmetic"), out)
    with pytest.raises(UsageError, match="not empty"):
        merge(recipe(models, "task_arithmetic"), out, Options(fresh=True))  # a finished model is the user's to remove
    assert is_finished(out)


def flip(file: Path, bit: int) -> None:
    data = bytearray(file.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


@pytest.mark.parametrize("options", [SHARDS, Options()])
def test_verify_finds_what_a_loader_would_take_for_the_model(
    options: Options, llama: Path, tmp_path: Path, run: Run
) -> None:
    out = merge(recipe(llama, "linear"), tmp_path / "out", options)
    for name in ("NOTES.md", "shot.PNG", "model.Q4_0.gguf", ".gitattributes", "LICENSE.txt", "training_args.bin"):
        (out / name).write_text("mine")
    (out / ".git").mkdir()
    done = run("verify", out)
    assert done.code == 0
    assert [line for line in done.err.splitlines() if "warning" in line] == [
        "warning: `training_args.bin` does not belong to this output"
    ]
    strays = ["adapter_config.json", "consolidated.00.safetensors", "model-00009.safetensors", "params.json", "x.py"]
    for name in strays:
        (out / name).write_text("{}")
    done = run("verify", out)
    assert done.code == 8
    assert [
        name for name in strays if f"`{name}` does not belong to this output, and a loader would read it" in done.err
    ] == strays
    assert "move these files elsewhere" in done.err
    if options is SHARDS:
        (out / "model.safetensors").write_bytes((llama / "base" / "model.safetensors").read_bytes())
        assert "`model.safetensors` does not belong to this output" in run("verify", out).err


def test_verify_finds_any_flipped_bit(llama: Path, tmp_path: Path, run: Run) -> None:
    out = merge(recipe(llama, "linear"), tmp_path / "out", SHARDS)
    assert run("verify", out).code == 0
    draw = random.Random(0)
    files = [file for file in sorted(out.rglob("*")) if file.is_file() and file.name not in ("lock", LOG, FACTS)]
    assert {f"{PRIVATE}/journal.sqlite", "config.json", f"{PRIVATE}/{SUMS}"} <= {
        file.relative_to(out).as_posix() for file in files
    }
    for file in files * 3:
        bit = draw.randrange(file.stat().st_size * 8)
        flip(file, bit)
        with pytest.raises(VerifyError) as caught:
            verify(out, f"{PRIVATE}/{SUMS}")
        assert caught.value.exit_code == 8
        assert file.name in str(caught.value)
        flip(file, bit)
    (out / "tokenizer.json").unlink()
    done = run("verify", out)
    assert done.code == 8
    assert "`tokenizer.json` is missing" in done.err


@pytest.mark.parametrize("names", [[], ["config.json", "../out/config.json"], ["config.json", "/etc/hostname"]])
def test_a_list_of_digests_that_no_run_wrote_is_refused(names: list[str], llama: Path, tmp_path: Path) -> None:
    from lowmem_aim.output.verify import sums_text

    out = merge(recipe(llama, "linear"), tmp_path / "out")
    (out / PRIVATE / SUMS).write_bytes(sums_text(dict.fromkeys(names, "0")))
    with pytest.raises(VerifyError, match="not a list of digests that this tool wrote"):
        verify(out, f"{PRIVATE}/{SUMS}")


def test_the_list_of_digests_is_what_sha256sum_takes(llama: Path, tmp_path: Path) -> None:
    out = merge(recipe(llama, "linear"), tmp_path / "out")
    lines = (out / PRIVATE / SUMS).read_text().splitlines()
    for line in lines[:-1]:
        digest, name = line.split("  ")
        assert hashlib.sha256((out / name).read_bytes()).hexdigest() == digest
    assert lines[-1].startswith("# ")


# --- seen from outside ------------------------------------------------------------------------------------------------


def test_status_tells_interrupted_from_finished(llama: Path, tmp_path: Path, each_tensor: None, run: Run) -> None:
    out = tmp_path / "out"
    assert run("status", out).code == 2
    stop(recipe(llama, "linear"), out, 15)
    found = status_of(out)
    assert (found.state, found.owner) == ("interrupted", "")
    assert 0 < found.tensors < found.tensors_total
    assert 0 < found.bytes < found.bytes_total
    assert "run the same command again" in run("status", out).out
    merge(recipe(llama, "linear"), out, SHARDS)
    assert json.loads(run("status", out, "--json").out)["state"] == "finished"
    assert run("verify", tmp_path / "nothing").code == 2


def test_asking_whether_a_run_is_alive_does_not_stop_one_that_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = lock.FileLock(tmp_path / "lock")
    asked.acquire()
    monkeypatch.setattr(lock, "PATIENCE_SECONDS", 60)
    sleeps = 0

    def sleep(seconds: float) -> None:
        nonlocal sleeps
        sleeps += 1
        asked.release()

    monkeypatch.setattr(time, "sleep", sleep)
    with lock.locked(tmp_path / "lock"):
        assert sleeps == 1
        monkeypatch.setattr(lock, "PATIENCE_SECONDS", 0)
        with pytest.raises(LockedError), lock.locked(tmp_path / "lock"):
            pass
    assert not lock.is_held(tmp_path / "lock")


class TestTwoRuns:
    def start(self, llama: Path, out: Path) -> subprocess.Popen[str]:
        """A run that stops for good in its first tensor."""
        return held("lowmem_aim.output.shards.raw", "merge", out, "--method", "linear", "--expert", llama / "math")

    def test_the_second_names_the_first_and_a_dead_ones_lock_is_taken_over(
        self, llama: Path, tmp_path: Path, run: Run, known: None
    ) -> None:
        out = tmp_path / "out"
        process = self.start(llama, out)
        try:
            command = ("merge", out, "--method", "linear", "--expert", llama / "math")
            done = run(*command)
            assert done.code == 6
            assert f"process {process.pid} on " in done.err
            found = status_of(out)
            assert found.state == "running"
            assert str(process.pid) in found.owner
        finally:
            process.kill()
            process.communicate(timeout=60)
        assert status_of(out).state == "interrupted"
        assert run(*command).code == 0

    def test_a_second_signal_ends_it_at_once(self, llama: Path, tmp_path: Path, known: None) -> None:
        process = self.start(llama, tmp_path / "out")
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 130
        assert "the same command" in err
        assert "Traceback" not in err


# --- the journal and the writer ---------------------------------------------------------------------------------------


def test_the_journal_keeps_what_it_is_given(tmp_path: Path) -> None:
    groups = [
        Group("a", 0, 2, 90, "x", {"0": {"t": "1"}}),
        Group("a", 2, 11, 500, "y", {}),
        Group("ab", 0, 1, 5, "z", {}),
    ]
    with Journal(tmp_path) as journal:
        for group in reversed(groups):
            journal.keep_group(group)
        journal.keep(PlanSize(3))
    with Journal(tmp_path) as journal:
        assert journal.groups("a") == groups[:2]
        assert journal.groups("ab") == groups[2:]
        assert journal.kept(PlanSize) == PlanSize(3, shards=[], headers=[])
        assert journal.kept(Identity) is None
        journal.forget(Group)
        assert not journal.holds(Group)
        assert journal._connection.execute("PRAGMA synchronous").fetchone() == (3,)  # EXTRA
        assert journal._connection.execute("PRAGMA journal_mode").fetchone() == ("delete",)


def test_a_damaged_row_is_no_row(tmp_path: Path) -> None:
    with Journal(tmp_path) as journal:
        journal.keep(PlanSize(3))
        journal._connection.execute("UPDATE entries SET value = '{\"tensors\": 4}'")
        assert journal.kept(PlanSize) is None


@pytest.mark.parametrize(("place", "value"), [(0, 0), (18, 5), (19, 9), (20, 3), (4096 + 3, 0xFF)])
def test_a_damaged_journal_is_an_empty_one_that_can_be_written(place: int, value: int, tmp_path: Path) -> None:
    with Journal(tmp_path) as journal:
        journal.keep(PlanSize(1))
    file = tmp_path / "journal.sqlite"
    data = bytearray(file.read_bytes())
    data[place] = value  # of the header: magic, who may write or read, a page's rest; of a page: how many cells
    file.write_bytes(data)
    with Journal(tmp_path) as journal:
        assert journal.kept(PlanSize) is None
        journal.keep(PlanSize(2))
        assert journal.kept(PlanSize) == PlanSize(2, shards=[], headers=[])


IDENTITY = Identity({"seed": 1}, [], {"device": "cpu"})


def test_text_that_is_none_and_columns_of_other_names_are_damage(tmp_path: Path) -> None:
    with Journal(tmp_path) as journal:
        journal.keep(PlanSize(1))
        journal.keep(IDENTITY)
        journal._connection.execute("UPDATE entries SET value = CAST(x'80ff' AS TEXT) WHERE kind = 'plan'")
        assert journal.kept(PlanSize) is None
        assert journal.kept(Identity) == IDENTITY
        journal._connection.execute("ALTER TABLE entries RENAME COLUMN digest TO other")
    with Journal(tmp_path, read_only=True) as journal:
        assert journal.kept(Identity) is None
    with Journal(tmp_path) as journal:
        journal.keep(PlanSize(2))
        assert journal.kept(PlanSize) == PlanSize(2, shards=[], headers=[])


def test_a_journal_that_cannot_be_written_is_exit_4(tmp_path: Path) -> None:
    with Journal(tmp_path) as journal:
        journal._connection.execute("PRAGMA query_only = 1")
        with pytest.raises(DiskError, match="journal") as caught:
            journal.keep(PlanSize(1))
        assert caught.value.exit_code == 4
    (tmp_path / "sub" / "journal.sqlite").mkdir(parents=True)
    with pytest.raises(DiskError, match="journal"):
        Journal(tmp_path / "sub")


def written(path: Path, pieces: list[bytes], commits: list[Commit], prefix: Any = None, last: int | None = None) -> str:
    size = sum(map(len, pieces))
    begin = prefix.tensors if prefix else 0
    with ShardWriter(path, size, commits.append, prefix) as shard:
        for number, piece in enumerate(pieces[begin:last], start=begin):
            shard.append(piece)
            shard.tensor_done(number)
        return shard.close() if last is None else ""


def test_commits_come_after_the_bytes_and_the_writer_goes_on_where_they_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write, "GROUP_BYTES", 25)
    order: list[str] = []
    sync = os.fdatasync
    monkeypatch.setattr(os, "fdatasync", lambda descriptor: order.append("sync") or sync(descriptor))
    pieces = [bytes([number]) * 10 for number in range(8)]
    commits: list[Commit] = []
    whole = written(tmp_path / "whole", pieces, commits)
    assert [(c.tensors, c.end, c.facts) for c in commits] == [
        (3, 30, (0, 1, 2)),
        (6, 60, (3, 4, 5)),
        (8, 80, (6, 7)),
    ]
    assert order == ["sync"] * 3
    data = b"".join(pieces)
    assert [c.sha256 for c in commits] == [hashlib.sha256(data[: c.end]).hexdigest() for c in commits]
    groups = [Group("s", c.tensors - len(c.facts), c.tensors, c.end, c.sha256, {}) for c in commits]
    (tmp_path / "part").write_bytes(data[:60] + b"junk")
    prefix, good = finished_prefix(tmp_path / "part", groups)
    assert prefix is not None
    assert (prefix.tensors, prefix.end, good) == (6, 60, groups[:2])
    assert written(tmp_path / "part", pieces, [], prefix) == whole
    assert (tmp_path / "part").read_bytes() == data
    flip(tmp_path / "part", 45 * 8)
    prefix, good = finished_prefix(tmp_path / "part", groups)
    assert prefix is not None
    assert (prefix.tensors, good) == (3, groups[:1])
    assert finished_prefix(tmp_path / "whole", [groups[0], groups[2]])[1] == groups[:1]  # a row is lost
    assert finished_prefix(tmp_path / "absent", groups) == (None, [])


def test_a_commit_that_fails_stops_the_writer(tmp_path: Path) -> None:
    def full(done: Commit) -> None:
        raise DiskError("the journal is full")

    with ShardWriter(tmp_path / "s", 4, full) as shard:
        shard.append(b"1234")
        shard.tensor_done()
        with pytest.raises(DiskError, match="journal is full"):
            shard.close()


class TestAnotherVersionsJournal:
    def test_it_is_refused_with_the_way_out(self, llama: Path, tmp_path: Path, run: Run, each_tensor: None) -> None:
        job, out = recipe(llama, "linear"), tmp_path / "out"
        stop(job, out, 15)
        with Journal(out / PRIVATE) as journal:
            journal.keep(Schema(VERSION + 1))
        with pytest.raises(
            ResumeError, match=f"has records of version {VERSION + 1}, and this is version {VERSION}"
        ) as caught:
            merge(job, out, SHARDS)
        assert caught.value.exit_code == 7
        assert "`--fresh`" in caught.value.hint
        assert plan(job, out, SHARDS, measure=False).exit_code == 7
        assert json.loads(run("status", out, "--json").out)["state"] == "interrupted"
        assert digests(merge(job, out, replace(SHARDS, fresh=True))) == digests(merge(job, tmp_path / "whole", SHARDS))

    def test_a_row_with_other_fields_counts_as_absent(self, llama: Path, tmp_path: Path, each_tensor: None) -> None:
        job, out = recipe(llama, "linear"), tmp_path / "out"
        stop(job, out, 15)
        with Journal(out / PRIVATE) as journal:
            for kind, name in journal._connection.execute("SELECT kind, name FROM entries").fetchall():
                if kind == "group":
                    text = json.dumps({"shard": "model.safetensors", "colour": "red"})
                    row = (text, journal_file._digest(kind, name, text), name)
                    journal._connection.execute("UPDATE entries SET value = ?, digest = ? WHERE name = ?", row)
            assert journal.groups("model-00001-of-00003.safetensors") == []
        assert digests(merge(job, out, SHARDS)) == digests(merge(job, tmp_path / "whole", SHARDS))


def test_a_folder_that_can_only_be_read_is_enough_for_a_finished_output(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, out = recipe(llama, "linear"), tmp_path / "out"
    merge(job, out, SHARDS)

    def refuse(folder: Path) -> None:
        raise DiskError(f"{folder} cannot be written")

    monkeypatch.setattr("lowmem_aim.jobs.preparation.check_writable", refuse)
    assert merge(job, out, SHARDS) == out
    with pytest.raises(DiskError, match="cannot be written"):
        merge(job, tmp_path / "another", SHARDS)


def test_files_that_a_killed_run_had_published_count_as_written(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, out = recipe(llama, "linear"), tmp_path / "out"
    sync = output.sync_folder

    def stopped(folder: Path) -> None:
        if folder == out and list(out.glob("*.safetensors")):
            raise Stopped
        sync(folder)

    monkeypatch.setattr(output, "sync_folder", stopped)
    with pytest.raises(Stopped):
        merge(job, out, SHARDS)
    monkeypatch.undo()
    shards = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    assert shards <= staged_bytes(out) < shards + 100_000


def test_an_error_keeps_its_cause_through_the_preparation(llama: Path, tmp_path: Path) -> None:
    job = recipe(llama, "linear", omega=0.4, calibration=str(tmp_path / "latin.txt"))
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ModelError) as caught:
        merge(job, tmp_path / "out", SHARDS)
    assert isinstance(caught.value.__cause__, UnicodeDecodeError)


def test_what_a_recipe_is_warned_of_is_told_before_anything_else(llama: Path, tmp_path: Path) -> None:
    text = (
        f"merge_method: linear\nmodels:\n  - model: {tmp_path / 'none'}\n    parameters: {{weight: 1, density: 0.5}}\n"
    )
    notices: list[str] = []
    with pytest.raises(ModelError):
        merge(read_recipe(parse(text, "recipe.yml")), tmp_path / "out", SHARDS, stopping_after(9, notices))
    assert notices == ["recipe.yml:4:29: `density` has no meaning for `linear` and is ignored"]
