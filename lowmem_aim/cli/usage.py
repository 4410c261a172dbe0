"""Flags that all commands have, and errors of usage in this tool's wording.

click finds what is wrong; `explained` words it like every other error.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

import click

from lowmem_aim.cli import mergekit_flags
from lowmem_aim.errors import LowmemAimError, UsageError, did_you_mean, printable, raise_all

PROGRAM = "lowmem-aim"
# Read from the command line itself (see `wanted`): a line that cannot be parsed is an error to debug as well.
DEBUG = click.Option(["--debug"], is_flag=True, expose_value=False, help="After an error, show its traceback too.")

_WRONG = f"{__name__}.wrong"  # in a context's `meta`: what click found wrong with the values of flags


def wanted(arguments: Sequence[str]) -> bool:
    """Whether `--debug` is among the words of a command line."""
    return "--debug" in arguments


class Flag(click.Option):
    """A flag that a command's help lists in a group, under the group's name."""

    def __init__(self, *names: Any, group: str = "", **settings: Any) -> None:
        super().__init__(*names, **settings)
        self.group = group

    def process_value(self, ctx: click.Context, value: Any) -> Any:
        """Convert a value; a wrong one is noted, see `wrong_values`, and the flag then has its default."""
        try:
            return super().process_value(ctx, value)
        except click.MissingParameter:
            raise
        except click.BadParameter as error:
            error.ctx, error.param = error.ctx or ctx, error.param or self
            ctx.meta.setdefault(_WRONG, []).append(error)
            return None if self.required else super().process_value(ctx, self.get_default(ctx))

    def get_help_extra(self, ctx: click.Context) -> Any:
        """Return what click adds to the help, without the bounds of numbers, which errors tell."""
        extra = super().get_help_extra(ctx)
        extra.pop("range", None)
        return extra


class Command(click.Command):
    """A command that also has the flags of every command; its help lists flags in groups."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """The command's own parameters, then `--debug`, then `--help`."""
        *own, help_flag = super().get_params(ctx)
        return [*own, DEBUG, help_flag]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the flags into a help text, group by group; those of no group, such as `--help`, come last."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx) if isinstance(parameter, click.Option) else None
            if record:
                groups.setdefault(getattr(parameter, "group", ""), []).append(record)
        rest, foreign = groups.pop("", []), groups.pop(mergekit_flags.GROUP, [])
        groups |= {mergekit_flags.GROUP: foreign} if foreign else {}  # after ours
        for name, records in [*groups.items(), ("Other flags" if groups else "Flags", rest)]:
            with formatter.section(name):
                formatter.write_dl(records)
                if name == mergekit_flags.GROUP:
                    formatter.write_paragraph()
                    formatter.write(_wrapped(mergekit_flags.NOTE, formatter))

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments; an error of usage always knows in which command it happened."""
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            error.ctx = error.ctx or ctx  # click's parser does not always say in which command
            raise

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command, unless values of flags are wrong. Raises UsageError for all that are."""
        raise_all(wrong_values(ctx))
        return super().invoke(ctx)


class RecipeCommand(Command):
    """A command that tells of wrong values itself, together with all else that is wrong with its recipe."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command, which asks for `wrong_values`."""
        return click.Command.invoke(self, ctx)


def wrong_values(context: click.Context | None = None) -> list[LowmemAimError]:
    """An error for each flag whose value click has refused, of the command that is being run."""
    context = context or click.get_current_context()
    return [explained(error) for error in context.meta.get(_WRONG, [])]


def _wrapped(text: str, formatter: click.HelpFormatter) -> str:
    """A paragraph of a help text's section, with flags whole: click itself breaks them at hyphens."""
    indent = " " * formatter.current_indent
    filled = textwrap.fill(
        text, formatter.width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
    )
    return f"{filled}\n"


