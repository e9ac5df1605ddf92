"""The errors that end a command with one line instead of a traceback."""

FINISHED, OWN_FAULT, BAD_INPUT, CLUSTER_FAULT, INTERRUPTED = 0, 1, 2, 3, 130
"""What ``stablemoe train`` exits with; ``stablemoe_ds.launch.restart`` says what each means."""


class UserError(Exception):
    """Bad input. The command line prints the message as one line and exits with status 2.

    The message says what was found, where, what was expected and what to do.
    """


def one_line(error: BaseException) -> str:
    """What a library has to say, on one line that can be printed."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(str(error).split()))


class RunError(Exception):
    """A run that cannot go on although its input is good: a lost peer, no memory, a broken reader.

    exit_code: what the process ends with: OWN_FAULT, CLUSTER_FAULT, or BAD_INPUT if it was another rank's.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code
