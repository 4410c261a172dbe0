"""The documents say what there is: every command, flag, exit code, event, key and method, and none that is not."""

from __future__ import annotations

import re
import shlex
import signal
import tomllib
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import pytest
from conftest import Run
from demo_settings import TINY

from lowmem_aim import errors, events
from lowmem_aim.cli import usage
from lowmem_aim.cli.commands import cli
from lowmem_aim.cli.mergekit_flags import ACTING, REFUSED, UNNEEDED
from lowmem_aim.events import (
    Advanced,
    Event,
    Notice,
    Paused,
    PhaseEnded,
    PhaseStarted,
    Planned,
    PointScored,
    RunEnded,
    RunStarted,
    Sampled,
    Snapshot,
    TensorDone,
)
from lowmem_aim.methods.registry import METHODS
from lowmem_aim.recipe.reader import TOP_KEYS, UNSUPPORTED_KEYS, read_recipe
from lowmem_aim.recipe.relaxations import ACM_KEYS, AIM_KEYS
from lowmem_aim.recipe.solving import SOLVE_KEYS
from lowmem_aim.recipe.yaml_tree import parse
from lowmem_aim.system import interrupts
from lowmem_aim.view.progress import seen
from lowmem_aim.view.record import KINDS, SCHEMA, from_line, to_line
from lowmem_aim.view.summary import FORMAT, facts

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def sections(page: str) -> dict[str, str]:
    """Heading -> what stands below it, to the next; "" is what stands above the first."""
    first, *others = re.split(r"^## ", (DOCS / page).read_text(), flags=re.M)
    return {"": first} | {heading: text for heading, _, text in (other.partition("\n") for other in others)}


def first_cells(section: str) -> list[str]:
    """Of its tables, without their heads."""
    return [row.split("|")[1] for row in re.findall(r"^\|.*\|$(?!\n\|-)", section, re.M) if not row.startswith("|-")]


def named(section: str) -> list[str]:
    """What stands in backticks in the first cells of a section's tables."""
    return [name for cell in first_cells(section) for name in re.findall(r"`([^`]+)`", cell)]


# --- the command line -----------------------------------------------------------------------------------------------

COMMAND_LINE = sections("command-line.md")
OF_COMMANDS = {heading.split()[1]: text for heading, text in COMMAND_LINE.items() if heading.startswith("`lowmem-aim ")}
EVERYWHERE = "Flags of every command"


def flags(command: click.Command) -> set[str]:
    options = (parameter for parameter in command.params if isinstance(parameter, click.Option))
    return {flag for option in options for flag in (*option.opts, *option.secondary_opts)}


def flags_named(section: str) -> list[str]:
    return [name.split()[0] for name in named(section)]


def sections_shared_by(section: str) -> list[str]:
    """The sections of the page that a command's own refers to for more flags."""
    anchors = {heading.lower().replace(" ", "-"): heading for heading in COMMAND_LINE}
    return [anchors[anchor] for anchor in re.findall(r"\(#([\w-]+)\)", section)]


def test_every_command_has_a_section_and_no_other_has() -> None:
    assert isinstance(cli, click.Group)
    assert set(OF_COMMANDS) == set(cli.commands)


@pytest.mark.parametrize("name", sorted(cli.commands))
def test_a_commands_section_names_its_flags_and_no_others(name: str) -> None:
    section = OF_COMMANDS[name]
    told = [flags_named(COMMAND_LINE[shared]) for shared in sections_shared_by(section)]
    listed = sum(told, flags_named(section))
    assert sorted(listed) == sorted(flags(cli.commands[name]))  # each once


def test_shared_flags_are_named_as_shared_by_those_who_take_them() -> None:
    kinds = ("AIM flags", "Calibration flags", "Output flags", "Task flags", "Machine flags")
    kinds += ("Run flags", "Format flags")
    for heading in (*kinds, "Flags of mergekit"):
        takers = [name for name, section in OF_COMMANDS.items() if heading in sections_shared_by(section)]
        shared = re.match(r"\s*Shared by ([^.;]+)", COMMAND_LINE[heading])
        assert shared is not None
        assert re.findall(r"`(\w+)`", shared[1]) == takers


def test_mergekits_users_are_told_what_each_of_its_flags_does_here_and_why() -> None:
    rows = re.findall(r"^\| (`.*?) \| (.*) \|$", sections("from-mergekit.md")["Flags"], re.M)
    told = {flag: text for cell, text in rows for flag in re.findall(r"`([^`]+)`", cell)}
    ours = {"--device", "--random-seed", "--quiet", "-j", "--num-threads"}
    assert told.keys() == {*UNNEEDED, *REFUSED, *ACTING, *ours} - {"--no-cuda"}
    for flag, why in UNNEEDED.items():
        assert flag in REFUSED or told[flag].startswith(f"not needed: {why}")
    assert all(told[flag].startswith(f"refused: {why.partition(':')[0]}") for flag, (why, _) in REFUSED.items() if why)


