"""`--format`: who gets a picture, lines or JSON; errors keep their hints in each, and JSON's last line tells them."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from conftest import Place, Ran, Run

from lowmem_aim.cli import formats
from lowmem_aim.cli.commands import cli
from lowmem_aim.errors import UsageError
from lowmem_aim.view.record import from_line

NOTHING: dict[str, Any] = {"format": None, "as_json": False, "quiet": False}


def last(done: Ran) -> dict[str, Any]:
    """The last line of JSON, which is an event that `replay` and other readers know."""
    line = done.out.splitlines()[-1]
    assert from_line(line)
    found = json.loads(line)
    assert isinstance(found, dict)
    return found


class TestWhoGetsWhat:
    @pytest.mark.parametrize(
        ("terminal", "agent", "style"), [(True, False, "human"), (True, True, "plain"), (False, False, "plain")]
    )
    def test_unless_asked(self, monkeypatch: pytest.MonkeyPatch, terminal: bool, agent: bool, style: str) -> None:
        monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
        monkeypatch.setattr(formats, "_by_agent", lambda: agent)
        assert formats.style_of(NOTHING) == style
        assert formats.style_of(NOTHING, "quiet") == "quiet"  # the file of defaults
        assert formats.style_of(NOTHING | {"as_json": True}, "quiet") == "json"
        assert formats.style_of(NOTHING | {"format": "human"}, "quiet") == "human"

    def test_agents_are_known_by_the_hubs_library_which_asks_nobody(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from huggingface_hub import constants, utils

        asked = []
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(utils, "is_agent", lambda: asked.append(constants.HF_HUB_OFFLINE) or True, raising=False)
        assert formats._by_agent()
        assert asked == [True]
        assert constants.HF_HUB_OFFLINE is False
        monkeypatch.delattr(utils, "is_agent")
        monkeypatch.setattr(utils, "__getattr__", lambda name: _without(name), raising=False)
        assert not formats._by_agent()  # an older version of the library
        monkeypatch.setenv("AI_AGENT", "somebody")
        assert formats._by_agent()

    @pytest.mark.parametrize("name", sorted(cli.commands))
    def test_json_is_also_a_format_of_every_command_that_has_it(self, name: str) -> None:
        options = {flag: p for p in cli.commands[name].params for flag in p.opts}
        assert ("--json" in options) == ("--format" in options)
        if "--format" in options:
            kind = options["--format"].type
            assert isinstance(kind, click.Choice)
            assert {"human", "plain", "json"} <= set(kind.choices)
            assert ("quiet" in kind.choices) == ("--quiet" in options)
            assert (name in formats.RUNS) == ("--quiet" in options)


def _without(name: str) -> Any:
    raise AttributeError(name)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--json", "--quiet"), ("`--json`", "`--quiet`")),
        (("--format", "human", "--json"), ("`--format human`", "`--json`")),
        (("--format=plain", "-q"), ("`--format plain`", "`--quiet`")),
        (("--format", "quiet", "--json", "--quiet"), ("`--format quiet`", "`--json`", "`--quiet`")),
    ],
)
def test_formats_that_contradict_each_other(run: Run, flags: tuple[str, ...], named: tuple[str, ...]) -> None:
    for command in (("merge", "out"), ("plan", "out"), ("verify", "out"), ("calibrate", "base", "-o", "a.safetensors")):
        done = run(*command, *flags)
        assert done.code == 2
        assert done.err == f"error: {' and '.join(named)} contradict each other\n\nhint: leave only one of them\n"


def test_the_same_format_said_twice_is_no_contradiction() -> None:
    assert formats.style_of(NOTHING | {"format": "json", "as_json": True}) == "json"
    with pytest.raises(UsageError):
        formats.style_of(NOTHING | {"format": "plain", "as_json": True})


def test_each_format_of_a_merge(place: Place) -> None:
    for flags in (("--format", "plain"), ("--format", "human"), ()):  # stderr is no terminal here
        done = place.merge(*flags)
        assert done.out == f"{place.out}\n"
        assert "merge: done in" in done.err
        assert "finished in" in done.err
        shutil.rmtree(place.out)
    quiet = place.merge("--format", "quiet")
    assert (quiet.out, quiet.err) == (f"{place.out}\n", "")
    assert "verify: done in" in place.run("verify", place.out).err
    lines = place.merge("--format", "json")
    assert lines.err == ""
    assert last(lines)["outcome"] == "finished"


def test_data_is_the_same_by_both_flags(place: Place) -> None:
    assert place.merge().code == 0
    for command in (("methods", "ties"), ("status", place.out)):
        assert place.run(*command, "--format", "json").out == place.run(*command, "--json").out
        assert place.run(*command, "--format", "plain").out == place.run(*command).out
        with pytest.raises(ValueError):
            json.loads(place.run(*command).out)


class TestJsonsLastLine:
    @pytest.mark.parametrize("flags", [("--json",), ("--format", "json"), ("--format=json",), ("--json", "--quiet")])
    @pytest.mark.parametrize(
        ("words", "code", "told"),
        [
            (("merge", "out", "--xyzzy"), 2, "has no flag `--xyzzy`"),
            (("merge",), 2, "is missing"),
            (("merge", "none.yml", "out"), 2, "none.yml"),
            (("calibrate", "nobody/nothing.txt", "-o", "a.bin"), 2, "a.bin"),
            (("status", "out"), 2, "there is no run in"),
            (("methods", "tie"), 2, "did you mean `ties`?"),
            (("verify", "out"), 2, "not a finished output"),
        ],
    )
    def test_tells_what_failed_before_a_run_began(
        self,
        run: Run,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        flags: tuple[str, ...],
        words: tuple[str, ...],
        code: int,
        told: str,
    ) -> None:
        monkeypatch.chdir(tmp_path)
        done = run(*words, *flags)
        assert done.code == code
        found = last(done)
        assert (found["event"], found["outcome"], found["exit_code"]) == ("run_ended", "failed", code)
        assert found["error"] == found["problems"][0]
        assert done.err == "error: " + "\n       ".join(found["problems"]) + f"\n\nhint: {found['hint']}\n"
        if flags != ("--json", "--quiet"):
            assert told in found["error"]

    def test_of_a_run_that_failed_it_comes_once(self, place: Place) -> None:
        (place.folder / "math/config.json").unlink()
        done = place.merge("--json")
        assert done.code == 3
        found = last(done)
        assert done.out.count('"event": "run_ended"') == 1
        assert done.err == "error: " + "\n       ".join(found["problems"]) + f"\n\nhint: {found['hint']}\n"
        assert found["error"] == found["problems"][0]

    def test_of_a_system_call_it_has_the_exit_code_of_the_process(
        self, place: Place, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_: object, **__: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("lowmem_aim.jobs.merge.prepared", full)
        done = place.merge("--json")
        assert done.code == last(done)["exit_code"] == 4
        assert last(done)["error"] in done.err

    def test_a_plan_that_would_not_run_is_one_value_all_the_same(self, place: Place) -> None:
        models = ("--base", place.folder / "base", "--expert", place.folder / "math")
        done = place.run("plan", place.out, "--method", "ties", *models, "--ram", "1MB", "--no-measure", "--json")
        assert done.code == 5
        assert json.loads(done.out)["problems"]

    def test_without_json_there_is_none(self, run: Run) -> None:
        for words in (("merge", "out", "--xyzzy"), ("merge", "json"), ("status", "out", "--format", "plain")):
            assert run(*words).out == ""

    def test_verify_ends_with_it_too(self, place: Place) -> None:
        assert place.merge().code == 0
        assert last(place.run("verify", place.out, "--json"))["outcome"] == "finished"
        (place.out / "config.json").write_text("{}")
        done = place.run("verify", place.out, "--json")
        assert done.code == last(done)["exit_code"] == 8
        assert "config.json" in last(done)["error"]
