"""The commands that look: at runs, methods and the machine. They change nothing, but for pausing a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from lowmem_aim.cli import completion, usage
from lowmem_aim.cli.flags import (
    DATA_FLAGS,
    flags_of,
)
from lowmem_aim.cli.usage import Choice
from lowmem_aim.cli.values import NumberRange, PathType
from lowmem_aim.errors import printable

if TYPE_CHECKING:
    from lowmem_aim.view.dashboard import Style


_flag = flags_of("")


@click.command("status", cls=usage.Command)
@click.argument("out", type=PathType(), shell_complete=completion.folders)
@DATA_FLAGS
def status_command(out: Path, style: Style) -> None:
    """Show the progress of the run in OUT.

    It may be running, paused, interrupted or finished. OUT is the output folder of a merge, or the file that
    `calibrate` makes.
    """
    import json

    from lowmem_aim.output.folder import PRIVATE, outputs_of, stages_in
    from lowmem_aim.view.status import status_of, status_of_file
    from lowmem_aim.view.wrapping import for_terminal

    is_made = out.suffix == ".safetensors" and out.is_file()
    outputs = [out] if is_made else outputs_of(out)
    stages = [] if is_made else [folder for folder in stages_in(out) if (folder / PRIVATE).is_dir()]
    for folder in (*stages, *outputs):
        found = status_of_file(folder) if is_made else status_of(folder, () if folder in stages else stages)
        kind = "stage" if folder in stages else "output" if folder.parent == out else ""
        if style == "json":
            click.echo(json.dumps(({kind: folder.name} if kind else {}) | found.as_json()))
        else:
            name = f"{'stage ' * (kind == 'stage')}{printable(folder.name)}:" if kind else "the output:"
            click.echo(for_terminal([*([name] if kind or stages else []), *found.lines()]))


@click.command("pause", cls=usage.Command)
@click.argument("out", type=PathType(), shell_complete=completion.folders)
def pause_command(out: Path) -> None:
    """Pause the run in OUT, from another terminal.

    The run finishes the work in hand and waits. `lowmem-aim resume OUT` lets it continue.
    """
    from lowmem_aim.cli import pausing
    from lowmem_aim.view.summary import quoted

    pausing.ask(out, "pause")
    click.echo(f"paused; `lowmem-aim resume {quoted(out)}` lets it continue", err=True)


@click.command("resume", cls=usage.Command)
@click.argument("out", type=PathType(), shell_complete=completion.folders)
def resume_command(out: Path) -> None:
    """Let the paused run in OUT continue.

    If it was interrupted, say which command resumes it.
    """
    from lowmem_aim.cli import pausing

    pausing.ask(out, "resume")
    click.echo("the run continues", err=True)


@click.command("replay", cls=usage.Command)
@click.argument("out", type=PathType(), shell_complete=completion.folders)
@_flag("--run", "number", type=int, default=-1, help="Show this run: 1 is the first, -1 the last. [default: -1]")
@_flag(
    "--speed",
    metavar="NUMBER",
    type=NumberRange(0.001, 1e6),
    default=10,
    help="Play the run this many times as fast. [default: 10]",
)
@_flag(
    "--at",
    "second",
    metavar="SECONDS",
    type=NumberRange(0, 1e9),
    help="Print the screen as it was at this second instead. [default: play the whole run]",
)
@_flag("--size", metavar="COLUMNSxROWS", help="Draw that screen with this many columns and rows. [default: 80x24]")
@_flag("--svg", metavar="FILE", type=PathType(), help="Write that screen to this new SVG file. [default: print it]")
def replay_command(
    out: Path, number: int, speed: float, second: float | None, size: str | None, svg: Path | None
) -> None:
    """Show the recorded run of OUT again, faster."""
    from lowmem_aim.view import replay

    run = replay.run_of(out, number)
    if second is None and svg is None and size is None:
        replay.play(run, speed)
    else:
        replay.picture(run, second, replay.parse_size(size or "80x24"), svg)


@click.command("doctor", cls=usage.Command)
@click.argument("folder", type=PathType(), default=".", shell_complete=completion.folders)
@DATA_FLAGS
def doctor_command(folder: Path, style: Style) -> None:
    """Report what a merge depends on here, and what to fix.

    The report covers versions, processor, memory, GPUs, the disk of FOLDER and its speed, caches, the terminal, and the
    file of defaults.
    """
    import json

    from lowmem_aim.jobs.doctor import examine
    from lowmem_aim.view.doctor_lines import INDENT
    from lowmem_aim.view.wrapping import for_terminal

    found = examine(folder)
    click.echo(json.dumps(found.as_json()) if style == "json" else for_terminal(found.lines(), INDENT))


@click.command("methods", cls=usage.Command)
@click.argument("name", required=False, shell_complete=completion.methods)
@DATA_FLAGS
def methods_command(name: str | None, style: Style) -> None:
    """List the merge methods, or describe the one called NAME."""
    import json

    from lowmem_aim.cli import catalogue
    from lowmem_aim.view.wrapping import for_terminal

    found, problems = ([catalogue.method_of(name)], []) if name else catalogue.all_methods()
    for problem in problems:
        click.echo(f"warning: {problem}", err=True)
    if style == "json":
        known = [catalogue.facts(method) for method in found]
        click.echo(json.dumps(known[0] if name else known, indent=2))
    else:
        click.echo(for_terminal(*((catalogue.description(found[0]), 12) if name else (catalogue.summary(found), 4))))


@click.command("completion", cls=usage.Command)
@click.argument("shell", type=Choice(completion.SHELLS), metavar="SHELL")
@click.pass_context
def completion_command(context: click.Context, shell: str) -> None:
    """Print what SHELL needs to complete words after Tab.

    Add one line to the shell's start file:

    \b
    bash   eval "$(lowmem-aim completion bash)"    in ~/.bashrc
    zsh    eval "$(lowmem-aim completion zsh)"     in ~/.zshrc, after compinit
    fish   lowmem-aim completion fish | source     in ~/.config/fish/config.fish
    """
    click.echo(completion.script(context.find_root().command, shell), nl=False)
