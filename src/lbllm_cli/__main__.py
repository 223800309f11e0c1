"""`python -m lbllm_cli`."""

from lbllm_cli.cli import app

app()