def test_the_flags_of_every_command_are_those() -> None:
    for command in (cli, *cli.commands.values()):
        own = set(command.get_params(click.Context(command, help_option_names=["-h", "--help"]))) - set(command.params)
        assert {flag for option in own for flag in option.opts} == set(flags_named(COMMAND_LINE[EVERYWHERE]))
    assert flags(cli) == {"--version"}
    assert "`lowmem-aim --version`" in COMMAND_LINE[EVERYWHERE]


def test_every_choice_says_what_was_meant() -> None:
    kinds = [parameter.type for command in cli.commands.values() for parameter in command.params]
    assert all(isinstance(kind, usage.Choice) for kind in kinds if isinstance(kind, click.Choice))


def test_every_command_of_the_examples_exists() -> None:
    text = "\n".join(f.read_text() for f in [ROOT / "README.md", *DOCS.glob("*.md")])
    assert not set(re.findall(r"^ *(?:\S*/)?lowmem-aim (\w+)", text, re.M)) - set(cli.commands)


def commands_in(text: str) -> list[list[str]]:
    """The words of each line of code that starts this program; comments are left out."""
    blocks = re.findall(r"^```\n(.*?)^```$|^((?: {4}.*\n)+)", text, re.M | re.S)
    lines = "".join(fenced or indented for fenced, indented in blocks).splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if re.match(r" *lowmem-aim ", line)]


@pytest.mark.parametrize("page", ["README.md", *sorted(f"docs/{file.name}" for file in DOCS.glob("*.md"))])
def test_every_command_line_of_a_document_can_be_parsed(page: str) -> None:
    for name, *words in commands_in((ROOT / page).read_text()):
        words = words[: words.index("|")] if "|" in words else words  # completion, into another program
        cli.commands[name].make_context(name, words, help_option_names=["-h", "--help"])  # which click keeps


def test_the_readme_has_each_command_that_starts_work() -> None:
    told = {name for name, *_ in commands_in((ROOT / "README.md").read_text())}
    assert told >= {
        "init",
        "plan",
        "merge",
        "relax",
        "calibrate",
        "methods",
        "status",
        "verify",
        "doctor",
        "demo",
        "convert",
    }


