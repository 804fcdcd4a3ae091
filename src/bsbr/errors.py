"""The exceptions for input that a user can mend."""


class UserError(ValueError):
    """Bad input found at run time: the message says what is wrong, what was expected and what to do.

    The command line prints it as one line and exits with code `exit_code`; library users catch it as a ValueError.
    """

    exit_code = 2


class ResourceError(UserError):
    """The input is good, but this machine has not the memory or disk space for it."""

    exit_code = 3
