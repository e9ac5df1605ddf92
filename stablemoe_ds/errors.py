"""The error a person at the keyboard can do something about."""


class UserError(Exception):
    """Bad input. The command line prints the message as one line and exits with status 2.

    The message says what was found, where, what was expected and what to do.
    """
