"""The program of the child process that runs one program which a model has written, under limits and without network.

The program comes on standard input. Two lines of JSON go to standard output: {"network": why it could not be left, or
""}, before the program runs, and {"passed": true} after it has run to its end, or false if it raised. A program that
ends the process, or is ended, leaves the first alone.
"""

from __future__ import annotations

import json
import os
import sys

from lowmem_aim.system.process_limits import end_after, end_with_parent, leave_network, limit_for_good


def main() -> None:
    """Run what is on standard input.

    The arguments: the id of the parent, bytes of memory and of a file that the program may have, and seconds.
    """
    parent, memory, file_bytes, seconds = map(int, sys.argv[1:])
    results = os.fdopen(os.dup(1), "w")
    nothing = os.open(os.devnull, os.O_RDWR)
    text = sys.stdin.read()
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    print(json.dumps({"network": leave_network()}), file=results, flush=True)
    end_with_parent(parent)
    os.chdir(os.environ["HOME"])
    limit_for_good(memory, file_bytes, seconds)
    end_after(seconds)
    try:
        exec(compile(text, "<program>", "exec"), {"__name__": "program"})
    except BaseException:  # SystemExit too: a program that ends early has not passed its tests
        passed = False
    else:
        passed = True
    print(json.dumps({"passed": passed}), file=results, flush=True)
    os._exit(0)  # whatever threads or handlers the program has left


if __name__ == "__main__":
    main()
