"""Problems with a recipe, folders, headers, configs, the output or the disk are reported together, without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import tiny
import yaml
from conftest import Place
from stopping import stop

from lowmem_aim.recipe.reader import read_recipe
from lowmem_aim.recipe.yaml_tree import load_tree

# Runs command lines one after another; prints, for each, its exit code and the slow libraries it has imported.
PROGRAM = """
import contextlib, io, json, sys
from lowmem_aim.cli.main import main
for line in json.loads(sys.argv[1]):
    sys.argv = ["lowmem-aim", *line]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            main()
    except SystemExit as ended:
        print(json.dumps([ended.code, said.getvalue(), sorted({"torch", "numpy", "transformers"} & set(sys.modules))]))
"""


def ran(*lines: list[str]) -> list[tuple[int, str]]:
    """(exit code, stderr) of each command line, none of which has imported a slow library."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(lines)], capture_output=True, text=True, check=True, timeout=120
    )
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [imported for _, _, imported in found] == [[] for _ in lines]
    return [(code, said) for code, said, _ in found]


def written(place: Place, name: str, **changes: object) -> str:
    """The path of a recipe that merges the place's `math` into its `base`."""
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": str(place.folder / "base"),
        "models": [{"model": str(place.folder / "math"), "parameters": {"weight": 1}}],
    }
    file = place.folder / name
    file.write_text(yaml.safe_dump(recipe | changes))
    return str(file)


def test_wrong_input_is_told_without_torch(place: Place) -> None:
    missing = written(place, "missing.yml", base_model=str(place.folder / "none"), aim={"calibration": "none.txt"})
    tiny.edit_config(place.folder / "code", hidden_size=17)
    larger = written(place, "larger.yml", models=[{"model": str(place.folder / "code"), "parameters": {"weight": 1}}])
    right = written(place, "right.yml")
    taken = place.folder / "taken"
    taken.mkdir()
    (taken / "mine.txt").write_text("mine")
    assert place.run("plan", right, place.out, "--no-measure").code == 0  # what it reads is cached
    cases = [
        ([right, str(taken)], 2, ["is not empty"]),
        ([missing, str(taken)], 2, ["is not empty", "no model folder", "no calibration file"]),
        (
            [missing, str(taken), "--omega", "1.5"],
            2,
            ["must lie in [0, 1]", "is not empty", "no model folder", "no calibration file"],
        ),
        ([larger, str(place.out)], 3, ["hidden_size"]),
        ([written(place, "wrong.yml", merge_method="tis"), str(place.out)], 2, ["did you mean `ties`"]),
        ([right, str(place.out), "--shard-size", "1"], 2, ["shard size"]),
    ]
    for (line, code, said), (found, told) in zip(cases, ran(*(["merge", *line] for line, _, _ in cases)), strict=True):
        assert found == code, (line, told)
        assert all(part in told for part in said), (line, told)


def test_a_folder_that_is_not_the_demos_is_refused_without_torch(place: Place) -> None:
    ((code, said),) = ran(["demo", str(place.folder), "--models"])
    assert (code, "not the demo's" in said) == (2, True)


def test_a_calibration_tells_all_at_once_too(place: Place) -> None:
    line = ["calibrate", str(place.folder / "none"), "-o", str(place.folder / "a.txt"), "--calibration", "none.txt"]
    ((code, said),) = ran(line)
    assert code == 2
    assert all(part in said for part in ("must end in .safetensors", "no model folder", "no calibration file"))


def test_what_only_lists_or_looks_needs_no_torch(place: Place) -> None:
    place.merge()
    lines = [["methods"], ["methods", "ties"], ["--help"], ["merge", "--help"], ["status", str(place.out)]]
    assert [code for code, _ in ran(*lines)] == [0] * len(lines)


def test_another_job_in_the_output_is_told_without_torch(place: Place) -> None:
    right = written(place, "right.yml")
    begun, done = place.folder / "begun", place.folder / "done"
    stop(read_recipe(load_tree(Path(right))), begun, 3)
    assert place.run("merge", right, done).code == 0
    (code, said), (plans, planned), (finished, told), (small, both) = ran(
        ["merge", right, str(begun), "--seed", "1"],
        ["plan", right, str(done), "--weight", "2"],
        ["merge", right, str(done)],
        ["merge", right, str(done), "--weight", "2", "--shard-size", "1"],
    )
    assert code == 7
    assert "seed: 0 then, 1 now" in said
    assert plans == 2
    assert "models[0].parameters.weight: 1 then, 2 now" in planned
    assert (finished, told) == (0, f"`{done}` is finished already\n")
    assert small == 2
    assert "shard size" in both


def test_what_a_finished_output_with_stages_is_of_is_told_without_torch(place: Place) -> None:
    last = "---\nmerge_method: passthrough\nmodels: [{model: soup}]\n"
    files = [written(place, f"{seen}.yml", parameters={"lambda": seen}) for seen in (1, 2)]
    for file in map(Path, files):
        file.write_text("name: soup\n" + file.read_text() + last)
    assert place.run("merge", files[0], place.out).code == 0
    (same, told), (other, refused), (plans, planned) = ran(
        ["merge", files[0], str(place.out)], ["merge", files[1], str(place.out)], ["plan", files[1], str(place.out)]
    )
    assert (same, told) == (0, f"`{place.out}` is finished already\n")
    for code, said in ((other, refused), (plans, planned)):
        assert code == 2
        assert "stage `soup`" in said
        assert "parameters.lambda: 1 then, 2 now" in said


def test_a_budget_that_no_merge_could_have_is_told_beside_other_problems(place: Place) -> None:
    right = written(place, "right.yml")
    begun = place.folder / "begun"
    stop(read_recipe(load_tree(Path(right))), begun, 3)
    missing = written(place, "missing.yml", base_model=str(place.folder / "none"))
    cases = {
        7: [right, str(begun), "--seed", "1"],
        3: [missing, str(place.out)],
        2: [missing, str(place.out), "--omega", "1.5"],
    }
    for (code, _), (found, told) in zip(
        cases.items(), ran(*(["merge", *line, "--ram", "20MB"] for line in cases.values())), strict=True
    ):
        assert found == code, told
        assert "any merge needs more than" in told


def test_nothing_is_left_to_plan_where_all_is_finished(place: Place) -> None:
    right = written(place, "right.yml")
    assert place.run("merge", right, place.out).code == 0
    planned = place.run("plan", right, place.out, "--ram", "20MB")
    assert (planned.code, "nothing is left to do" in planned.out) == (0, True)
    assert place.run("merge", right, place.out, "--ram", "20MB").code == 0
