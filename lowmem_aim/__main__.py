"""The start of `lowmem-aim` and of `python -m lowmem_aim`: signals are handled before anything slow is imported."""

from lowmem_aim.system import beginning, interrupts


def main() -> None:
    """The entry point of the command."""
    beginning.note()
    interrupts.install()
    from lowmem_aim.cli.main import main as command

    command()


if __name__ == "__main__":
    main()
