"""`lbllm`, and `python -m lbllm_cli`: signals are answered before anything else is imported, which takes seconds."""

from lbllm_cli.core import interrupt


def main() -> None:
    """The command line in a process of its own."""
    interrupt.end_at_once()
    from lbllm_cli.cli.app import app

    try:
        app()
    finally:
        interrupt.ignore()


if __name__ == "__main__":
    main()
