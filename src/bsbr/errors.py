"""The one exception for input that a user can mend."""


class UserError(ValueError):
    """Bad input found at run time: the message says what is wrong, what was expected and what to do.

    The command line prints it as one line and exits with code 2; library users catch it as a ValueError.
    """
