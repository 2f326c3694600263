"""The exception types that users are meant to see."""


class InputError(ValueError):
    """Bad input from outside: a config, a file, a data set, an artefact.

    The message is one line that says what is wrong and what to do about it. The command line
    prints it without a traceback and exits with a non-zero code; library callers can catch it
    as a `ValueError`. Names of files and settings get into messages: whatever is in them, the
    message is one line of printable letters.
    """

    def __init__(self, message: object = ""):
        """Makes one line of the message."""
        printable = "".join(c if c.isprintable() else " " for c in str(message))
        super().__init__(" ".join(printable.split()))


class Diverged(InputError):
    """What was computed is lost, not finite or far worse than a guess: the settings caused it."""


class Interrupted(Exception):
    """A stop was asked for, and carried out; the message says what is kept.

    Called again with the same arguments, the work goes on from there.
    """
