"""Points as tasks of Ray: the share that each gets, and what is refused. `make test-ray` has real workers."""

from __future__ import annotations

import io
import threading
from importlib import util
from pathlib import Path
from typing import Any

import pytest
import yaml

from lowmem_aim.errors import UsageError
from lowmem_aim.jobs import by_ray
from lowmem_aim.jobs.by_ray import Share, share_of
from lowmem_aim.system.options import Options

GB = 10**9
SMALL, LARGE = {"CPU": 4.0, "memory": 16.0 * GB}, {"CPU": 16.0, "memory": 128.0 * GB, "GPU": 2.0}
HEAD = {"memory": 4.0 * GB}  # a node that runs nothing


def test_a_task_gets_a_whole_node_or_the_cores_that_are_asked_for_with_their_share_of_memory() -> None:
    assert share_of([SMALL, HEAD], Options()) == Share(4, 16 * GB, 0)
    assert share_of([SMALL, LARGE], Options(device="cpu", threads=2)) == Share(2, 8 * GB, 0)
    assert share_of([SMALL], Options(threads=1, ram=5 * GB)) == Share(1, 5 * GB, 0)
    # Where a node has a GPU, tasks run there: other devices would give other scores.
    assert share_of([SMALL, LARGE], Options()) == Share(16, 128 * GB, 1)


def test_a_task_uses_its_own_gpu_whatever_its_number() -> None:
    options = share_of([LARGE], Options(device="cuda:1", threads=8)).options(Options(device="cuda:1", fresh=True))
    assert (options.device, options.threads, options.ram, options.fresh) == ("cuda", 8, 64 * GB, False)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (Options(threads=5), "5 cores"),
        (Options(ram=17 * GB), "17.0 GB of memory"),
        (Options(device="cuda"), "a GPU"),
    ],
)
def test_what_no_node_has_is_told(options: Options, told: str) -> None:
    with pytest.raises(UsageError, match=f"no node of the Ray cluster has .*{told}"):
        share_of([SMALL], options)


def test_what_rays_threads_print_does_not_reach_the_results() -> None:
    stream = io.StringIO()
    quiet = by_ray._WithoutRay(stream)
    thread = threading.Thread(target=print, args=("noise",), kwargs={"file": quiet}, name="ray_listen_error_messages")
    thread.start()
    thread.join()
    print("result", file=quiet)
    assert stream.getvalue() == "result\n"


def test_what_ray_cannot_do_is_refused_before_work(
    llama: Path, tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [{"model": str(llama / name)} for name in ("math", "code")]
    recipe = {"merge_method": "linear", "models": models, "parameters": {"weight": 1}}
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe))
    line = ("sweep", tmp_path / "recipe.yml", tmp_path / "out", "--tasks", "x", "--include-path", tmp_path)
    found = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name, *rest: None if name == "ray" else found(name, *rest))
    done = run(*line, "--ray", "local")
    assert done.code == 2
    assert "pip install 'lowmem-aim[ray]'" in done.err
    done = run(*line, "--ray", "local", "--search", "3")
    assert done.code == 2
    assert "exclude each other" in done.err
    assert not (tmp_path / "out").exists()