def test_the_first_merge_of_the_readme_runs_as_printed(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowmem_aim.demo.settings.QUICK", TINY)
    monkeypatch.chdir(tmp_path)
    first = (ROOT / "README.md").read_text().partition("## A first merge")[2].partition("\n## ")[0]
    for words in commands_in(first):
        done = run(*words)
        assert done.code == 0, done.err
    assert {"merged", "merged-aim", "first.yml"} <= {path.name for path in tmp_path.iterdir()}


def test_the_recipes_of_the_documents_can_be_read() -> None:
    for page in (ROOT / "README.md", DOCS / "recipe.md"):
        recipe = re.search(r"```yaml\n(merge_method:.*?)```", page.read_text(), re.S)
        assert recipe is not None
        assert read_recipe(parse(recipe[1], page.name)).aim is not None


def test_the_readme_tells_every_extra() -> None:
    extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    told = (ROOT / "README.md").read_text().partition("## Install")[2].partition("## A first merge")[0]
    assert set(named(told)) == extras


def test_every_exit_code_is_told_and_no_other_is() -> None:
    kinds = [k for k in vars(errors).values() if isinstance(k, type) and issubclass(k, errors.LowmemAimError)]
    codes = {0, *(kind.exit_code for kind in kinds), *(128 + getattr(signal, name) for name in interrupts.ENDING)}
    cells = first_cells(COMMAND_LINE["Exit codes"])
    assert sorted(int(code) for cell in cells for code in cell.split(",")) == sorted(codes)
    assert all(name in COMMAND_LINE["Exit codes"] for name in interrupts.ENDING)
    assert all(kind.usual_hint for kind in kinds)


# --- the recipe -----------------------------------------------------------------------------------------------------


def test_every_key_of_a_recipe_is_told_and_no_other_is() -> None:
    page = sections("recipe.md")
    assert sorted(named(page[""])) == sorted(TOP_KEYS)
    assert sorted(named(page["`aim:`"])) == sorted(AIM_KEYS)
    assert sorted(named(page["`acm:`"])) == sorted(ACM_KEYS)
    assert sorted(named(page["`solve:`"])) == sorted(SOLVE_KEYS)
    refused = re.search(r"^(`.*), which .* is a key of mergekit and not supported", page[""], re.M)
    assert refused is not None
    assert sorted(re.findall(r"`(\w+)`", refused[1])) == sorted(UNSUPPORTED_KEYS)


def test_every_method_and_parameter_is_documented() -> None:
    reference = (DOCS / "methods.md").read_text()
    for name, method in METHODS.items():
        assert f"| `{name}` |" in reference
        assert not [p for p in method.parameters if f"`{p}`" not in reference]


# --- events ---------------------------------------------------------------------------------------------------------

EVENTS = sections("events.md")
TRACEBACK = "Traceback (most recent call last):\n  ...\nlowmem_aim.errors.DiskError: `out` cannot be written: ...\n"
FULL = "`out` cannot be written: no space left"
SAMPLE = Sampled(
    done=1073741824,
    item="model.layers.7.mlp.up_proj.weight",
    shape=(5632, 2048),
    read_bytes=4294967296,
    compute_bytes=4294967296,
    write_bytes=1073741824,
    read_seconds=4.1,
    compute_seconds=6.2,
    write_seconds=2.9,
    ram=900000000,
    ram_peak=1100000000,
    file_cache=300000000,
    vram=2000000000,
    vram_peak=2500000000,
    disk_free=80000000000,
)
DONE = TensorDone(
    "model.layers.7.mlp.up_proj.weight",
    (5632, 2048),
    "bfloat16",
    "merge",
    7,
    "mlp.up_proj",
    1096810496,
    kept=(5120.5, 2210.25),
    effects=(0.93, 0.88),
    output="omega-0.4",
)
EXAMPLES: list[tuple[float, Event]] = [
    (0.0, RunStarted("merge", "out", "lowmem-aim merge r.yml out", "0.1.0", 4711, "2025-01-31T12:00:00+00:00")),
    (
        0.9,
        Planned(
            "ties + AIM",
            ("calibrate", "merge", "finish"),
            "cuda",
            8,
            4000000000,
            6000000000,
            201,
            {"": 3, "0": 9, "1": 9},
        ),
    ),
    (1.0, PhaseStarted("calibrate", 22, "blocks")),
    (1.5, Advanced(1, "model.layers.0")),
    (62.0, Snapshot(1)),
    (9.0, PhaseEnded("calibrate")),
    (9.1, PhaseStarted("merge", 2200097792, "bytes", 1050673152)),
    (9.5, DONE),
    (10.0, SAMPLE),
    (11.0, Paused(True)),
    (12.0, Notice("`math`: its `rope_theta` differs; the output has the base's", "warning")),
    (
        12.5,
        PointScored(
            "ties-omega-0.4",
            {"gsm8k": 0.6411, "ifeval": 0.2191},
            3,
            10,
            gain=0.2272,
            front=("Math", "ties-omega-0.4"),
        ),
    ),
    (13.25, RunEnded("failed", 4, (FULL,), "free some space", TRACEBACK, FULL, ("free some space",))),
]
OF_KINDS = {name: timed for timed in EXAMPLES for name, kind in KINDS.items() if type(timed[1]) is kind}


def test_every_kind_of_event_has_a_section_and_no_other_has() -> None:
    assert {heading.strip("`") for heading in EVENTS if heading.startswith("`")} == set(KINDS)
    assert f"The schema is {SCHEMA}." in EVENTS[""]


@pytest.mark.parametrize("kind", KINDS)
def test_an_events_section_names_its_fields_and_shows_a_line(kind: str) -> None:
    own = [field.name for field in fields(KINDS[kind])]
    assert named(EVENTS[f"`{kind}`"]) == ["schema"] * (kind == "run_started") + own
    shown = re.search(r"```json\n(.*)\n```", EVENTS[f"`{kind}`"])
    assert shown is not None
    assert shown[1] == to_line(*OF_KINDS[kind])
    assert from_line(shown[1]) == OF_KINDS[kind]


def test_every_word_of_an_event_is_told() -> None:
    for known in (events.Phase, events.Unit, events.Outcome):
        assert all(f"`{word}`" in (DOCS / "events.md").read_text() for word in known.__args__)


def test_every_key_of_run_json_is_told_and_no_other_is() -> None:
    found = facts(seen(EXAMPLES))
    assert sorted(named(EVENTS["run.json"])) == sorted(keys(found))
    assert f"`{FORMAT}`" in EVENTS["run.json"]


def keys(found: dict[str, Any]) -> Iterable[str]:
    """With dots, where what is below has keys of its own that are always the same."""
    for key, value in found.items():
        if key in ("tensors", "ram", "vram", "bytes", "busy_seconds", "kept"):
            yield from (f"{key}.{inner}" for inner in value)
        else:
            yield key


# --- links ----------------------------------------------------------------------------------------------------------


def test_links_between_documents_lead_somewhere() -> None:
    for document in [ROOT / "README.md", *DOCS.glob("*.md")]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text()):
            assert (document.parent / target).exists(), (document.name, target)
