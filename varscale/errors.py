"""The error that is the user's to mend, told in one line and ended with exit code 2."""


class UserError(Exception):
    """A mistake in input or usage: the message names the key or file at fault, what was found, what is accepted."""
