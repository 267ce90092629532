"""The ``branchwise`` command. One module a sub-command; what is slow to import is imported when it is needed."""
