"""After Tab a shell gets commands, flags, choices, methods, parameters, recipes and folders, and soon."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Run

from lowmem_aim.cli import completion
from lowmem_aim.methods import registry
from lowmem_aim.methods.registry import METHODS
from lowmem_aim.recipe.words import SCALINGS
from lowmem_aim.relaxing import aim

CASES = [
    ("lowmem-aim m", ["merge", "methods"]),
    ("lowmem-aim merge out --den", ["--density"]),
    ("lowmem-aim status --de", ["--debug"]),
    ("lowmem-aim --de", ["--debug"]),
    ("lowmem-aim pa", ["pause"]),
    ("lowmem-aim merge out --format ", ["human", "plain", "json", "quiet"]),
    ("lowmem-aim status --format p", ["plain"]),
    ("lowmem-aim relax --with ", ["aim", "acm", "both"]),
    ("lowmem-aim merge out --method dare", ["dare_linear", "dare_ties"]),
    ("lowmem-aim methods ti", ["ties"]),
    ("lowmem-aim merge out --method slerp -p ", ["t="]),
    ("lowmem-aim merge out -p lam", ["lambda="]),
    ("lowmem-aim merge out --scaling s", ["sqrt", "square"]),
    ("lowmem-aim merge out --dtype b", ["bfloat16"]),
    ("lowmem-aim merge out --calibration ", ["builtin", "t.jsonl"]),
    ("lowmem-aim merge ", ["a.yml", "b c.yaml"]),
    ("lowmem-aim merge sub/", ["sub/d.yml"]),
    ("lowmem-aim merge a.yml ", []),
    ("lowmem-aim completion ", ["bash", "zsh", "fish"]),
]
FOLDERS = [line for line, _ in CASES if line.endswith(("merge ", "yml ", "sub/", "--calibration "))]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    for name in ("a.yml", "b c.yaml", "notes.md", "sub/d.yml", "t.jsonl"):
        (tmp_path / name).touch()
    return tmp_path


def asked(shell: str, line: str, folder: Path) -> list[tuple[str, str]]:
    """What the program answers a shell: (kind, word), one for each."""
    words = line.split(" ")
    position = words[-1] if shell == "fish" else str(len(words) - 1)
    question = {"COMP_WORDS": line, "COMP_CWORD": position, completion.VARIABLE: f"{shell}_complete"}
    done = subprocess.run(
        [sys.executable, "-m", "lowmem_aim"],
        env=os.environ | question,
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    lines = done.stdout.splitlines()
    if shell == "zsh":  # three lines each, the third is help
        return list(zip(lines[::3], lines[1::3], strict=True))
    pairs = (line.partition("\t")[0].partition(",") for line in lines)
    return [(kind, word) for kind, _, word in pairs]


@pytest.mark.parametrize("line", [line for line, _ in CASES])
def test_bash_is_told_what_can_come_next(line: str, folder: Path) -> None:
    answer = asked("bash", line, folder)
    assert [word for kind, word in answer if kind == "plain"] == dict(CASES)[line]
    assert any(kind == "dir" for kind, _ in answer) == (line in FOLDERS)


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_so_are_the_others(shell: str, folder: Path) -> None:
    for line in ("lowmem-aim m", "lowmem-aim merge out --method dare", "lowmem-aim merge "):
        answer = asked(shell, line, folder)
        assert [word for kind, word in answer if kind == "plain"] == dict(CASES)[line]


def test_every_command_and_flag_can_be_completed(folder: Path) -> None:
    from lowmem_aim.cli.commands import cli

    assert {word for _, word in asked("bash", "lowmem-aim ", folder)} == set(cli.commands)
    for name in ("merge", "relax", "calibrate"):
        flags = {flag for p in cli.commands[name].params for flag in (*p.opts, *p.secondary_opts) if flag[:2] == "--"}
        told = {word for _, word in asked("bash", f"lowmem-aim {name} --", folder)}
        assert told == flags | {"--debug", "--help"}


def test_nothing_slow_is_imported_for_it() -> None:
    code = """
import os, sys
os.environ.update(COMP_WORDS="lowmem-aim merge --method ti", COMP_CWORD="3", _LOWMEM_AIM_COMPLETE="bash_complete")
from lowmem_aim.__main__ import main
try: main()
except SystemExit: pass
print(sorted({'torch', 'transformers', 'numpy', 'rich', 'yaml'} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "plain,ties\n[]\n"


def test_its_words_are_those_of_their_homes() -> None:
    assert {name: tuple(method.parameters) for name, method in METHODS.items()} == completion.METHODS
    assert completion.METHOD_GROUP == registry.GROUP
    assert tuple(aim._SCALINGS) == SCALINGS


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_the_script_asks_this_program(run: Run, shell: str) -> None:
    done = run("completion", shell)
    assert done.code == 0
    assert f"{completion.VARIABLE}={shell}_complete" in done.out
    assert "lowmem-aim" in done.out
    assert f"lowmem-aim completion {shell}" in run("completion", "--help").out


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_itself_completes_with_it(run: Run, folder: Path) -> None:
    script = run("completion", "bash").out
    assert "-o plusdirs" in script  # what click's script is changed in
    assert "-o nospace" in script
    program = folder / "lowmem-aim"
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m lowmem_aim "$@"\n')
    program.chmod(0o755)
    # Outside of a completion there is nothing to set options of.
    ask = f"""
compopt() {{ local IFS=' '; echo "set $*"; }}
{script}
ask() {{
    COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
    _lowmem_aim_completion lowmem-aim
    printf '<%s>\\n' "${{COMPREPLY[@]}}"
}}
ask lowmem-aim merge ""
COMPREPLY=()
ask lowmem-aim merge out -p lam
complete -p lowmem-aim
"""
    done = subprocess.run(
        ["bash", "--norc", "-c", ask],
        env=os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"},
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout.splitlines() == [
        "set -o filenames -o plusdirs",
        "<a.yml>",
        "<b c.yaml>",
        "set -o nospace",
        "<lambda=>",
        "complete -o nosort -F _lowmem_aim_completion lowmem-aim",
    ]
