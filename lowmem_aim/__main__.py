"""`python -m lowmem_aim`: the same as the command `lowmem-aim`."""

from lowmem_aim.cli import main

main()
