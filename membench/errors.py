"""The exceptions that are shown to users."""


class MembenchError(Exception):
    """A mistake the user can mend: one line that names the culprit and says what to do.

    The command line prints it without a traceback and leaves with exit code 2.
    """


class DiskFull(MembenchError):
    """There is no space left to write results; what is finished is kept."""
