"""A refactor changes no byte: merges of every kind, made by this tree and by another commit, file by file.

    python tests/long/same_bytes.py COMMIT

Both trees run the same commands on the same tiny models, in this environment; nothing is stored between two calls. The
exit code is 1 if any output file differs, is missing or is new, or if a command ends with another exit code.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tiny
import torch
import yaml

from lowmem_aim.cli.catalogue import all_methods, example

ROOT = Path(__file__).resolve().parents[2]
EXPERTS = ("expert-1", "expert-2")
ARCHITECTURES = ("llama", "gpt2", "mixtral")
PRIVATE = ".lowmem_aim"  # what differs from run to run: journal, log, times

# Runs in the tree that PYTHONPATH names: each line of standard input is one command line and the folder to run it in.
DRIVER = """
import json, os, sys
import lowmem_aim
assert lowmem_aim.__file__.startswith(os.environ["TREE"] + os.sep), lowmem_aim.__file__
from lowmem_aim.__main__ import main
for line in sys.stdin:
    folder, arguments = json.loads(line)
    os.chdir(folder)
    sys.argv = ["lowmem-aim", *arguments]
    try:
        main()
    except SystemExit as ended:
        print(json.dumps([arguments, ended.code or 0]), flush=True)
"""

Command = list[str]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("commit", help="the commit whose bytes are to be met")
    commit = parser.parse_args().commit
    with tempfile.TemporaryDirectory(prefix="same-bytes-") as scratch:
        work = Path(scratch)
        models = build_models(work / "models")
        other = work / "tree"
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", other, commit], cwd=ROOT, check=True)
        try:
            then = outcome(other, work / "then", models)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", other], cwd=ROOT, check=True)
        now = outcome(ROOT, work / "now", models)
    return compare(then, now)


def build_models(folder: Path) -> Path:
    """A base and two experts of each architecture, bfloat16 in several shards, and texts to calibrate with."""
    for architecture in ARCHITECTURES:
        base = tiny.build(architecture, folder / architecture / "base", dtype=torch.bfloat16, shard_size="40KB")
        for seed, name in enumerate(EXPERTS, start=1):
            tiny.perturbed(base, folder / architecture / name, scale=0.05, seed=seed)
            (folder / architecture / f"{name}.jsonl").write_text("".join(texts_of(seed)))
    (folder / "texts.jsonl").write_text("".join(texts_of(0)))
    return folder


def texts_of(expert: int) -> Iterator[str]:
    """The lines of a file of texts: of an expert, by its number, or to calibrate with, 0."""
    what = f"of expert {expert}" if expert else "of the calibration set"
    for number in range(12):
        yield json.dumps({"text": f"Text {number} {what}, " + "with more words " * (number % 5)}) + "\n"


def commands(models: Path, folder: Path) -> Iterator[tuple[str, Command]]:
    """(name, arguments) of every command; each writes into a folder, or a file, of that name under `folder`."""
    texts = str(models / "texts.jsonl")
    compared = {"calibration": texts, "samples": 12}
    calibration = {**compared, "block_size": 32}
    found, problems = all_methods()
    assert not problems, problems

    def recipe(name: str, architecture: str, table: dict[str, object]) -> tuple[str, Command]:
        place = folder / "recipes" / f"{name}.yml"
        place.parent.mkdir(exist_ok=True)
        text = yaml.safe_dump(table, sort_keys=False)
        text = text.replace("./", f"{models / architecture}/")
        place.write_text(text)
        return name, ["merge", str(place), name, "--shard-size", "60000", "--seed", "7"]

    for method in found:
        table = yaml.safe_load(example(method))
        table.setdefault("base_model", "./base")  # linear and karcher: AIM's reference
        if method.base == "averaged":
            table["models"].append({"model": "./base"})
        yield recipe(method.name, "llama", table | {"aim": {"omega": 0.4, **calibration}})
        if method.name in ("ties", "dare_linear", "slerp"):
            yield recipe(f"{method.name}-acm", "llama", table | {"acm": compared})
            yield recipe(f"{method.name}-alone", "llama", table)
        if method.name in ("ties", "widen"):
            for architecture in ARCHITECTURES[1:]:
                aim = {"omega": 0.2, **calibration}
                yield recipe(f"{method.name}-{architecture}", architecture, table | {"aim": aim, "dtype": "float32"})
    ties = yaml.safe_load(example(next(method for method in found if method.name == "ties")))
    yield recipe("ties-omegas", "llama", ties | {"aim": {"omega": [{"value": [0.2, 0.6]}], **calibration}})
    yield recipe("ties-both", "llama", ties | {"aim": {"omega": 0.4, **calibration}, "acm": compared})
    yield recipe("ties-tokens", "llama", ties | {"tokenizer_source": "base"})
    base = str(models / "llama" / "base")
    yield "activations.safetensors", ["calibrate", base, "-o", "activations.safetensors", "--calibration", texts]
    yield recipe("ties-file", "llama", ties | {"aim": {"calibration": str(folder / "activations.safetensors")}})
    for how in ("aim", "acm", "both"):
        flags = ["--base", base, "--with", how, "--calibration", texts, "--samples", "12"]
        flags += [] if how == "acm" else ["--block-size", "32"]
        yield f"relax-{how}", ["relax", "ties-alone", *flags, f"relax-{how}"]


def outcome(tree: Path, folder: Path, models: Path) -> dict[str, str]:
    """What the program in `tree` makes: "name: exit code", and the sha256 of every file that it writes, by path."""
    folder.mkdir()
    given = dict(commands(models, folder))
    environment = os.environ | {
        "PYTHONPATH": str(tree),
        "TREE": str(tree),
        "XDG_CACHE_HOME": str(folder / "cache"),
        "HF_HUB_OFFLINE": "1",
    }
    lines = "".join(json.dumps([str(folder), arguments]) + "\n" for arguments in given.values())
    ran = [sys.executable, "-c", DRIVER]
    done = subprocess.run(ran, input=lines, capture_output=True, text=True, env=environment, cwd=folder)
    answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[[")]
    if len(answers) != len(given):
        raise SystemExit(f"{tree}: {len(answers)} of {len(given)} commands ended\n{done.stderr[-3000:]}")
    ended = {f"{name}: ": f"exit {code}" for name, (_, code) in zip(given, answers, strict=True)}
    failed = {name: code for name, code in ended.items() if code != "exit 0"}
    print(f"{tree}: {len(given)} commands, {len(failed)} failed", failed or "")
    if failed:
        print(done.stderr[-3000:])
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and PRIVATE not in file.parts]
    outputs = [file for file in files if file.relative_to(folder).parts[0] not in ("cache", "recipes")]
    digests = {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in outputs}
    return ended | digests


def compare(then: dict[str, str], now: dict[str, str]) -> int:
    different = [name for name in sorted(then.keys() | now.keys()) if then.get(name) != now.get(name)]
    for name in different:
        print(f"differs: {name}: {then.get(name, 'missing')} -> {now.get(name, 'missing')}")
    failed = [name for name, code in now.items() if code.startswith("exit ") and code != "exit 0"]
    print(f"{len(now)} outcomes compared, {len(different)} differ, {len(failed)} commands failed")
    return 1 if different or failed else 0


if __name__ == "__main__":
    sys.exit(main())
