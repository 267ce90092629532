"""The ``branchwise`` command: one module for each sub-command. Slow imports are made when they are needed."""
