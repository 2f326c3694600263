"""The one exception type that users are meant to see."""


class InputError(ValueError):
    """Bad input from outside: a config, a file, a data set, an artefact.

    The message is one line that says what is wrong and what to do about it. The command line
    prints it without a traceback and exits with a non-zero code; library callers can catch it
    as a `ValueError`.
    """
