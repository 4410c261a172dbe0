"""The command line: flags, commands, exit codes.

main.py            the entry point: errors and signals as messages and exit codes
commands.py        the commands
flags.py           the flags that several commands share, and the types of their values
mergekit_flags.py  mergekit's flags that this tool does not have, and what to do instead
usage.py           flags that every command has, and errors of usage in this tool's wording
catalogue.py       the merge methods as `lowmem-aim methods` describes them
completion.py      what a shell offers after Tab
"""
