"""The one exception that is shown to users."""


class MembenchError(Exception):
    """A mistake the user can mend: one line that names the culprit and says what to do.

    The command line prints it without a traceback and leaves with exit code 2.
    """
