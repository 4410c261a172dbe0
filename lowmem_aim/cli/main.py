"""The entry point: runs a command, and turns errors and signals into messages and exit codes."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Sequence

import click

from lowmem_aim.cli import formats, usage
from lowmem_aim.cli.commands import cli
from lowmem_aim.cli.usage import command_line
from lowmem_aim.errors import LowmemAimError, UsageError, printable
from lowmem_aim.system import bugs, interrupts
from lowmem_aim.system.characters import use_what_streams_can_show
from lowmem_aim.system.faults import cause, of_the_system
from lowmem_aim.system.files import cache_folder, name_temporary_folder
from lowmem_aim.view.wrapping import for_terminal

PROBLEMS_ON_SCREEN = 100  # the others are only counted; a model of another size has one for each tensor
INDENT = len("error: ")
MANY_FILES = 4096
LONGEST_PROBLEM = 6000  # characters: a path may have 4,096 bytes


def report(error: LowmemAimError) -> None:
    """Print an error to stderr, as plain text: what happened, then what to do; problems with one hint together."""
    told = [f"{_listed(problems)}\n\n{_told_hint(hint)}" for hint, problems in error.by_hint().items()]
    print("\n\n".join(told), file=sys.stderr)


def _told_hint(hint: str) -> str:
    return for_terminal([f"hint: {hint}"], len("hint: "), sys.stderr)


def _listed(problems: Sequence[str]) -> str:
    lines = [printable(problem, LONGEST_PROBLEM) for problem in problems[:PROBLEMS_ON_SCREEN]]
    if len(problems) > PROBLEMS_ON_SCREEN:
        lines.append(f"... and {len(problems) - PROBLEMS_ON_SCREEN} more")
    first, *others = lines
    return for_terminal([f"error: {first}", *(f"{'':{INDENT}}{line}" for line in others)], INDENT, sys.stderr)


def main() -> None:
    """Run the command line, and exit with its exit code."""
    # Spinning worker threads cost up to four times the CPU time on a shared machine. Read when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    _open_closed_streams()
    use_what_streams_can_show()
    name_temporary_folder()
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", _folder_for_torch())
    _allow_many_files()
    sys.exit(_exit_code(usage.wanted(sys.argv)))


def _open_closed_streams() -> None:
    """Open streams that the caller has closed (`2>&-`) to nowhere; else the next file opened would take their place."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, os.O_RDWR)
            if descriptor != number:
                os.dup2(descriptor, number)
                os.close(descriptor)
            setattr(sys, name, open(number, "r" if name == "stdin" else "w", closefd=False))  # noqa: SIM115


def _folder_for_torch() -> str:
    """A folder that torch's compiler, which nothing here uses, makes when it is imported; else it takes one in /tmp.

    It is in the cache, or, where that cannot be made, a folder that is there already.
    """
    wanted = cache_folder() / "torch"
    above = next(folder for folder in (wanted, *wanted.parents) if os.path.lexists(folder))
    return str(wanted) if os.path.isdir(above) and os.access(above, os.W_OK | os.X_OK) else tempfile.gettempdir()


def _allow_many_files() -> None:
    """Raise the limit of open files as far as the user may: models of a hundred shards each need that many."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource  # not on Windows

        soft, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = MANY_FILES if most == resource.RLIM_INFINITY else min(MANY_FILES, most)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


def _exit_code(debug: bool) -> int:
    formats.begin()
    try:
        _check_current_folder()
        cli(prog_name=usage.PROGRAM, standalone_mode=False)
        return 0
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return 2
    except click.exceptions.Abort:
        return 130
    except interrupts.Interrupted:
        return _interrupted()
    except Exception as error:
        if interrupts.received():  # what a library made of it
            return _interrupted()
        told = _told(error, debug)
        report(told)
        formats.tell_failure(sys.argv, told, error)
        if debug:
            bugs.print_traceback(error)
        return told.exit_code


def _check_current_folder() -> None:
    """Raise UsageError if the current folder has been removed: libraries end the process when they cannot name it."""
    try:
        os.getcwd()
    except OSError as error:
        raise UsageError(f"the current folder cannot be used: {cause(error)}", "`cd` to one that exists") from error


def _told(error: Exception, debug: bool) -> LowmemAimError:
    """The error for the user's eyes, whatever it was that has ended a command."""
    if isinstance(error, LowmemAimError):
        return error
    if isinstance(error, click.ClickException):
        return usage.explained(error)
    if isinstance(error, OSError):
        return of_the_system(error)
    return LowmemAimError(f"{type(error).__name__}: {error}", bugs.hint(error, command_line(), debug))


def _interrupted() -> int:
    with contextlib.suppress(OSError):  # the terminal may be gone: that is a SIGHUP
        print(for_terminal([interrupts.message()], stream=sys.stderr), file=sys.stderr, flush=True)
    formats.tell_interruption(sys.argv, 128 + interrupts.received())
    return 128 + interrupts.received()
