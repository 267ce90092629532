"""The ``branchwise`` command, also as ``python -m branchwise``."""

import sys

from .runtime.server.processes.children import start_scheduler_early


def main() -> None:
    """Runs the command. ``branchwise serve`` starts its slowest process before anything else is imported."""
    if sys.argv[1:2] == ["serve"] and not {"-h", "--help"}.intersection(sys.argv):
        start_scheduler_early()
    from .frontend.cli.main import main as run

    run()


if __name__ == "__main__":
    main()
