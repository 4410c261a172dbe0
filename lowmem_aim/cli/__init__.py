"""The command line: flags, commands, exit codes.

main.py            the entry point: errors and signals as messages and exit codes
commands.py        the program: all commands as one group
working.py         the commands that work: on recipes, models and activations
looking.py         the commands that look: at runs, methods and the machine
evaluating.py      the command that evaluates a model
task_flags.py      the flags of commands that evaluate models
sweeping.py        the command that sweeps: many merges, each scored, all compared
comparing.py       the command that compares: scores of models, and a report of them
flags.py           the flags that several commands share, in the groups of their help
values.py          the types of their values: sizes, numbers in a range, paths
mergekit_flags.py  mergekit's flags: what acts, what is not needed and why, what is refused
from_mergekit.py   those flags on a command, turned into ours
formats.py         `--format`, and JSON's last line after an error
running.py         a command's work while it is shown, and what is printed at its end
pausing.py         `pause` and `resume` from another terminal: a request, and why no run can take it
usage.py           flags that every command has, and errors of usage in this tool's wording
catalogue.py       the merge methods as `lowmem-aim methods` describes them
completion.py      what a shell offers after Tab
"""
