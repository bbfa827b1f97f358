"""Errors that end a command with one line instead of a stack trace."""

PREEMPTED = 75
"""Exit code that tells a scheduler to start the command again (EX_TEMPFAIL)."""


class DyncompError(Exception):
    """A problem the user can fix; the message is one line and names the fix."""


class Preempted(DyncompError):  # noqa: N818 - it is an outcome, not a mistake
    """Training stopped on a signal after saving; ``exit_code`` tells a scheduler to requeue."""

    def __init__(self, message: str, exit_code: int = PREEMPTED):
        super().__init__(message)
        self.exit_code = exit_code
