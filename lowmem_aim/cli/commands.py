"""The program: all commands as one group.

Exit codes: see `errors`; 129, 130 and 143 after SIGHUP, SIGINT and SIGTERM.
"""

from __future__ import annotations

import sys

import click

import lowmem_aim
from lowmem_aim.cli import comparing, evaluating, looking, sweeping, usage, working
from lowmem_aim.system.address_space import check_address_space

WORKING = (
    working.init_command,
    working.merge_command,
    working.plan_command,
    working.relax_command,
    working.calibrate_command,
    evaluating.evaluate_command,
    sweeping.sweep_command,
    working.verify_command,
    working.convert_command,
    working.demo_command,
)
LOOKING = (
    looking.status_command,
    looking.pause_command,
    looking.resume_command,
    looking.replay_command,
    comparing.compare_command,
    looking.doctor_command,
    looking.methods_command,
    looking.completion_command,
)


@click.group(cls=usage.Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(lowmem_aim.__version__, prog_name=usage.PROGRAM)
@click.pass_context
def cli(context: click.Context) -> None:
    """Activation-informed merging (AIM) of large language models, streamed from disk in little memory."""
    loads_torch = context.invoked_subcommand in {command.name for command in WORKING}
    if loads_torch and not set(sys.argv) & {"-h", "--help"}:
        check_address_space()


for _command in (*WORKING, *LOOKING):
    cli.add_command(_command)
