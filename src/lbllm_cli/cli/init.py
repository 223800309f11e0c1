"""`lbllm init`: a recipe for a model on this machine."""

from pathlib import Path
from typing import Any

from rich.console import Console

from lbllm_cli.cli.draft import Draft, draft
from lbllm_cli.cli.draft_text import OWN, WEB, default_name, run_lines
from lbllm_cli.cli.forecasts import forecast_table, print_table
from lbllm_cli.cli.machine import Machine, PlacedModel
from lbllm_cli.core import files
from lbllm_cli.core.console import say
from lbllm_cli.core.errors import UsageError
from lbllm_cli.models.tokenizer import read_tokenizer
from lbllm_cli.recipe.shipped import MODELINE, SCHEMA, shipped_folder


def init(model: str, output: str | None, force: bool, machine: Machine | None = None) -> None:
    """`lbllm init`.

    model: a folder or a Hugging Face id. output: the recipe's file, None for one named as the model, "-" for standard output.
    machine: what is drafted for, this one where none is given. Raises UsageError where the file is there already or cannot be
    written, the model cannot be used, or no settings fit the machine.
    """
    _check(model, output)
    target = Path(default_name(model)) if output == "-" else _target(model, output, force)
    source = PlacedModel.open(model, machine or Machine.here())
    found = draft(source, model, str(target), chat=_has_chat_template(source, model))
    text = f"{MODELINE}{_schema_for(target)}\n{found.text}"
    if output == "-":
        print(text, end="")
        return
    files.write_text(target, text)
    out = Console()
    out.print(f"free: {source.machine}", highlight=False, soft_wrap=True)
    print_table(out, forecast_table(found.needs))
    print("\n".join(run_lines(str(target))))
    say(f"init: wrote {target}; its text comes from {WEB} on the Hugging Face hub, {_own(found)}")


def _check(model: str, output: str | None) -> None:
    """Raises UsageError for what is no name of a model or of a file."""
    if not model:
        raise UsageError("MODEL is empty; give a model folder, or a Hugging Face id")
    for text, key in ((model, "MODEL"), (output or "", "--output")):
        files.check_unicode(text, f"{key} {text}")
        files.user_path(text, key)


def _target(model: str, output: str | None, force: bool) -> Path:
    """The file to write. Raises UsageError where something else is in its place, or it cannot be written there."""
    target = Path(default_name(model)) if output is None else files.user_path(output, "--output")
    if problem := files.unwritable(target.parent):
        raise UsageError(f"{target} cannot be written: {problem}, or give another name with -o")
    if not target.parent.is_dir():
        raise UsageError(f"--output {target}: there is no folder {target.parent}; make it, or give another name with -o")
    files.check_regular(target)
    if target.exists() and not force:
        raise UsageError(f"{target} is there already; give another name with -o, or --force to replace it")
    return target


def _has_chat_template(source: PlacedModel, model: str) -> bool:
    """Whether chat can be rendered. A folder of the user's with config.json alone, for forecasts, has no tokenizer."""
    try:
        tokenizer: Any = read_tokenizer(source.folder, trust_remote_code=False)
    except UsageError:
        if source.entries or not Path(model).expanduser().is_dir():
            raise
        say(f"{source.folder} has no tokenizer: text is drafted without chat")
        return False
    return bool(tokenizer.chat_template)


def _schema_for(target: Path) -> str:
    """Where an editor finds the schema: beside the recipe, else where this package is installed."""
    return SCHEMA if (target.parent / SCHEMA).is_file() else (shipped_folder() / SCHEMA).as_uri()


def _own(found: Draft) -> str:
    sampled = any(item.sampled for item in found.recipe.data.training.source)
    return f"and from the model itself ({OWN})" if sampled else "none from the model itself"
