"""What a command says on stderr; stdout is for results."""

from rich.console import Console

GIB = float(1 << 30)


_silent = False


def silence(silent: bool = True) -> None:
    """Says nothing from now on: of several processes at one stage one speaks."""
    global _silent
    _silent = silent


def console() -> Console:
    """Logs go to stderr."""
    return Console(stderr=True, highlight=False, soft_wrap=True, quiet=_silent)


def say(text: str) -> None:
    """One line on stderr."""
    console().print(text, markup=False)


def clock(seconds: float) -> str:
    """3725 -> "1:02:05", 65 -> "1:05"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
