"""What can end a command: each class is one exit code."""


class LbllmError(Exception):
    """A failure with a message for the user; `exit_code` is the process's."""

    exit_code = 1


class UsageError(LbllmError):
    """The recipe, its files or the command line are wrong: nothing was written. Exit code 2."""

    exit_code = 2


class RunError(LbllmError):
    """A stage failed while it ran; what it committed stays and the same command resumes. Exit code 1."""


class Interrupted(LbllmError):
    """SIGINT or SIGTERM arrived; the same command resumes. Exit code 130."""

    exit_code = 130


def reason(error: BaseException) -> str:
    """A library's own words for what it could not do, in one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__
