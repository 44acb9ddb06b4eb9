"""Errors that are the user's to mend: shown as one line, without a traceback."""


class UserError(Exception):
    """Something in the configuration, the data or the machine that one clear line can explain.

    The message says what is wrong and what to do.
    """


class NonFiniteLossError(UserError):
    """A loss became NaN or infinite. The message names the part, the step and the last good checkpoint."""
