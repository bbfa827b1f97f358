"""The command line: one small file a command, each with ``add(commands)`` and a function that runs it."""
