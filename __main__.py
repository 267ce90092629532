"""``python -m branchwise`` is the ``branchwise`` command."""

from .frontend.cli.main import main

if __name__ == "__main__":
    main()