class Commands(Command, click.Group):
    """The program: a group of commands of the class above."""

    command_class = Command

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the flags into the help text, then the commands."""
        super().format_options(ctx, formatter)
        self.format_commands(ctx, formatter)


class Choice(click.Choice[str]):
    """One of a few words; the error for another word suggests the one that may have been meant."""

    def get_invalid_choice_message(self, value: Any, ctx: click.Context | None) -> str:
        """The message for a word that is none of the choices."""
        word, words = str(value), [str(choice) for choice in self.choices]
        return f"`{printable(word)}` is not one of {', '.join(words)}{did_you_mean(word, words)}"


def explained(error: click.ClickException) -> UsageError:
    """Turn what click found wrong with a command line into a UsageError."""
    context = error.ctx if isinstance(error, click.UsageError) else None
    command = context.command_path if context else PROGRAM
    if isinstance(error, click.NoSuchOption) and mergekit_flags.instead_of(error.option_name):
        typed = dict.fromkeys(word.partition("=")[0] for word in sys.argv if word.startswith("--"))
        foreign = [error.option_name, *(flag for flag in typed if flag not in _flags(context))]
        steps = {flag: step for flag in foreign if (step := mergekit_flags.instead_of(flag))}
        problems = [f"`{command}` has no flag `{printable(flag)}`, which is mergekit's" for flag in steps]
        return UsageError(problems, [*steps.values()])
    hint = f"see `{command} --help`"
    if context and isinstance(error, click.MissingParameter):
        hint = f"write `{command} {' '.join(_needed(context))}`; {hint}"
    return UsageError(_what(error, command), hint=hint)


def _needed(context: click.Context) -> Iterator[str]:
    """Yield the arguments and flags that a command cannot do without, as its usage line would have them."""
    for param in context.command.get_params(context):
        name = param.make_metavar(context)
        if isinstance(param, click.Option) and param.required:
            yield f"{param.opts[0]} {name}"
        elif isinstance(param, click.Argument):
            yield name


def _what(error: click.ClickException, command: str) -> str:
    if isinstance(error, click.NoSuchCommand):
        near = did_you_mean(error.command_name, _commands(error.ctx))
        return f"there is no command `{printable(error.command_name)}`{near}"
    if isinstance(error, click.NoSuchOption):
        near = did_you_mean(error.option_name, _flags(error.ctx))
        return f"`{command}` has no flag `{printable(error.option_name)}`{near}"
    if isinstance(error, click.BadParameter) and error.param:
        kind = "flag" if isinstance(error.param, click.Option) else "argument"
        name = re.sub(r"\[\w+\] ", "", _quoted(error.param.get_error_hint(error.ctx)))  # `[RECIPE] OUT`
        missing = isinstance(error, click.MissingParameter)
        return f"the {kind} {name} is missing" if missing else f"{name}: {_quoted(error.message)}"
    if extra := re.match(r"Got unexpected extra arguments? \((.*)\)", error.format_message()):
        context = error.ctx if isinstance(error, click.UsageError) else None
        own = ": each model needs its own `--expert`" if "--expert" in _flags(context) else ""
        return f"`{printable(extra[1])}` is more than `{command}` takes{own}"
    message = _quoted(error.format_message())
    return message[:1].lower() + message[1:]


def _commands(context: click.Context | None) -> list[str]:
    command = context.command if context else None
    return command.list_commands(context) if context and isinstance(command, click.Group) else []


def _flags(context: click.Context | None) -> list[str]:
    params = context.command.get_params(context) if context else []
    flags = [flag for param in params for flag in (*param.opts, *param.secondary_opts)]
    return [flag for flag in flags if flag.startswith("--")]


def _quoted(message: str) -> str:
    """Turn click's quotation marks into backticks, drop its full stop, and say a range in words."""
    message = re.sub(r"^(\S+) is not in the range x>=(\d+)", r"must be \2 or more, not \1", message)
    return re.sub(r"'([^'`]*)'", r"`\1`", message).removesuffix(".")


def program() -> str:
    """The words that start this program from the current folder: its name if the shell finds it, else as just now."""
    called = sys.argv[0]
    if os.path.basename(called) == "__main__.py":
        return shlex.join([sys.executable, "-m", "lowmem_aim"])
    found = shutil.which(PROGRAM)
    is_found = found is not None and os.path.realpath(found) == os.path.realpath(called)
    return PROGRAM if is_found or os.path.dirname(called) == "" else shlex.quote(called)


def command_line() -> str:
    """The command that resumes this run, quoted for a shell: as it was typed, without `--fresh`, which starts over."""
    return shlex.join([PROGRAM, *(word for word in sys.argv[1:] if word != "--fresh")])
